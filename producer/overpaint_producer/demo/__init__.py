"""The demo: one drawing, rendered by img2img at three strengths on a running farm, and a sheet to look at."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint_producer.demo.sheet import Panel, contact_sheet
from overpaint_shared.ledger.states import TERMINAL

if TYPE_CHECKING:
    from overpaint_producer.client import Farm, Job

SOURCE = Path(__file__).with_name("lake.png")
DENOISE = (0.3, 0.6, 0.9)
SEED = 7
PROMPT = "a sailing boat on a mountain lake at dusk"
UNTRAINED = "The weights are tiny and untrained: they blur and dream, and follow no prompt."


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What the demo made."""

    pictures: tuple[Path, ...]
    sheet: Path
    keys: tuple[str, ...]
    """Where the pictures lie in the bucket, in the order of DENOISE."""


def spec(model: str, denoise: float, source: str) -> dict[str, Any]:
    """A job of the demo, as one would write it in a file."""
    return {
        "version": 1,
        "model": model,
        "source": {"image": source},
        "method": {"kind": "img2img"},
        "prompt": PROMPT,
        "sampling": {"seed": SEED, "steps": 20, "cfg": 4.0, "sampler": "euler", "denoise": denoise},
        "group": "demo",
    }


def render(farm: "Farm", model: str, folder: Path, *, trained: bool, say: Callable[[str], None]) -> Rendered:
    """Submit the three jobs together, wait, and fetch their pictures out of S3 into `folder`.

    Also writes the sheet and `job.json` to start from. Raises what a job failed with, and ServiceError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE.name).write_bytes(SOURCE.read_bytes())
    (folder / "job.json").write_text(json.dumps(spec(model, 0.5, SOURCE.name), indent=2) + "\n")
    jobs = farm.submit_many([spec(model, denoise, SOURCE.name) for denoise in DENOISE], folder=folder)
    for done in farm.follow([job.id for job in jobs]):
        if done.state in TERMINAL:
            say(f"job {done.job_id}: {done.state}")
    files = [job.files() for job in jobs]
    pictures = [
        _save(folder / f"denoise-{denoise}.png", each) for denoise, each in zip(DENOISE, files, strict=True)
    ]
    return Rendered(
        pictures=tuple(pictures),
        sheet=_sheet(folder, pictures, model=model, trained=trained),
        keys=tuple(_key(job) for job in jobs),
    )


def _save(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(files["image.png"])
    return path


def _key(job: "Job") -> str:
    return str((job.status().result or {})["files"]["image.png"])


def _sheet(folder: Path, pictures: list[Path], *, model: str, trained: bool) -> Path:
    panels = [Panel("the drawing", SOURCE.read_bytes())]
    panels += [
        Panel(f"denoise {denoise}", path.read_bytes())
        for denoise, path in zip(DENOISE, pictures, strict=True)
    ]
    sheet = contact_sheet(
        panels,
        title=f"img2img, model {model}, seed {SEED}, 20 steps of euler",
        note="" if trained else UNTRAINED,
    )
    out = BytesIO()
    sheet.save(out, "PNG")
    path = folder / "contact-sheet.png"
    path.write_bytes(out.getvalue())
    return path
