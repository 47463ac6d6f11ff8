"""Weight files: where they are, what their headers say, their digests. Reads no tensor, imports no torch.

Only the safetensors format is read. It is told by content and not by name: a pickle runs code when it is
opened, so a file that merely calls itself `.safetensors` must not reach a loader that guesses.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.registry import Entry

log = structlog.get_logger(__name__)

MAX_HEADER_BYTES: Final = 100 * 2**20
"""The format's own limit."""

_PICKLES: Final = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
_LENGTH_BYTES: Final = 8
_VARIANTS: Final = (None, "fp16")
"""Names of weight files in a folder, by preference."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself before its tensors."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The weight files of one network: one file, or an index and its shards."""

    folder: Path
    variant: str | None
    files: tuple[Path, ...]


def locate(entry: Entry) -> Path:
    """The file or folder that the entry names. A hub id is looked up in the local cache only, never fetched.

    Raises `ModelLoadError`: there is nothing, or not the pinned revision.
    """
    if entry.revision is not None:
        return _cached_snapshot(entry)
    path = entry.local_path
    if not path.exists():
        raise _error(
            entry, "there is no such file or folder", "correct the path, or pin a hub id by `revision`"
        )
    return path


def _cached_snapshot(entry: Entry) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(entry.path, revision=entry.revision, local_files_only=True))
    except LocalEntryNotFoundError as cause:
        fetch = f'hf download {entry.path} --revision {entry.revision} --include "*.json" "*.safetensors"'
        raise _error(
            entry,
            f"revision {entry.revision} of {entry.path} is not on this machine",
            f"fetch it once: {fetch}",
        ) from cause


def read_header(path: Path, entry: Entry, key: str = "path") -> Header:
    """The header of a safetensors file, which `key` of the entry names or holds.

    Raises `ModelLoadError`: the file is something else (a pickle, truncated, a Git LFS pointer).
    """
    try:
        raw, size = _raw_header(path)
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        tensors = {name: TensorInfo(info["dtype"], tuple(info["shape"])) for name, info in table.items()}
        end = max((info["data_offsets"][1] for info in table.values()), default=0)
    except OSError as cause:
        message = f"{path.name} cannot be read: {cause.strerror}"
        raise _error(entry, message, "check the file", key) from cause
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as cause:
        fix = "convert it to .safetensors, or fetch it again"
        raise _error(entry, _not_safetensors(path), fix, key) from cause
    if end != size:
        message = f"{path.name} is truncated: {size} bytes of tensors, not {end}"
        raise _error(entry, message, "fetch it again", key)
    return Header(tensors, metadata)


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and the number of bytes after it."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, total - _LENGTH_BYTES):
            raise ValueError("no header")
        return file.read(length), total - _LENGTH_BYTES - length


def _not_safetensors(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04") or path.suffix in _PICKLES:
        return f"{path.name} is a pickle, which can run code when it is opened; pickles are refused"
    return f"{path.name} is no safetensors file"


def part_files(folder: Path, stem: str, entry: Entry, key: str = "path") -> PartFiles:
    """The weights in a folder whose names begin with `stem`; half precision where there are no others.

    Raises `ModelLoadError`: there are none in the safetensors format.
    """
    for variant in _VARIANTS:
        infix = f".{variant}" if variant else ""
        whole = folder / f"{stem}{infix}.safetensors"
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if whole.is_file():
            return PartFiles(folder, variant, (whole,))
        if index.is_file():
            return PartFiles(folder, variant, tuple(_shards(index, entry, key)))
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    found = f"only {', '.join(pickled)}, and pickles are refused" if pickled else "none"
    message = f"{folder.name} has no {stem}.safetensors: {found}"
    raise _error(entry, message, "use a folder with .safetensors weights", key)


def _shards(index: Path, entry: Entry, key: str) -> Iterable[Path]:
    names = sorted(set(read_json(index, entry, key).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        message = f"{index.name} does not list files of its own folder"
        raise _error(entry, message, "fetch the model again", key)
    return (index.parent / name for name in names)


def read_json(path: Path, entry: Entry, key: str = "path") -> dict[str, Any]:
    """A configuration file, which `key` of the entry names or holds.

    Raises `ModelLoadError`: it is missing or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        where = f"{path.parent.name}/{path.name}"
        message = f"{where} cannot be read: {cause}"
        raise _error(entry, message, "complete the model's folder", key) from cause
    if not isinstance(found, dict):
        raise _error(entry, f"{path.name} is no JSON object", "complete the model's folder", key)
    if "quantization_config" in found:
        where = f"{path.parent.name}/{path.name}"
        message = f"{where} has a quantization_config, and quantized weights are not read"
        raise _error(entry, message, "name the model's own weights, in float32, float16 or bfloat16", key)
    return found


class HashCache:
    """SHA-256 of files, remembered by path, size and time of change, in a JSON file or (None) in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = _read_known(path)

    def sha256(self, path: Path) -> str:
        """The digest of one file, hex. A file of many gigabytes takes seconds the first time."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != stamp:
            with path.open("rb") as file:
                known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[str(path)] = known
            self._write()
        return str(known[2])

    def digest(self, files: Mapping[str, Path]) -> str:
        """One digest for files by name: that of the lines `sha256sum` prints for them, sorted by name."""
        lines = (f"{self.sha256(path)}  {name}\n" for name, path in sorted(files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _write(self) -> None:
        """Add to what others wrote; of two at once, the loser's digests are computed again some day."""
        if self._path is None:
            return
        known = _read_known(self._path) | self._known
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, json.dumps(known))
        except OSError as error:  # a full or read-only disk costs time at the next start, and no job
            log.warning("digests are not remembered", action="hashes_not_written", error=str(error))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def checked_digest(hashes: HashCache, entry: Entry, files: Mapping[str, Path], *, single: bool) -> str:
    """A single file's own digest, or a folder's: that of the lines that `sha256sum` prints for its weights.

    Raises `ModelLoadError`: the registry pins another.
    """
    digest = hashes.sha256(*files.values()) if single else hashes.digest(files)
    if entry.sha256 not in (None, digest):
        raise ModelLoadError(
            f"{entry.name}: the registry pins other weights; the sha256 of these is {digest}",
            field=entry.field("sha256"), value=entry.sha256, fix="fetch the right weights, or correct sha256",
        )  # fmt: skip
    return digest


def _read_known(path: Path | None) -> dict[str, list[Any]]:
    """What an earlier run wrote; a damaged file is as good as none."""
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in entries if isinstance(value, list) and len(value) == 3}


def _error(entry: Entry, message: str, fix: str, key: str = "path") -> ModelLoadError:
    value = getattr(entry, key)
    return ModelLoadError(f"{entry.name}: {message}", field=entry.field(key), value=value, fix=fix)
