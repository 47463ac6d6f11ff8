"""How values of `records.py` travel to and from the Lua scripts."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar

from overpaint_shared.errors import UnknownJob
from overpaint_shared.ledger.inputs import named_in
from overpaint_shared.ledger.records import (
    Claim,
    InputsGone,
    PartlySubmitted,
    QuotaExceeded,
    Submission,
    SubmitConflict,
    Submitted,
    Wakeup,
    spec_digest,
)
from overpaint_shared.ledger.scripts import PRIORITY_CLASSES
from overpaint_shared.ledger.tolerance import json_object

T = TypeVar("T")
_WAKEUP_FIELDS = 6


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of at most `size`."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def priority_class(priority: int) -> int:
    """0, 3, 6 or 9: the class of priority 0 (first) .. 9."""
    return max(step for step in PRIORITY_CLASSES if step <= priority)


@dataclass(frozen=True, slots=True)
class Lane:
    """Where jobs of one priority class, model and owner stand in line."""

    priority_class: int
    model: str
    owner: str

    def __str__(self) -> str:
        return f"{self.priority_class}:{self.model}:{self.owner}"


def lane(text: str) -> Lane | None:
    """The lane that an entry of `op:lanes` names; None for anything else."""
    step, _, rest = text.partition(":")
    model, _, owner = rest.partition(":")
    if step not in map(str, PRIORITY_CLASSES) or not model or not owner:
        return None
    return Lane(int(step), model, owner)


def offer(names: Collection[str] | None) -> str:
    """What a worker offers, as Lua searches it: `,a,b,`; empty for anything."""
    return "" if names is None else f",{','.join(sorted(names))},"


def submission(item: Submission, window: int) -> list[object]:
    """The arguments of `submit.lua`."""
    return [
        item.id,
        item.owner,
        window,
        item.token,
        item.digest or spec_digest(item.spec_json),
        item.spec_json,
        item.model,
        item.priority,
        item.title,
        ",".join(sorted(item.features)),
        item.group,
        dict(item.labels) if item.labels else None,
        ",".join(sorted(named_in(item.spec_json))),
        item.checked,
        item.deadline_s,
    ]


def common(values: Iterable[str | None]) -> str:
    """The value that all have; else nothing."""
    found = set(values)
    return (found.pop() or "") if len(found) == 1 else ""


def result(state: str, changed: object) -> str:
    """How a call to replay or discard a job ended, as `note.lua` has it."""
    return "ok" if int(str(changed)) else "refused" if state else UnknownJob.code


def picture_name(spec_json: str | None) -> str:
    """The name (`output.key`) that a job gives to its picture."""
    output = (json_object(spec_json) or {}).get("output")
    key = output.get("key") if isinstance(output, dict) else None
    return key if isinstance(key, str) else ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that one more job would break."""

    owner: str
    size: int
    """Bytes of the job's spec."""
    limit: str
    allowed: int
    used: int
    wait_s: float

    @classmethod
    def of(cls, item: Submission, said: Sequence[Any]) -> "Refusal":
        """What `submit.lua` says."""
        limit, allowed, used, wait_s = said
        size = len(item.spec_json.encode())
        return cls(item.owner, size, limit, int(float(allowed)), int(float(used)), float(wait_s))

    @property
    def for_ever(self) -> bool:
        """Whether the job alone breaks the limit, so that waiting does not help."""
        return self.limit == "max_spec_bytes" and self.size > self.allowed


@dataclass(slots=True)
class Answers:
    """What the ledger said to submissions."""

    done: list[Submitted] = field(default_factory=list)
    conflicts: list[Submission] = field(default_factory=list)
    gone: dict[str, frozenset[str]] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Sequence[Submission], replies: Sequence[Sequence[Any]]) -> "Answers":
        """The replies of `submit.lua`."""
        found = cls()
        for item, (said, job_id, more) in zip(items, replies, strict=True):
            if said == "conflict":
                found.conflicts.append(item)
            elif said == "gone":
                found.gone[item.id] = frozenset(more)
            elif said == "refused":
                found.refused[item.id] = Refusal.of(item, more)
            else:
                found.done.append(Submitted(job_id, said == "created", wakeups(more)))
        return found

    def add(self, later: "Answers") -> None:
        """Take those of a later chunk."""
        self.done += later.done
        self.conflicts += later.conflicts
        self.gone |= later.gone
        self.refused |= later.refused

    @property
    def result(self) -> str:
        """`ok`, or the code of the error that `submitted` raises."""
        if self.conflicts:
            return SubmitConflict.code
        return InputsGone.code if self.gone else QuotaExceeded.code if self.refused else "ok"

    def submitted(self) -> list[Submitted]:
        """The answers, if none was refused; else the error that tells which."""
        if (error := self._error()) is None:
            return self.done
        error.submitted = tuple(self.done)
        error.refused = frozenset({item.id for item in self.conflicts} | {*self.gone} | {*self.refused})
        raise error

    def _error(self) -> PartlySubmitted | None:
        if self.conflicts:
            return conflict(self.conflicts)
        if self.gone:
            return gone(self.gone)
        return exceeded([*self.refused.values()][-1]) if self.refused else None


def wakeups(flat: Sequence[Any]) -> tuple[Wakeup, ...]:
    """Wake-ups as Lua returns them: one flat list."""
    rows = (flat[at : at + _WAKEUP_FIELDS] for at in range(0, len(flat), _WAKEUP_FIELDS))
    return tuple(
        Wakeup(job, model, int(priority), title, float(stamp), bool(int(front)))
        for job, model, priority, title, stamp, front in rows
    )


def claim(reply: Sequence[Any]) -> Claim:
    """The answer of `claim.lua`."""
    if reply[0] != "ok":
        return Claim(reply[0], wakeups=wakeups(reply[1] if len(reply) > 1 else ()))
    verdict, token, attempt, spec, owner, crashes, due, waited, suspect = reply
    waited_s = float(waited) if waited else None
    return Claim(
        verdict, int(token), int(attempt), spec, owner, int(crashes), wakeups(due), waited_s, bool(suspect)
    )


def conflict(items: Sequence[Submission]) -> SubmitConflict:
    """The error for `items`, whose tokens stand for other specs."""
    tokens = ", ".join(str(item.token or item.id) for item in items[:5]) + (", ..." if len(items) > 5 else "")
    return SubmitConflict(
        f"already used for a job with another spec: {tokens}",
        field="token",
        value=items[0].token or items[0].id,
        fix="choose a new token, or submit the spec that the token was first used with",
    )


def gone(items: Mapping[str, frozenset[str]]) -> InputsGone:
    """The error for jobs whose inputs may have been deleted. `items`: job id -> SHA-256 of those inputs."""
    first = min(min(each) for each in items.values())
    error = InputsGone(
        f"the stored picture sha256:{first} is being deleted, or was deleted since it was looked for",
        field="source.image",
        value=f"sha256:{first}",
        fix="look for the picture again, store it if it is not there, and submit again",
    )
    error.gone = items
    return error


def exceeded(refusal: Refusal) -> QuotaExceeded:
    """The error for jobs that were not taken because of a limit."""
    if refusal.for_ever:
        message, value, fix = _TOO_LARGE, refusal.size, _SMALLER
    else:
        message, value, fix = _BROKEN[refusal.limit], refusal.used, _LATER[refusal.limit]
    error = QuotaExceeded(message.format_map(asdict(refusal)), field=refusal.limit, value=value, fix=fix)
    error.wait_s = refusal.wait_s
    return error


_BROKEN: Final = {
    "max_queued": "owner {owner} has {used} jobs waiting, and may have {allowed}",
    "max_spec_bytes": "the waiting jobs of owner {owner} take {used} bytes of {allowed}: no room for this",
    "submits_per_s": "owner {owner} may submit {allowed} jobs a second",
}
_WAIT: Final = "try again when some of them have started, or ask the operator to raise it: overpaint quota"
_LATER: Final = {"max_queued": _WAIT, "max_spec_bytes": _WAIT, "submits_per_s": "try again in a moment"}
_TOO_LARGE: Final = (
    "this job alone has {size} bytes, more than the {allowed} that the waiting jobs of owner {owner} may have"
)
_SMALLER: Final = "make it smaller, or ask the operator to raise the limit: overpaint quota"
