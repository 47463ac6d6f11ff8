"""`overpaint rerender`: a receipt's job once more, and whether the picture is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import click

from overpaint_shared.errors import EXIT_JOB_FAILED, InputError, visible
from overpaint_shared.job import JobSpec, parse_job
from overpaint_worker.commands import device_option, quiet_option, registry_option, threads_option
from overpaint_worker.here import engine_options, read_picture, render_here, write_files
from overpaint_worker.terminal import bar, quiet_logs

LARGEST_RECEIPT: Final = 16 * 2**20
MOST_THREADS: Final = 1024
NAME_FOLDER: Final = "name the folder that holds it by --inputs"
_COMPARED: Final = ("model", "segmenters", "device", "versions")
"""Parts of a receipt that can explain another picture."""


@dataclass(frozen=True, eq=False)
class Receipt:
    """A receipt, as far as it takes to render again."""

    folder: Path
    spec: JobSpec
    inputs: Mapping[str, str]
    """The SHA-256 of each picture, by its reference in the spec."""
    sizes: frozenset[int]
    """Of those pictures, bytes."""
    name: str
    """Of the picture."""
    pixels: str
    whole: Mapping[str, Any]


@click.command(
    epilog="""\b
Examples:
  overpaint rerender out/receipt.json --registry models.toml
  overpaint rerender image.png --inputs pictures --out again --json

\b
Exit codes: 0 the same picture, 1 another picture or a picture is missing, 2 the command or the receipt is
wrong, 130 interrupted.
"""
)
@click.argument("receipt", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@registry_option
@click.option(
    "--inputs", "folders", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True,
    help="Folder to look for the job's pictures in; can be repeated. The receipt's own is always looked in, "
    "and the working folder for the names that the receipt has.",
)  # fmt: skip
@device_option
@threads_option
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=None,
    help="Folder to write the new files to; without it none is kept.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of words.")
@quiet_option
def rerender(  # noqa: PLR0917 - click calls it by name
    receipt: Path,
    registry: Path,
    folders: tuple[Path, ...],
    device: str,
    threads: int | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Render a receipt's job again, and say whether the picture is the same.

    RECEIPT is a receipt.json, or a PNG that carries one. The job's pictures are found by their SHA-256, among
    the files beside the receipt and in the folders of --inputs, and in the working folder by their names.
    """
    quiet_logs(as_json=as_json)
    read = read_receipt(receipt)
    inputs = find_inputs(read, [receipt.parent, *folders], named_in=Path())
    options = engine_options(registry, device, threads or _threads(read))
    with bar(show=not quiet and not as_json) as show:
        done = render_here(read.spec, inputs, options, show)
    if out is not None:
        write_files(out, done.files)
    about = compare(read, done.files)
    click.echo(json.dumps(about) if as_json else visible(in_words(about)))
    if not about["same"]:
        raise SystemExit(EXIT_JOB_FAILED)


def read_receipt(path: Path) -> Receipt:
    """A receipt from its own file, or from the text of a PNG.

    Raises:
        InputError: it is none, or one of a version that did not note the pixels' digest. SpecError: its job
        is none.

    """
    try:
        whole = json.loads(_text(path))
        inputs = {reference: str(about["sha256"]) for reference, about in whole["inputs"].items()}
        sizes = frozenset(int(about["bytes"]) for about in whole["inputs"].values())
        spec, picture = whole["spec"], whole["picture"]
        # A name is a file's beside the receipt, never a way elsewhere.
        name, pixels = Path(str(picture["name"])).name, str(picture["pixels_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as cause:
        raise InputError(
            f"{path} is no receipt that can be rendered again", field="receipt", value=str(path),
            fix="name a receipt.json, or a PNG as it was rendered",
        ) from cause  # fmt: skip
    parsed = parse_job(json.dumps(spec), where=str(path))
    return Receipt(path.parent, parsed, inputs, sizes, name, pixels, whole)


def _text(path: Path) -> str:
    from PIL import Image

    from overpaint_worker.engine.png import SIGNATURE
    from overpaint_worker.engine.provenance import RECEIPT_KEY

    data = read_picture(path, "receipt", "name a receipt.json, or a PNG as it was rendered")
    if data.startswith(SIGNATURE):
        try:
            with Image.open(BytesIO(data), formats=["PNG"]) as image:
                return str(image.info[RECEIPT_KEY])
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
    if len(data) > LARGEST_RECEIPT:
        raise ValueError("too large")
    return data.decode()


def find_inputs(
    receipt: Receipt, folders: Sequence[Path], *, named_in: Path | None = None
) -> dict[str, bytes]:
    """The job's pictures, each known by its digest, whatever it is called.

    `named_in`: a folder with other files in it too, of which only those are read that the job named.
    Raises `InputError`: one is in none of the folders, or too large.
    """
    known = set(receipt.inputs.values())
    found: dict[str, bytes] = {}
    for path in _candidates(receipt, folders, named_in):
        if len(found) == len(known):
            break
        if path.stat().st_size in receipt.sizes:
            data = read_picture(path, "inputs", NAME_FOLDER)
            digest = hashlib.sha256(data).hexdigest()
            if digest in known:
                found[digest] = data
    for reference, sha256 in receipt.inputs.items():
        if sha256 not in found:
            where = ", ".join(map(str, folders if named_in is None else [*folders, named_in]))
            raise InputError(
                f"the picture {reference} (SHA-256 {sha256}) is not in {where}", field="inputs",
                value=reference, fix=NAME_FOLDER,
            )  # fmt: skip
    return {reference: found[sha256] for reference, sha256 in receipt.inputs.items()}


def _candidates(receipt: Receipt, folders: Sequence[Path], named_in: Path | None) -> Iterator[Path]:
    """What the job called its pictures comes first, then all files of the folders."""
    for folder in [*folders, *([] if named_in is None else [named_in])]:
        named = (folder / reference for reference in receipt.inputs if "://" not in reference)
        yield from (path for path in named if path.is_file())
    for folder in folders:
        yield from (path for path in sorted(folder.iterdir()) if path.is_file())


def compare(receipt: Receipt, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Whether the new picture is the receipt's, and what is known of the difference.

    `same`; `pixels_sha256` of both; `company`: the old one's passes held other jobs, which may cost a level;
    `changed`: parts of the receipt that differ and may be why; with the old picture beside the receipt
    `largest_change` (8-bit levels) and `changed_share`, or `not_compared`: why it cannot be read.
    """
    new = json.loads(files["receipt.json"])
    same = new["picture"]["pixels_sha256"] == receipt.pixels
    about: dict[str, Any] = {
        "same": same,
        "pixels_sha256": {"before": receipt.pixels, "now": new["picture"]["pixels_sha256"]},
        "company": _in_company(receipt),
        "changed": [part for part in _COMPARED if receipt.whole.get(part) != new.get(part)],
    }
    old = receipt.folder / receipt.name
    if not same and old.is_file():
        try:
            before = read_picture(old, "picture", "")
            about |= _difference(before, files[new["picture"]["name"]])
        except InputError as error:
            about["not_compared"] = str(error)
    return about


def _threads(receipt: Receipt) -> int | None:
    """Torch's threads where the old picture was rendered; None where a receipt of before does not say."""
    match receipt.whole.get("device"):
        case {"threads": int(threads)} if 1 <= threads <= MOST_THREADS:
            return threads
    return None


def _in_company(receipt: Receipt) -> bool:
    """Whether the old picture's passes held other jobs, and its bits may tell, not being `deterministic`."""
    match receipt.whole.get("evaluations"):
        case {"by_company": Mapping() as passes} if not receipt.spec.sampling.deterministic:
            return any(jobs != "1" for jobs in passes)
    return False


def _difference(before: bytes, now: bytes) -> dict[str, Any]:
    import numpy as np

    from overpaint_shared.settings import Limits
    from overpaint_worker.engine import picture

    one, other = (picture.load(data, Limits(), "picture").rgb.numpy() for data in (before, now))
    if one.shape != other.shape:
        return {"sizes": [list(one.shape[1::-1]), list(other.shape[1::-1])]}
    change = np.abs(one - other).max(axis=-1) * 255
    return {
        "largest_change": round(float(change.max()), 4),
        "changed_share": round(float((change > 0).mean()), 6),
    }


def in_words(about: Mapping[str, Any]) -> str:
    """What `compare` found, for people."""
    if about["same"]:
        return "the same picture"
    words = "another picture"
    if "largest_change" in about:
        share, largest = about["changed_share"], about["largest_change"]
        words += (
            f": {share:.2%} of the pixels differ, by up to {largest:g} level{'s' if largest != 1 else ''}"
        )
        if about["company"] and largest <= 1:
            words += ", as is normal for a job rendered in company that is not `deterministic`"
    if "not_compared" in about:
        words += f"; how much it differs is not known: {about['not_compared']}"
    if about["changed"]:
        words += f"; not as it was: {', '.join(about['changed'])}"
    return words
