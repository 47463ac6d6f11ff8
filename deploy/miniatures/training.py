"""What every training script here shares: scenes as arrays, the step loop with resume, averages, sheets."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deploy.miniatures import world

COUNT = 12_000  # scenes to train on


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one model is trained: where it keeps its files, how long, how fast it learns, on what."""

    out: Path
    name: str
    steps: int
    rate: float
    device: torch.device
    every: int = 250  # steps between lines of the log, and check points
    average: float = 0.998  # of the exponential moving average that is kept

    @property
    def folder(self) -> Path:
        """Where this model's check point, log and sheets lie."""
        return self.out / self.name


def parse_plan(name: str, *, steps: int, rate: float) -> Plan:
    """The command line that all the scripts have."""
    parser = argparse.ArgumentParser(prog=f"python -m deploy.miniatures.{name}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for check points, logs and sample sheets"
    )
    parser.add_argument("--steps", type=int, default=steps, help="steps in all, over every resumed run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = Plan(out=given.out, name=name, steps=given.steps, rate=rate, device=torch.device(given.device))
    plan.folder.mkdir(parents=True, exist_ok=True)
    return plan


def pixels(out: Path, count: int = COUNT) -> np.ndarray:
    """The first `count` scenes, uint8 [count, 128, 128, 3], drawn once and kept in `out`."""
    path = out / f"scenes-{count}.npy"
    if not path.exists():
        drawn = np.stack([world.scene(number).pixels for number in range(count)])
        np.save(path.with_suffix(".part.npy"), drawn)
        path.with_suffix(".part.npy").rename(path)
    return np.load(path, mmap_mode="r")


def signed(batch: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1."""
    return torch.as_tensor(np.asarray(batch)).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1


class Average:
    """The exponential moving average of a module's weights, which is what is kept in the end."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow the module; faster in the first steps, when its weights are still far off."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            kept = self.weights[key]
            if value.dtype.is_floating_point:
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)


def train(
    plan: Plan,
    module: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    sample: Callable[[nn.Module, int], None],
    parameters: Iterable[nn.Parameter] | None = None,
) -> Average:
    """Run `loss_of(step)` until the plan's end, from the check point where there is one."""
    trained = list(parameters) if parameters is not None else list(module.parameters())
    optimiser = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average, first = Average(module, plan.average), 0
    saved = plan.folder / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, map_location=plan.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        average.weights, first = state["average"], int(state["step"])
    began, sums, counted = time.monotonic(), {}, 0
    for step in range(first, plan.steps):
        torch.manual_seed(step)
        for group in optimiser.param_groups:
            group["lr"] = _rate(plan, step)
        with torch.autocast(plan.device.type, torch.bfloat16):
            loss, figures = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update(module, step)
        sums = {k: sums.get(k, 0.0) + v for k, v in {"loss": float(loss.detach()), **figures}.items()}
        counted += 1
        if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
            _log(
                plan,
                step + 1,
                {k: v / counted for k, v in sums.items()},
                (time.monotonic() - began) / counted,
            )
            began, sums, counted = time.monotonic(), {}, 0
            kept = {"module": module.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save({**kept, "average": average.weights, "step": step + 1}, saved.with_suffix(".part"))
            saved.with_suffix(".part").rename(saved)
            if (step + 1) % (4 * plan.every) == 0 or step + 1 == plan.steps:
                _with_average(module, average, lambda n=step + 1: sample(module, n))
    module.load_state_dict(average.weights)
    return average


def _with_average(module: nn.Module, average: Average, act: Callable[[], None]) -> None:
    own = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(average.weights)
    module.eval()
    with torch.no_grad():
        act()
    module.train()
    module.load_state_dict(own)


def _rate(plan: Plan, step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return plan.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


def _log(plan: Plan, step: int, figures: dict[str, float], seconds: float) -> None:
    words = " ".join(f"{k} {v:.5f}" for k, v in figures.items())
    line = f"{plan.name} step {step}/{plan.steps} {words} {seconds * 1000:.0f} ms/step"
    with (plan.folder / "log.txt").open("a") as log:
        log.write(line + "\n")


def sheet(rows: list[Tensor], path: Path) -> None:
    """A contact sheet: each row a batch [N, 3, H, W] in -1..1."""
    lines = [torch.cat(list(row.float().cpu()), 2) for row in rows]
    whole = ((torch.cat(lines, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(whole.numpy()).save(path)
