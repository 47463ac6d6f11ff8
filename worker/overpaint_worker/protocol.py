"""What a worker and its engine process say to each other, and how it is framed. No torch here.

One message is one frame of a `multiprocessing.connection.Connection` (`send_bytes`, `recv_bytes`):

    4 bytes, big-endian: length of the header | header: JSON, UTF-8 | the attachments' raw bytes, one after
    another

The header holds the message's kind and fields, and for attachments their names and sizes. Pictures cross as
the encoded files they are. Nothing here is ever unpickled: a frame that does not fit raises `ProtocolError`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, get_args, get_origin, get_type_hints

from overpaint_shared.errors import EngineError

MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
MAX_FRAME_BYTES: Final = 1024 * 1024 * 1024

STAGES: Final = ("fetch", "prepare", "mask", "load", "condition", "encode", "denoise", "decode", "store")
"""A job's way, in order. `fetch` and the upload in `store` are the worker's, all else is the engine's."""

CPU_STAGES: Final = ("prepare", "store")
"""Stages that run on the engine's CPU threads, beside the device's unit of work: picture files in and out."""

CPU_STAGE_BUDGET_S: Final = 300.0
"""How long one job may stay in one of `CPU_STAGES`, in seconds."""

Attachments = Mapping[str, bytes]
_LENGTH = struct.Struct(">I")


class ProtocolError(EngineError):
    """A frame that is no message of this protocol: a bug or a foreign process at the other end."""

    code: ClassVar[str] = "protocol"


def _attached() -> Any:
    return field(default_factory=dict, metadata={"attached": True}, repr=False)


# ------------------------------------------------------------------------------------- worker -> engine


@dataclass(frozen=True, kw_only=True)
class Render:
    """Render a job. `inputs` maps each picture reference of the spec to the encoded file's bytes."""

    job: str
    token: int
    spec_json: str
    inputs: Attachments = _attached()  # noqa: RUF009 - makes a dataclass field
    alone: bool = False
    """Drain first, then run nothing beside it: its last attempt took the engine down."""


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Stop rendering this attempt. Answered by `Cancelled`, or by `Done`/`Failed` if they were first."""

    job: str
    token: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load a model before a job asks for it. Answered by `Loading` and `Loaded`, or `NotLoaded`."""

    model: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Leave at once; what runs is given up (the worker has released it)."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A spare engine becomes the engine: it opens its device and takes work. Answered by `Ready`."""


# ------------------------------------------------------------------------------------- engine -> worker


@dataclass(frozen=True, kw_only=True)
class Warm:
    """A spare engine's first message: it has done all that needs no device, and waits for `Begin`."""

    pid: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine's first message: its device is up. No model is loaded yet."""

    pid: int
    device: str
    """As given: `cpu`, `cuda:0`."""
    device_name: str
    memory_total: int
    """Bytes of the device's memory (of the machine for `cpu`)."""
    features: list[str]
    """What the engine renders, in the words of `JobSpec.features()`."""
    catalogue: list[dict[str, Any]]
    """`ModelTraits` as JSON, one for each registry entry that could be read."""
    versions: dict[str, str]
    """overpaint, python, torch, diffusers, transformers."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Weights are being read to the device."""

    model: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model stays on the device."""

    model: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """The answer to `Load` where the model cannot be loaded. `error` is `OverpaintError.to_json()`."""

    model: str
    error: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The device thread begins a unit of work. If nothing else follows within `budget_s` it hangs.

    `stage` is one of `STAGES`, or `idle`, which has no deadline (`budget_s` 0). `jobs` are those in this
    unit: with those whose last `Progress.stage` is in `CPU_STAGES`, they are whom a crash is counted against.
    """

    stage: str
    budget_s: float
    jobs: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A job has entered a stage, or done `step` of its `of` steps; `company` jobs shared the last pass.

    A stage on a CPU thread tells its beginning (0 of 1) and its end (1 of 1).
    """

    job: str
    token: int
    stage: str
    step: int
    of: int
    company: int = 1


@dataclass(frozen=True, kw_only=True)
class Done:
    """A rendered job: its files by name (`image.png`, `receipt.json`, ...) and a short summary."""

    job: str
    token: int
    files: Attachments = _attached()  # noqa: RUF009 - makes a dataclass field
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A job that did not render. `error` is `OverpaintError.to_json()`.

    `kind`: `job` (the job's own fault, it fails), `device` (this engine's fault, release it, a crash
    counted), `unable` (this engine cannot render it, release it uncounted).
    """

    job: str
    token: int
    error: dict[str, Any]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """The attempt has left the loop: nothing of it runs any more."""

    job: str
    token: int


@dataclass(frozen=True, kw_only=True)
class Credits:
    """How many jobs the engine wants to hold at once: its row limit in jobs, and two to keep it fed."""

    slots: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A heartbeat: what the engine does just now."""

    live: int
    """Jobs in the step loop."""
    held: int
    """Jobs anywhere in the engine, `live` included."""
    turns: int
    """Forward passes since the start."""
    rows: int
    """Rows evaluated since the start, padding not counted."""
    memory_used: int
    """Bytes of device memory in use (resident set for `cpu`)."""
    models: list[str] = field(default_factory=list)
    """Loaded models."""
    row_limit: int = 0
    """Rows that one pass may have, at the most favourable shape."""


ToEngine = Render | Cancel | Load | Stop | Begin
ToWorker = (
    Warm
    | Ready
    | Loading
    | Loaded
    | NotLoaded
    | Unit
    | Progress
    | Done
    | Failed
    | Cancelled
    | Credits
    | Stats
)
Message = ToEngine | ToWorker

_BY_NAME: Final[dict[str, type[Message]]] = {
    c.__name__.lower(): c for c in (*get_args(ToEngine), *get_args(ToWorker))
}


# --------------------------------------------------------------------------------------------- framing


def encode(message: Message) -> bytes:
    """One frame. Raises `ProtocolError` if it would be larger than the other end accepts."""
    header: dict[str, Any] = {"message": type(message).__name__.lower()}
    blobs: list[bytes] = []
    for f in fields(message):
        value = getattr(message, f.name)
        if f.metadata.get("attached"):
            header[f.name] = {name: len(data) for name, data in value.items()}
            blobs.extend(value.values())
        else:
            header[f.name] = value
    head = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    size = _LENGTH.size + len(head) + sum(map(len, blobs))
    if len(head) > MAX_HEADER_BYTES or size > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a {header['message']} message of {size} bytes is too large (at most {MAX_FRAME_BYTES})"
        )
    return b"".join((_LENGTH.pack(len(head)), head, *blobs))


def decode(frame: bytes) -> Message:
    """The message in a frame. Raises `ProtocolError` for anything that `encode` does not make."""
    header, body = _split(frame)
    name = header.pop("message", None)
    cls = _BY_NAME.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ProtocolError(f"there is no message {name!r}")
    for f in fields(cls):
        if f.metadata.get("attached"):
            header[f.name], body = _cut(header.get(f.name), body)
    if len(body):
        raise ProtocolError(f"{len(body)} bytes are left over after a {name} message")
    _check(cls, header)
    return cls(**header)


def _split(frame: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(frame) < _LENGTH.size or len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is no message")
    (length,) = _LENGTH.unpack_from(frame)
    end = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or end > len(frame):
        raise ProtocolError(f"a header of {length} bytes does not fit a frame of {len(frame)} bytes")
    try:
        header = json.loads(frame[_LENGTH.size : end])
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"the header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise ProtocolError(f"the header is {type(header).__name__}, not an object")
    return header, memoryview(frame)[end:]


def _cut(sizes: object, body: memoryview) -> tuple[dict[str, bytes], memoryview]:
    """Take the attachments named in `sizes` off the front of `body`."""
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise ProtocolError("attachments must be an object of names and sizes")
    if sum(sizes.values()) > len(body):
        raise ProtocolError(f"attachments of {sum(sizes.values())} bytes were announced, {len(body)} came")
    out: dict[str, bytes] = {}
    for name, size in sizes.items():
        out[name], body = bytes(body[:size]), body[size:]
    return out, body


def _field_types(cls: type[Message]) -> dict[str, tuple[type, ...]]:
    hints = get_type_hints(cls)
    out: dict[str, tuple[type, ...]] = {}
    for f in fields(cls):
        kind = dict if f.metadata.get("attached") else get_origin(hints[f.name]) or hints[f.name]
        out[f.name] = (float, int) if kind is float else (kind,)
    return out


_FIELD_TYPES: Final = {cls: _field_types(cls) for cls in _BY_NAME.values()}


def _check(cls: type[Message], given: dict[str, Any]) -> None:
    types = _FIELD_TYPES[cls]
    if wrong := given.keys() ^ types.keys():
        raise ProtocolError(
            f"fields that a {cls.__name__} lacks or does not have: {', '.join(sorted(wrong))}"
        )
    for name, value in given.items():
        if type(value) not in types[name]:  # exact: JSON's true is no integer
            raise ProtocolError(
                f"{cls.__name__}.{name} is {type(value).__name__}, not {types[name][0].__name__}"
            )
