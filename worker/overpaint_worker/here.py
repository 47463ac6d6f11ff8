"""One job in this process, without a farm: read from a file, rendered or prepared, written to a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from overpaint_shared.errors import MissingExtraError, OverpaintError, SettingsError, UnsupportedError
from overpaint_shared.files import read_picture_file
from overpaint_shared.job import LARGEST_SPEC_BYTES, JobSpec, parse_job
from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.options import EngineOptions
from overpaint_worker.registry import Registry
from overpaint_worker.terminal import Show

if TYPE_CHECKING:
    from overpaint_worker.engine.clipseg.findings import Findings
    from overpaint_worker.engine.conductor import Conductor
    from overpaint_worker.engine.preparation import Opened

HERE: Final = "here"
"""The job's name where there is no farm to give it one."""


def read_job(path: Path) -> tuple[JobSpec, dict[str, bytes]]:
    """A spec from a file, and the pictures it names, read from beside it.

    Raises:
        SpecError: the spec is wrong. InputError: a picture cannot be read. UnsupportedError: a picture is not
        a file.

    """
    spec = parse_job(read_start(path, LARGEST_SPEC_BYTES), where=str(path))
    inputs: dict[str, bytes] = {}
    for field, reference in spec.image_refs():
        if reference.startswith(("s3://", "sha256:")):
            raise UnsupportedError(
                "this command reads pictures from files only", field=field, value=reference,
                fix="name a file, or submit the job to a farm",
            )  # fmt: skip
        found = f"paths are relative to the job's folder, {path.parent.resolve()}"
        inputs[reference] = read_picture(path.parent / reference, field, found)
    return spec, inputs


def read_picture(path: Path, field: str, found: str) -> bytes:
    """A picture file's bytes. Raises InputError; `found` says what to do where it cannot be read."""
    most = Limits().max_input_bytes
    return read_picture_file(path, most, field, smaller=f"use a file of up to {most} bytes", found=found)


def read_start(path: Path, most: int) -> bytes:
    """A file's bytes; of a longer one, one more than `most`."""
    with path.open("rb") as file:
        return file.read(most + 1)


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write a result's files. Raises `SettingsError` if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise SettingsError(
            f"cannot write: {error.strerror}", field="--out", value=str(folder), fix="choose another folder"
        ) from error
    return [folder / name for name in files]


def engine_options(registry: Path, device: str, threads: int | None) -> EngineOptions:
    """How the engine runs in this process. Raises `MissingExtraError` where it is not installed."""
    _need_engine()
    return EngineOptions(
        fd=-1,
        registry=registry,
        device=device,
        threads=threads or _cores(),
        hashes=_hashes(),
        limits=Limits(),
    )


def render_here(spec: JobSpec, inputs: Mapping[str, bytes], options: EngineOptions, show: Show) -> p.Done:
    """Render one job in this process. Raises the typed error that it fails with."""
    from overpaint_worker.engine.assemble import build

    ends: list[p.Done | p.Failed | p.Cancelled] = []

    def heard(message: p.ToWorker) -> None:
        if isinstance(message, p.Progress):
            show(message)
        elif isinstance(message, p.Done | p.Failed | p.Cancelled):
            ends.append(message)

    conductor = build(options, heard)
    conductor.submit(p.Render(job=HERE, token=0, spec_json=spec.to_json(), inputs=inputs))
    _until_done(conductor)
    end = ends[0]
    if isinstance(end, p.Done):
        return end
    raise OverpaintError.from_json(end.error) if isinstance(end, p.Failed) else KeyboardInterrupt


def _until_done(conductor: Conductor) -> None:
    try:
        conductor.run_until_idle()
    finally:
        conductor.close()


def prepared(
    spec: JobSpec, inputs: Mapping[str, bytes], options: EngineOptions
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """`canvas.png`, `mask.png`, heat maps, and what there is to say of them.

    Raises `InputError`, `MaskError`; `UnsupportedError` where the registry has no such segmenter.
    """
    from overpaint_shared.job import Output
    from overpaint_worker.engine import encode, masks
    from overpaint_worker.engine.decoders import Decoders
    from overpaint_worker.engine.packing import heat_files, mask_png
    from overpaint_worker.engine.preparation import open_pictures

    opened = open_pictures(spec, inputs, options.limits, Decoders())
    canvas, findings = opened.canvas, _found(opened, options)
    shown = encode.encode(
        canvas.rgb, Output(), canvas.icc, canvas.alpha, depth=canvas.depth, compat=spec.compat == "comfyui"
    )
    files = {"canvas.png": shown}
    about: dict[str, Any] = {
        "width": canvas.size.width,
        "height": canvas.size.height,
        "notes": list(opened.source.notes),
    }
    try:
        made = opened.mask(findings)
    except masks.NothingToRepaint:
        made = canvas.rgb.new_zeros(canvas.size.height, canvas.size.width)
        about["notes"].append("nothing was found, so nothing would be repainted")
    if made is not None:
        files["mask.png"] = mask_png(made)
        about["mask_coverage"] = round(masks.coverage(made), 6)
    return files | heat_files(findings.heat_maps(canvas.rgb)), about


def _found(opened: Opened, options: EngineOptions) -> Findings:
    """What the job's texts find in its canvas."""
    import torch

    from overpaint_worker.engine.assemble import open_device, set_up_torch
    from overpaint_worker.engine.clipseg.findings import Findings, search, texts
    from overpaint_worker.engine.clipseg.store import SegmenterStore
    from overpaint_worker.engine.families.weights import HashCache

    if not texts(opened.spec):
        return Findings()
    set_up_torch(options.threads)
    registry, hashes = Registry.load(options.registry), HashCache(options.hashes)
    store = SegmenterStore(registry, open_device(options.device), hashes)
    with torch.inference_mode():
        *_, found = search(opened.spec, opened.canvas.rgb, store)
    return found


def _need_engine() -> None:
    from importlib.util import find_spec

    for module in ("torch", "diffusers", "transformers"):
        if find_spec(module) is None:
            raise MissingExtraError(
                f"this command needs {module}, which is not installed", fix="pip install 'overpaint[worker]'"
            )


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hashes() -> Path:
    import os

    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "overpaint" / "hashes.json"
