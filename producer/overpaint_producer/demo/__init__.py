"""The demo: one picture, repainted by every method on a running farm, and a sheet to look at."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint_producer.demo.jobs import MASK, PROMPT, SCENE, SEED, WORD, Shot, shots
from overpaint_producer.demo.sheet import Panel, contact_sheet
from overpaint_shared.ledger.states import TERMINAL

if TYPE_CHECKING:
    from overpaint_producer.client import Farm, Job

START = "latent-noise-mask"
"""The job that is left as a file to start from, where the models can do it."""
HEATMAP = "heatmap.png"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What the demo made."""

    pictures: tuple[Path, ...]
    sheet: Path
    keys: tuple[str, ...]
    """Where the pictures lie in the bucket, in the order of `pictures`."""


def render(farm: "Farm", folder: Path, *, say: Callable[[str], None]) -> Rendered:
    """Submit the jobs together, wait, and fetch their pictures out of S3 into `folder`.

    Also writes the sheet and `job.json` to start from. Raises what a job failed with, ServiceError, and
    UnsupportedError where the worker has no model.
    """
    wanted = shots(farm.catalogue())
    folder.mkdir(parents=True, exist_ok=True)
    for given in (SCENE, MASK):
        (folder / given.name).write_bytes(given.read_bytes())
    start = next((shot for shot in wanted if shot.name == START), wanted[0])
    (folder / "job.json").write_text(json.dumps(start.spec, indent=2) + "\n")
    jobs = farm.submit_many([shot.spec for shot in wanted], folder=folder)
    names = {job.id: shot.label for job, shot in zip(jobs, wanted, strict=True)}
    for event in farm.follow([job.id for job in jobs]):
        if event.state in TERMINAL:
            say(f"{event.state}: {names[event.job_id]}")
    files = [job.files() for job in jobs]
    return Rendered(
        pictures=tuple(_save(folder, shot, each) for shot, each in zip(wanted, files, strict=True)),
        sheet=_sheet(folder, wanted, files),
        keys=tuple(_key(job) for job in jobs),
    )


def _save(folder: Path, shot: Shot, files: Mapping[str, bytes]) -> Path:
    path = folder / f"{shot.name}.png"
    path.write_bytes(files["image.png"])
    return path


def _key(job: "Job") -> str:
    return job.status().files["image.png"]


def _sheet(folder: Path, wanted: list[Shot], files: list[dict[str, bytes]]) -> Path:
    found = [Panel(f'where is "{WORD}"?', each[HEATMAP]) for each in files if HEATMAP in each]
    panels = [Panel("the picture", SCENE.read_bytes()), Panel("the mask", MASK.read_bytes()), *found]
    panels += [Panel(shot.label, each["image.png"]) for shot, each in zip(wanted, files, strict=True)]
    out = BytesIO()
    contact_sheet(panels, title=f'"{PROMPT}", seed {SEED}').save(out, "PNG")
    path = folder / "contact-sheet.png"
    path.write_bytes(out.getvalue())
    return path
