"""What every training script here shares: the command line, the step loop with resume, averages, sheets."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from deploy.miniatures import data

WARM_UP = 200  # steps


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one model is trained: where it keeps its files, how long, how fast it learns, on what."""

    out: Path
    name: str
    steps: int
    minutes: float
    rate: float
    batch: int
    scenes: int
    device: torch.device
    every: int = 250  # steps between lines of the log, and check points
    average: float = 0.999  # of the exponential moving average that is kept

    @property
    def folder(self) -> Path:
        """Where this model's check point, log and sheets lie."""
        return self.out / self.name

    def data(self) -> data.Scenes:
        """The scenes to learn from."""
        return data.load(self.out, self.scenes, self.device)


def parse_plan(name: str, *, steps: int, rate: float, batch: int) -> Plan:
    """The command line that all the scripts have."""
    parser = argparse.ArgumentParser(prog=f"python -m deploy.miniatures.{name}")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for scenes, check points, logs and sample sheets"
    )
    parser.add_argument("--steps", type=int, default=steps, help="steps in all, over every resumed run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most, over every resumed run")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate, help="of learning, at its highest")
    parser.add_argument("--scenes", type=int, default=40_000, help="to draw and to learn from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    torch.backends.cudnn.benchmark = True
    plan = Plan(name=name, **{**given, "device": torch.device(given["device"])})
    plan.folder.mkdir(parents=True, exist_ok=True)
    return plan


class Average:
    """The exponential moving average of a module's weights, which is what is kept in the end."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow the module; faster in the first steps, when its weights are still far off."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.weights[k], v) for k, v in module.state_dict().items() if v.is_floating_point()]
        torch._foreach_lerp_([kept for kept, _ in pairs], [new for _, new in pairs], 1 - decay)


class Clock:
    """How far training has come, over all its runs: the later of steps done and minutes spent."""

    def __init__(self, plan: Plan, spent: float = 0.0) -> None:
        self._plan, self._began = plan, time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    def share(self, step: int) -> float:
        """0 at the start, 1 and more when it is over."""
        return max(step / self._plan.steps, self.spent / (60 * self._plan.minutes))

    def rate(self, step: int) -> float:
        """Of learning: a short rise, then half a cosine down."""
        warm = min(1.0, (step + 1) / WARM_UP)
        return self._plan.rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.share(step))))


def train(
    plan: Plan,
    module: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    sample: Callable[[nn.Module, int], None],
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Run `loss_of(step)` until the plan's end, from the check point where there is one.

    The module has the averaged weights in the end.
    """
    trained = list(parameters) if parameters is not None else list(module.parameters())
    fused = plan.device.type == "cuda"
    optimiser = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    average, step, clock = Average(module, plan.average), 0, Clock(plan)
    saved = plan.folder / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, map_location=plan.device, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        average.weights, step, clock = state["average"], int(state["step"]), Clock(plan, state["spent"])
    log, over = _Log(plan, step), False
    while not over:
        for group in optimiser.param_groups:
            group["lr"] = clock.rate(step)
        torch.manual_seed(step)
        with torch.autocast(plan.device.type, torch.bfloat16):
            loss, figures = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update(module, step)
        step += 1
        over = clock.share(step) >= 1
        log.note({"loss": loss.detach(), **figures})
        if step % plan.every == 0 or over:
            log.write(step)
            kept = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            _save({**kept, "average": average.weights, "spent": clock.spent}, saved)
        if step % (8 * plan.every) == 0 or over:
            _with_average(module, average, lambda n=step: sample(module, n))  # type: ignore[misc]
    module.load_state_dict(average.weights)
    module.eval()


class _Log:
    """Means of the figures since the last line; the figures stay on the device until then."""

    def __init__(self, plan: Plan, step: int) -> None:
        self._plan, self._sums, self._since, self._began = plan, dict[str, Tensor](), step, time.monotonic()

    def note(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def write(self, step: int) -> None:
        count, now = step - self._since, time.monotonic()
        words = " ".join(f"{k} {float(v) / count:.5f}" for k, v in self._sums.items())
        line = f"{self._plan.name} step {step} {words} {(now - self._began) / count * 1000:.0f} ms/step"
        with (self._plan.folder / "log.txt").open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)
        self._sums, self._since, self._began = {}, step, time.monotonic()


def _save(state: dict[str, object], path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _with_average(module: nn.Module, average: Average, act: Callable[[], None]) -> None:
    own = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(average.weights)
    module.eval()
    with torch.no_grad():
        act()
    module.train()
    module.load_state_dict(own)


def sheet(rows: list[Tensor], path: Path) -> None:
    """A contact sheet: each row a batch [N, 3, H, W] in -1..1."""
    lines = [torch.cat(list(row.float().cpu()), 2) for row in rows]
    whole = ((torch.cat(lines, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(whole.numpy()).save(path)
