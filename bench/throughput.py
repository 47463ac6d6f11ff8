"""Pictures per device: jobs of mixed methods through the step loop, against two baselines in the same run.

    .venv/bin/python bench/throughput.py --shape sd15 --device cuda:0
    .venv/bin/python bench/throughput.py --shape tiny --side 64 --steps 4 --jobs 8

The load is img2img, VAE Encode (for Inpainting) and Set Latent Noise Mask in turn, each job with its own
seed, prompt and denoise, arriving one after the other. Baselines: the same engine given one job at a time,
and diffusers' own img2img pipeline on the same weights with as many UNet passes per picture (no masks, no
files). `join` is how soon a short job steps that comes to a busy device. Prints a table and one line of JSON.
Loading and the first passes are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rendering import Engine, add_options, device_name, peak_mib, pictures, png, receipt, registry_of
from weights import FAMILIES

from overpaint_worker import protocol as p
from overpaint_worker.registry import Registry

METHODS: Sequence[tuple[dict[str, Any], float]] = (
    ({"kind": "img2img"}, 0.6),
    ({"kind": "vae_encode_inpaint", "grow_mask_by": 6}, 1.0),
    ({"kind": "latent_noise_mask"}, 0.8),
)
"""Methods of the load, and denoise of each."""
PROMPTS = ("a red brick house", "a cat on a chair", "the sea in winter", "an old map", "a bowl of fruit")
CFG = 7.0


def spec(model: str, number: int, steps: int) -> dict[str, Any]:
    """Job of that number in the load."""
    method, denoise = METHODS[number % len(METHODS)]
    job = {
        "version": 1, "model": model, "source": {"image": "s.png"}, "method": method,
        "prompt": PROMPTS[number % len(PROMPTS)], "negative_prompt": "blurry",
        "sampling": {"seed": number, "steps": steps, "cfg": CFG, "sampler": "euler", "scheduler": "normal",
                     "denoise": denoise},
    }  # fmt: skip
    return job if method["kind"] == "img2img" else {**job, "mask": {"from": "image", "image": "m.png"}}


class Bench:
    """One engine, and loads for it."""

    def __init__(self, engine: Engine, model: str, wish: argparse.Namespace) -> None:
        self.engine, self.model, self.wish = engine, model, wish
        source, mask = pictures(wish.side, 0.2)
        self.source, self.inputs = source, {"s.png": png(source), "m.png": png(mask)}

    def submit(self, name: str, number: int, steps: int) -> float:
        """Hand in a job of the load; the time."""
        return self.engine.submit(name, spec(self.model, number, steps), self.inputs)

    def warm_up(self, jobs: int) -> None:
        """Load, choose kernels, learn the row limit."""
        self.together("warm", jobs, 0.0)

    def together(self, title: str, jobs: int, every_s: float) -> dict[str, Any]:
        """Jobs that arrive one after the other, whether or not the ones before are done."""
        peak_mib(self.wish.device, forget=True)
        names, began = [f"{title}-{i}" for i in range(jobs)], time.perf_counter()
        for i, name in enumerate(names):
            time.sleep(max(began + i * every_s - time.perf_counter(), 0))
            self.submit(name, i, self.wish.steps)
        done = self.engine.until_done(*names)
        return {**self._rates(began, names, done), **occupancy(done), "peak_mib": peak_mib(self.wish.device)}

    def one_at_a_time(self, jobs: int) -> dict[str, Any]:
        """Each is handed in when the one before is done."""
        names, began, done = [f"alone-{i}" for i in range(jobs)], time.perf_counter(), list[p.Done]()
        for i, name in enumerate(names):
            self.submit(name, i, self.wish.steps)
            done += self.engine.until_done(name)
        return {**self._rates(began, names, done), **occupancy(done)}

    def _rates(self, began: float, names: Sequence[str], done: Sequence[p.Done]) -> dict[str, Any]:
        seconds = max(self.engine.ends[name][0] for name in names) - began
        evaluations = sum(receipt(each)["evaluations"]["count"] for each in done)
        return {
            "jobs": len(done), "seconds": round(seconds, 3),
            "pictures_per_s": round(len(done) / seconds, 3), "steps_per_s": round(evaluations / seconds, 1),
        }  # fmt: skip

    def join(self, company: int) -> dict[str, Any]:
        """How long a job of four steps takes among long ones, and how long until its first step."""
        long = [f"long-{i}" for i in range(company)]
        for i, name in enumerate(long):
            self.submit(name, i, 6 * self.wish.steps)
        self.engine.until_stepping(*long)
        came = self.submit("short", 1, 4)
        self.engine.until_done("short")
        told, end = self.engine.steps["short"], self.engine.ends["short"][0]
        running = [name for name in long if name not in self.engine.ends]
        self.engine.until_done(*long)
        return {
            "company": company, "long_jobs_still_running": len(running), "step_ms": self._step_ms(long),
            "joined_ms": round(1000 * (told[0] - came), 1),
            "joined_to_first_step_ms": round(1000 * (told[1] - told[0]), 1),
            "done_ms": round(1000 * (end - came), 1),
        }  # fmt: skip

    def _step_ms(self, names: Sequence[str]) -> float:
        """Milliseconds of a step in such company, all that happens between two steps included."""
        by_job = (receipt(done) for done in self.engine.until_done(*names))
        return round(
            statistics.median(1000 * r["seconds"]["denoise"] / r["evaluations"]["count"] for r in by_job), 1
        )


def occupancy(done: Sequence[p.Done]) -> dict[str, Any]:
    """How many jobs shared a pass, the mean over passes: each of n jobs counts an n-th of its passes."""
    companies = [receipt(each)["evaluations"]["by_company"] for each in done]
    evaluations = sum(count for each in companies for count in each.values())
    passes = sum(count / int(n) for each in companies for n, count in each.items())
    return {"passes": round(passes), "mean_jobs_per_pass": round(evaluations / passes, 2)}


def pipeline(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The pipeline of diffusers itself, of the weights in a diffusers folder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        StableDiffusionImg2ImgPipeline,
    )
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    root, tokenizer = str(folder), str(FAMILIES / "clip-tokenizer")
    made: Any = StableDiffusionImg2ImgPipeline(
        vae=AutoencoderKL.from_pretrained(root, subfolder="vae", torch_dtype=dtype),
        unet=UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=dtype),
        text_encoder=CLIPTextModel.from_pretrained(root, subfolder="text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77),
        scheduler=EulerDiscreteScheduler.from_pretrained(root, subfolder="scheduler", steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made.to(device)


def by_diffusers(folder: Path, wish: argparse.Namespace, source: Image.Image) -> dict[str, Any]:
    """Pictures per second of the pipeline, one at a time, each of as many UNet passes as ours."""
    dtype = torch.float16 if wish.device.startswith("cuda") else torch.float32
    made, strength = pipeline(folder, wish.device, dtype), METHODS[0][1]
    asked = next(n for n in range(wish.steps, 4 * wish.steps) if int(n * strength) == wish.steps)
    passes = 0

    def one(number: int) -> None:
        nonlocal passes
        made(
            PROMPTS[number % len(PROMPTS)], image=source, strength=strength, num_inference_steps=asked,
            guidance_scale=CFG, negative_prompt="blurry",
            generator=torch.Generator("cpu").manual_seed(number),
        )  # fmt: skip
        passes += made.num_timesteps if number >= 0 else 0

    for _ in range(2):
        one(-1)
    began = time.perf_counter()
    for number in range(wish.alone):
        one(number)
    seconds = time.perf_counter() - began
    return {
        "jobs": wish.alone, "seconds": round(seconds, 3), "pictures_per_s": round(wish.alone / seconds, 3),
        "steps_per_s": round(passes / seconds, 1),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Pictures per second, and what of it the loop gains."""
    rows = [f"{'':24}{'pictures/s':>12}{'steps/s':>10}{'jobs/pass':>11}{'loop is':>10}"]
    best = found["together"]["pictures_per_s"]
    for name in ("together", "one_at_a_time", "diffusers"):
        it = found.get(name)
        if it:
            gain = "" if name == "together" else f"{best / it['pictures_per_s']:.2f} x"
            shared = it.get("mean_jobs_per_pass", "")
            rows.append(f"{name:24}{it['pictures_per_s']:>12}{it['steps_per_s']:>10}{shared:>11}{gain:>10}")
    return "\n".join(rows)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--side", type=int, default=512, help="pixels (512)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=32, help="that arrive one after the other (32)")
    parser.add_argument("--every", type=float, default=0.05, help="seconds between two arrivals (0.05)")
    parser.add_argument("--warm", type=int, default=16, help="jobs before anything is measured (16)")
    parser.add_argument("--alone", type=int, default=6, help="jobs of each baseline (6)")
    parser.add_argument("--company", type=int, default=7, help="long jobs that a short one joins (7)")
    return parser.parse_args()


def main() -> None:
    wish = options()
    with registry_of(wish) as (registry, model):
        found: dict[str, Any] = {
            "bench": "throughput", "device": wish.device, "device_name": device_name(wish.device),
            "torch": torch.__version__, "model": model, "side": wish.side, "steps": wish.steps,
            "every_s": wish.every,
        }  # fmt: skip
        with Engine(registry, wish.device, wish.threads, 2 * wish.side**2) as engine:
            bench = Bench(engine, model, wish)
            bench.warm_up(wish.warm)
            found["together"] = bench.together("mixed", wish.jobs, wish.every)
            found["one_at_a_time"] = bench.one_at_a_time(wish.alone)
            found["join"] = bench.join(wish.company)
        folder = Registry.load(registry).model(model).local_path
        if folder.is_dir():  # a single file has another layout
            found["diffusers"] = by_diffusers(folder, wish, Image.fromarray(bench.source))
    print(table(found), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
