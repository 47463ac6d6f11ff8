"""Every error that Overpaint raises on purpose.

OverpaintError
├── JobError              exit 1   this job cannot be rendered as it stands
│   ├── InputError                 a picture is not what it should be
│   │   └── PictureTooCostly       reading it would cost far more than its pixels
│   ├── MaskError                  a mask is empty, too thin, or covers too much
│   ├── DeadlineError              it took longer than it may
│   ├── PrecisionError             its values left the range of the numbers that it is computed in
│   └── UnsupportedError           this worker or version cannot render it (another one may)
├── SpecError             exit 2   the job spec is wrong; one `Problem` for each fault
├── TokenConflict         exit 2   a submit token that already stands for another spec
├── LimitReached          exit 1   an owner has reached a limit of the farm; later it may go on
├── UnknownJob            exit 2   no record has this id
├── SettingsError         exit 2   a setting is wrong
├── DamagedRecord         exit 1   a job's record in Redis cannot be read
├── MissingExtraError     exit 2   the command needs an extra that is not installed
├── ServiceError          exit 3   Redis or the S3 store
│   ├── LedgerUnreachable
│   │   └── LedgerDenied
│   ├── LedgerFull
│   ├── LedgerDamaged              a key of the ledger holds something else
│   └── StoreError
│       ├── StoreUnreachable
│       │   └── StoreFailing       it answers, and says that it failed
│       ├── StoreDenied            wrong key, or no permission
│       ├── StoreNoBucket
│       ├── StoreFull
│       └── StoreMissing           no object has this key
└── EngineError           exit 1   the worker's side failed; never counted against the job's author
    ├── OutOfMemory
    ├── EngineDied
    ├── EngineHung
    ├── WorkerFault
    └── ModelLoadError
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final

EXIT_DONE: Final = 0
EXIT_JOB_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_SERVICE: Final = 3
EXIT_INTERRUPTED: Final = 130

_LONGEST_VALUE = 200
_LONGEST_TEXT = 2000
_BY_CODE: dict[str, type["OverpaintError"]] = {}


_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text, but what moves a terminal's cursor or turns writing round as its escape; lines stay lines."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shorten(value: object, longest: int = _LONGEST_VALUE) -> str:
    """`value` as JSON would write it (else its repr), cut in the middle to at most `longest` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()  # a lone surrogate could not be printed
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return _cut(visible(text), longest)


def _cut(text: str, longest: int) -> str:
    """The text, without its middle where it has more than `longest` characters."""
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


class OverpaintError(Exception):
    """An expected failure: what went wrong, with which field and value, and what mends it.

    `str()` gives one line for people; `to_json` carries the same across processes and hosts.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = EXIT_JOB_FAILED

    def __init__(
        self, message: str, *, field: str | None = None, value: object | None = None, fix: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value
        self.fix = fix

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        other = _BY_CODE.setdefault(cls.code, cls)
        if other.__qualname__ != cls.__qualname__:
            raise TypeError(f"{cls.__name__} and {other.__name__} share the code {cls.code!r}")

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        fix = f" ({self.fix})" if self.fix else ""
        return visible(f"{where}{self.message}{fix}")

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal error; long values are shortened."""
        value = self.value
        if value is not None and not isinstance(value, bool | int | float):
            value = shorten(value) if not isinstance(value, str) or len(value) > _LONGEST_VALUE else value
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "value": value,
            "fix": self.fix,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "OverpaintError":
        """The error that `to_json` wrote, of its own type; a code of a newer version gives the root type."""
        kind = _BY_CODE.get(str(data.get("code")), OverpaintError)
        error = kind.__new__(kind)
        OverpaintError.__init__(
            error,
            str(data.get("message", "unknown error")),
            field=data.get("field"),
            value=data.get("value"),
            fix=data.get("fix"),
        )
        error._restore(data)  # noqa: SLF001 - our own subclass
        return error

    def _restore(self, data: Mapping[str, Any]) -> None:
        """Take back what a subclass added to `to_json`."""


class JobError(OverpaintError):
    """The job cannot be rendered as it stands; trying again gives the same."""

    code = "job"


class InputError(JobError):
    """A picture is not what it should be: not an image, truncated, too large, of an unusable mode."""

    code = "input"


class PictureTooCostly(InputError):
    """Reading a picture would cost, or has cost, far more time or memory than its pixels do."""

    code = "picture_too_costly"


class MaskError(JobError):
    """A mask is empty, of the wrong size, too thin for the latent, or outside its coverage limits."""

    code = "mask"


class DeadlineError(JobError):
    """The job took longer than it may."""

    code = "deadline"


class PrecisionError(JobError):
    """The rendering left the range of the numbers that it is computed in; trying again gives the same."""

    code = "precision"


class UnsupportedError(JobError):
    """The worker, or its version, cannot render the job; it goes back uncounted, another worker may."""

    code = "unsupported"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault of a spec or of the settings."""

    path: str
    """Where, as written in the file: `mask.ops[1].by`; empty for the whole. A long one lacks its middle."""
    message: str
    """What is wrong, one line."""
    given: str | None = None
    """The value that was given, shortened, as JSON."""
    allowed: str | None = None
    """What may stand there."""
    suggestion: str | None = None
    """The nearest thing that would be right."""

    def __post_init__(self) -> None:
        """Cut what a stranger's keys and values of any length have made long."""
        object.__setattr__(self, "path", _cut(self.path, _LONGEST_VALUE))
        for name in ("message", "given", "allowed"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, _cut(text, _LONGEST_TEXT))

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        hint = f" Did you mean {self.suggestion}?" if self.suggestion else ""
        allowed = f" Allowed: {self.allowed}." if self.allowed else ""
        return visible(f"{where}{self.message}.{hint}{allowed}")

    @classmethod
    def from_json(cls, data: object) -> "Problem | None":
        """The problem that `asdict` made; None for anything else."""
        if not isinstance(data, dict):
            return None
        try:
            return cls(**{key: value for key, value in data.items() if key in cls.__dataclass_fields__})
        except TypeError:  # without a path or a message
            return None


class _Problems(OverpaintError):
    """An error made of several problems."""

    code = "problems"
    exit_code = EXIT_USAGE

    def __init__(
        self, message: str, problems: Iterable[Problem] = (), *, fix: str | None = None, **more: Any
    ) -> None:
        self.problems = list(problems)
        first = self.problems[0] if self.problems else None
        more.setdefault("field", first.path or None if first else None)
        more.setdefault("value", first.given if first else None)
        super().__init__(message, fix=fix, **more)

    def __str__(self) -> str:
        if not self.problems:
            return super().__str__()
        lines = [visible(self.message), *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines + ([f"  ({self.fix})"] if self.fix else []))

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"problems": [asdict(problem) for problem in self.problems]}

    def _restore(self, data: Mapping[str, Any]) -> None:
        found = data.get("problems")
        problems = [Problem.from_json(each) for each in (found if isinstance(found, list) else ())]
        self.problems = [each for each in problems if each is not None]


class SpecError(_Problems):
    """The job spec is wrong. `problems` lists every fault; `str()` is several lines for people."""

    code = "spec"


class SettingsError(_Problems):
    """A setting is wrong: an option, an environment variable or a line of the configuration file."""

    code = "settings"


class TokenConflict(OverpaintError):
    """The submit token already stands for a job with another spec."""

    code = "token_conflict"
    exit_code = EXIT_USAGE


class LimitReached(OverpaintError):
    """An owner has reached a limit of the farm; the same call may succeed later."""

    code = "limit_reached"


class UnknownJob(OverpaintError):
    """No record has this id: it never was, or it is older than records are kept."""

    code = "unknown_job"
    exit_code = EXIT_USAGE


class DamagedRecord(OverpaintError):
    """A job's record in Redis cannot be read; what was found is in `op:quarantine`."""

    code = "damaged_record"


class MissingExtraError(OverpaintError):
    """The command needs an extra that is not installed; `fix` is the install line."""

    code = "missing_extra"
    exit_code = EXIT_USAGE


class ServiceError(OverpaintError):
    """Redis or the S3 store cannot be used."""

    code = "service"
    exit_code = EXIT_SERVICE


class LedgerUnreachable(ServiceError):
    """Redis does not answer."""

    code = "ledger_unreachable"


class LedgerDenied(LedgerUnreachable):
    """Redis refuses the user or its password. Waiting does not help."""

    code = "ledger_denied"


class LedgerFull(ServiceError):
    """Redis has no memory left for more jobs."""

    code = "ledger_full"


class LedgerDamaged(ServiceError):
    """A key of the ledger holds something that does not belong there."""

    code = "ledger_damaged"


class StoreError(ServiceError):
    """The S3 store answered with an error."""

    code = "store"


class StoreUnreachable(StoreError):
    """The S3 store does not answer."""

    code = "store_unreachable"


class StoreFailing(StoreUnreachable):
    """The S3 store answers that it failed: its disk is full, or it is not ready, or it has too much to do."""

    code = "store_failing"


class StoreDenied(StoreError):
    """The S3 store refuses: a wrong key, or no permission."""

    code = "store_denied"


class StoreNoBucket(StoreError):
    """The bucket does not exist."""

    code = "store_no_bucket"


class StoreFull(StoreError):
    """The S3 store has no room left."""

    code = "store_full"


class StoreMissing(StoreError):
    """No object has this key."""

    code = "store_missing"

    def __init__(
        self, key: str, *, message: str | None = None, field: str | None = None, fix: str | None = None
    ) -> None:
        text = message or f"the store has no object {shorten(key)}"
        super().__init__(text, field=field, value=key, fix=fix)

    @property
    def key(self) -> str:
        """The key that was asked for."""
        return str(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.key,), self.__dict__)


class EngineError(OverpaintError):
    """The worker's side failed: never the fault of the job's author, and tried again."""

    code = "engine"


class OutOfMemory(EngineError):
    """The device has too little memory for this job."""

    code = "out_of_memory"


class EngineDied(EngineError):
    """The engine process ended while it had work."""

    code = "engine_died"


class EngineHung(EngineError):
    """The engine process stopped answering within a unit of work's deadline, and was killed."""

    code = "engine_hung"


class WorkerFault(EngineError):
    """A worker itself failed at a job, again and again: a defect, to be reported with the worker's log."""

    code = "worker_fault"


class ModelLoadError(EngineError):
    """A model's weights cannot be loaded."""

    code = "model_load"
