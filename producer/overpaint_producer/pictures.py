"""The pictures that a job names: found, looked at without decoding, uploaded once, renamed to `sha256:<hex>`.

A job file may come from somebody else and name any file of this machine, so only what opens as a picture is
ever uploaded.
"""

import hashlib
import threading
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

from overpaint_producer.headers import FORMATS, upright_size
from overpaint_shared.errors import InputError, SpecError
from overpaint_shared.files import read_picture_file
from overpaint_shared.headers import Header, look
from overpaint_shared.headers.together import check_together
from overpaint_shared.sizes import MISFIT_FIX, misfits
from overpaint_shared.store_keys import external_address

if TYPE_CHECKING:
    from overpaint_shared.job import JobSpec
    from overpaint_shared.setting_views import Limits
    from overpaint_shared.store import Store

STORED = "sha256:"
EXTERNAL = "s3://"
SENDERS = 8  # uploads at a time


@dataclass(frozen=True, kw_only=True)
class LocalPicture:
    """A picture file, read but not decoded. `size` is (width, height) in pixels, upright."""

    data: bytes
    size: tuple[int, int]
    header: Header


def read_picture(path: Path, limits: "Limits", field: str) -> LocalPicture:
    """Read a picture file after checking its kind and size in bytes, and its header. Raises InputError.

    `field` is the place in the spec that names the file, for messages.
    """
    data = read_picture_file(
        path,
        limits.max_input_bytes,
        field,
        smaller="use a smaller picture, or let an operator raise OVERPAINT_MAX_INPUT_BYTES",
        found="name a picture by a path from the job file's folder, sha256:<hex>, or s3://bucket/key",
    )
    header, size = sniff(data, limits, field, str(path))
    return LocalPicture(data=data, size=size, header=header)


def sniff(data: bytes, limits: "Limits", field: str, name: str) -> tuple[Header, tuple[int, int]]:
    """What the header says, and (width, height) upright. InputError for what is no picture, or too much."""
    from PIL import Image

    header = look(data, field, name, max_frames=limits.max_frames)
    if header is None:
        raise _no_picture(field, name)
    if header.width * header.height > limits.max_pixels:
        raise _too_many("pixels", f"{header.width} x {header.height}", limits.max_pixels, field, name)
    if header.frames > limits.max_frames:
        raise _too_many("frames", f"{header.frames} or more", limits.max_frames, field, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit on pixels; ours follows
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                return header, upright_size(picture)
    except Exception as error:  # Pillow raises what its format readers raise: no list is complete
        raise _no_picture(field, name) from error


def _no_picture(field: str, name: str) -> InputError:
    return InputError(
        f"{name} is not a picture, so it was not uploaded",
        field=field,
        value=name,
        fix=f"name a picture ({', '.join(FORMATS)})",
    )


def _too_many(what: str, given: str, allowed: int, field: str, name: str) -> InputError:
    return InputError(
        f"{name} has {given} {what}; at most {allowed} {'is' if allowed == 1 else 'are'} allowed",
        field=field,
        value=name,
        fix=f"use a smaller picture, or let an operator raise OVERPAINT_MAX_{what.upper()}",
    )


def check_sizes(spec: "JobSpec", sizes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse what a worker will refuse for the sizes of its pictures. Raises SpecError.

    `sizes`: of the pictures that have been looked at, by their reference in the spec.
    """
    problems = misfits(spec, sizes)
    if problems:
        raise SpecError(f"{where} cannot be rendered:", problems, fix=MISFIT_FIX)


def check_costs(spec: "JobSpec", seen: Mapping[str, "Seen"], limits: "Limits") -> None:
    """Refuse a job whose local pictures are too much together; its worker counts all. Raises InputError."""
    check_together(
        spec, {name: each.length for name, each in seen.items()}, limits.max_job_bytes, "max_job_bytes"
    )
    decoded = {name: each.header.decoded_bytes for name, each in seen.items() if each.header}
    check_together(spec, decoded, limits.max_decoded_bytes, "max_decoded_bytes")


class Uploader:
    """Puts pictures into the store under one owner; a file is read and sent once for all that name it.

    Looking at a picture is the caller's thread's work, sending it that of a few others: leave the context
    before the jobs are submitted, and everything is stored, or the first error is raised.
    """

    def __init__(self, store: "Store", limits: "Limits", owner: str) -> None:
        self._store = store
        self._limits = limits
        self._owner = owner
        self._known: dict[tuple[Path, int, int], Seen] = {}
        self._stored: dict[str, float] = {}
        self._doubted: set[str] = set()
        self._now = 0.0
        self._room = threading.BoundedSemaphore(2 * SENDERS)  # pictures in memory at a time
        self._sending: list[Future[None]] = []
        self._failed: Exception | None = None

    def __enter__(self) -> Self:
        self._failed = None
        self._pool = ThreadPoolExecutor(SENDERS, thread_name_prefix="upload")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sending, self._sending = self._sending, []
        if kind is None:
            wait(sending, return_when=FIRST_EXCEPTION)
        self._pool.shutdown(wait=True, cancel_futures=kind is not None or self._failed is not None)
        if kind is None and self._failed is not None:
            raise self._failed

    def begin(self, now: float) -> None:
        """What is looked for or sent from here on was seen after `now`, a time of Redis."""
        self._now = now

    def checked(self, references: Iterable[str]) -> float:
        """A time of Redis after which all these stored pictures were seen: see `Submission.checked`."""
        return min((self._stored[name] for name in references if name in self._stored), default=self._now)

    def doubt(self, sha256s: Iterable[str]) -> None:
        """Look again for pictures that may have been deleted, and send those that are files here."""
        for sha256 in sha256s:
            reference = STORED + sha256
            self._doubted.add(reference)
            self._stored.pop(reference, None)
            self._known = {key: seen for key, seen in self._known.items() if seen.reference != reference}
            self._store.forget(self._owner, sha256)

    def look(self, references: Mapping[str, str], folder: Path) -> dict[str, "Seen"]:
        """Where each reference will be; nothing is sent yet. `references`: reference -> field in the spec.

        Paths are taken from `folder`. Raises InputError, and StoreError where the store fails.
        """
        return {name: self._one(name, folder, field) for name, field in references.items()}

    def send(self, seen: Iterable["Seen"]) -> None:
        """Begin to store what is not there yet."""
        for each in seen:
            if each.data is None or each.reference in self._stored:
                continue
            # The store may answer from memory.
            remembered_s = 0.0 if each.reference in self._doubted else self._store.remembers_s
            self._stored[each.reference] = self._now - remembered_s
            self._room.acquire()
            if self._failed is not None:  # of hundreds of pictures each would wait for a server that is away
                raise self._failed
            self._sending.append(self._pool.submit(self._send, each.data))

    def _one(self, name: str, folder: Path, field: str) -> "Seen":
        if name.startswith(STORED):
            self._require(name.removeprefix(STORED), field)
            return Seen(name)
        if name.startswith(EXTERNAL):
            self._check_external(name, field)
            return Seen(name)
        return self._file(folder / name, field)

    def _file(self, path: Path, field: str) -> "Seen":
        key = _identity(path)
        if key is not None and key in self._known:
            return self._known[key]
        picture = read_picture(path, self._limits, field)
        reference = STORED + hashlib.sha256(picture.data).hexdigest()
        if key is not None:
            self._known[key] = Seen(reference, picture.size, picture.header, len(picture.data))
        return Seen(reference, picture.size, picture.header, len(picture.data), picture.data)

    def _send(self, data: bytes) -> None:
        try:
            if self._failed is None:
                self._store.put_input(self._owner, data)
        except Exception as error:
            self._failed = self._failed or error
            raise
        finally:
            self._room.release()

    def _require(self, sha256: str, field: str) -> None:
        if STORED + sha256 in self._stored:
            return
        if not self._store.has_input(self._owner, sha256):
            raise InputError(
                f"nothing is stored as {STORED}{sha256} for owner {self._owner!r}",
                field=field,
                value=STORED + sha256,
                fix="name the picture by its path, so that it is uploaded",
            )
        self._stored[STORED + sha256] = self._now

    def _check_external(self, url: str, field: str) -> None:
        try:
            external_address(url, self._store.settings.read_buckets)
        except InputError as error:
            raise InputError(error.message, field=field, value=url, fix=error.fix) from error


@dataclass(frozen=True)
class Seen:
    """Where a picture is stored, or will be once its data are sent; (width, height) where it is read here."""

    reference: str
    size: tuple[int, int] | None = None
    header: Header | None = None
    length: int = 0
    """Bytes of its file, where it is read here."""
    data: bytes | None = field(default=None, repr=False)
    """What is to be sent; None for what was told before, or is not this machine's to send."""


def _identity(path: Path) -> tuple[Path, int, int] | None:
    """What tells an unchanged file: its path, time of change and length; None where it is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return path, status.st_mtime_ns, status.st_size
