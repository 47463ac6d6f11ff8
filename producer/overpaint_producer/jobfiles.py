"""Job files as they come: `.json` with one job, `.jsonl` with one a line, or either on standard input.

Reading knows nothing of the spec; it yields drafts, which say where they came from for messages.
"""

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from overpaint_shared.errors import SpecError

MAX_DRAFT_BYTES = 4 << 20  # never held in memory beyond this; the spec's own limit is lower and says more

_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
"""How files begin that are no jobs: PNG, JPEG, WebP, GIF and TIFF."""

Raw = bytes | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One job, not parsed yet: its JSON, the folder that picture paths start from, its name for messages."""

    data: Raw
    folder: Path
    where: str


def expand(names: Iterable[str]) -> list[str]:
    """The names, with patterns that a shell left (`jobs/*.json`) replaced by the files they match, sorted.

    Raises SpecError for a pattern that matches nothing.
    """
    return list(chain.from_iterable(_expanded(name) for name in names))


def _expanded(name: str) -> list[str]:
    if not glob.has_magic(name) or Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found:
        raise SpecError(f"no file matches {name}", fix="check the pattern and the folder")
    return found


def read(name: str, stdin: BinaryIO) -> Iterator[Draft]:
    """The drafts of one file, or of `stdin` for `-`; lines are read as they come. Raises SpecError."""
    if name == "-":
        return _parts(stdin, "standard input", Path.cwd(), lines=True)
    return read_path(Path(name))


def read_path(path: Path) -> Iterator[Draft]:
    """The drafts of a file: one of `.json`, one a line of `.jsonl` and `.ndjson`. Raises SpecError."""
    try:
        with path.open("rb") as file:
            yield from _parts(
                file, str(path), path.parent, lines=path.suffix.lower() in {".jsonl", ".ndjson"}
            )
    except OSError as error:
        raise SpecError(
            f"cannot read {path}: {error.strerror}", fix="name a file that holds a job"
        ) from error


def _parts(file: BinaryIO, where: str, folder: Path, *, lines: bool) -> Iterator[Draft]:
    if lines:
        yield from _lines(file, where, folder)
    else:
        data = file.read(MAX_DRAFT_BYTES + 1)
        if data.startswith(_PICTURES):
            raise SpecError(
                f"{where} is a picture, not a job",
                fix="name the JSON file whose source.image names the picture",
            )
        yield Draft(data=_limited(data, where), folder=folder, where=where)


def _lines(file: BinaryIO, where: str, folder: Path) -> Iterator[Draft]:
    """One job a line; but a first line that is no whole JSON begins one job written over several lines."""
    for number in range(1, 1 << 62):
        line = _limited(file.readline(MAX_DRAFT_BYTES + 1), f"{where}, line {number}")
        if not line:
            return
        if not line.strip():
            continue
        if number == 1 and not _is_json(line):
            rest = file.read(MAX_DRAFT_BYTES + 1)
            yield Draft(data=_limited(line + rest, where), folder=folder, where=where)
            return
        yield Draft(data=line, folder=folder, where=f"{where}, line {number}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _limited(data: bytes, where: str) -> bytes:
    if len(data) > MAX_DRAFT_BYTES:
        raise SpecError(
            f"{where} is larger than {MAX_DRAFT_BYTES >> 20} MiB; a job is a few kilobytes of JSON",
            fix="name pictures by their path instead of writing them into the job",
        )
    return data


def as_object(draft: Draft) -> dict[str, Any]:
    """The draft's JSON as an object, for `--set` and `--seeds`. Raises SpecError where it is none."""
    if isinstance(draft.data, dict):
        return draft.data
    try:
        data = json.loads(draft.data)
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{draft.where} is not JSON: {error}", fix="check the file with `overpaint validate`"
        ) from error
    if not isinstance(data, dict):
        raise SpecError(f"{draft.where} holds no JSON object", fix="write a job as {...}")
    return data
