"""How values of `records.py` travel to and from the Lua scripts."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar

from overpaint_shared.errors import UnknownJob
from overpaint_shared.ledger.inputs import named_in
from overpaint_shared.ledger.records import (
    Claim,
    InputsGone,
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


@dataclass(slots=True)
class Answers:
    """What the ledger said to submissions."""

    done: list[Submitted] = field(default_factory=list)
    conflicts: list[Submission] = field(default_factory=list)
    gone: dict[str, frozenset[str]] = field(default_factory=dict)
    refused: dict[str, Sequence[str]] = field(default_factory=dict)
    owner: str = ""
    """Whose limit was reached."""

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
                found.refused[item.id], found.owner = more, item.owner
            else:
                found.done.append(Submitted(job_id, said == "created", wakeups(more)))
        return found

    def add(self, later: "Answers") -> None:
        """Take those of a later chunk."""
        self.done += later.done
        self.conflicts += later.conflicts
        self.gone |= later.gone
        self.refused |= later.refused
        self.owner = later.owner or self.owner

    @property
    def result(self) -> str:
        """`ok`, or the code of the error that `submitted` raises."""
        if self.conflicts:
            return SubmitConflict.code
        return InputsGone.code if self.gone else QuotaExceeded.code if self.refused else "ok"

    def submitted(self) -> list[Submitted]:
        """The answers, if none was refused; else the error that tells which."""
        if self.conflicts:
            raise conflict(self.conflicts, self.done)
        if self.gone:
            raise gone(self.gone, self.done, self.refused)
        if self.refused:
            raise exceeded(self.refused, self.owner, self.done)
        return self.done


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
        return Claim(reply[0])
    verdict, token, attempt, spec, owner, crashes, due, waited, suspect = reply
    waited_s = float(waited) if waited else None
    return Claim(
        verdict, int(token), int(attempt), spec, owner, int(crashes), wakeups(due), waited_s, bool(suspect)
    )


def conflict(items: Sequence[Submission], done: Sequence[Submitted]) -> SubmitConflict:
    """The error for `items`, whose tokens stand for other specs."""
    tokens = ", ".join(str(item.token or item.id) for item in items[:5]) + (", ..." if len(items) > 5 else "")
    error = SubmitConflict(
        f"already used for a job with another spec: {tokens}",
        field="token",
        value=items[0].token or items[0].id,
        fix="choose a new token, or submit the spec that the token was first used with",
    )
    error.submitted = tuple(done)
    return error


def gone(
    items: Mapping[str, frozenset[str]], done: Sequence[Submitted], refused: Collection[str] = ()
) -> InputsGone:
    """The error for jobs whose inputs may have been deleted. `items`: job id -> SHA-256 of those inputs.

    `refused` are jobs for which a limit left no room; they have to be submitted again just as well.
    """
    first = min(min(each) for each in items.values())
    error = InputsGone(
        f"the stored picture sha256:{first} is being deleted, or was deleted since it was looked for",
        field="source.image",
        value=f"sha256:{first}",
        fix="look for the picture again, store it if it is not there, and submit again",
    )
    error.submitted = tuple(done)
    error.gone = dict.fromkeys(refused, frozenset[str]()) | dict(items)
    return error


def exceeded(refused: Mapping[str, Sequence[str]], owner: str, done: Sequence[Submitted]) -> QuotaExceeded:
    """The error for jobs that were not taken: job id -> what `submit.lua` says of the limit."""
    limit, allowed, used, wait_s = list(refused.values())[-1]
    error = QuotaExceeded(
        _BROKEN[limit].format(owner=owner, allowed=int(float(allowed)), used=int(float(used))),
        field=limit,
        value=int(float(used)),
        fix=_LATER[limit],
    )
    error.submitted, error.refused, error.wait_s = tuple(done), frozenset(refused), float(wait_s)
    return error


_BROKEN: Final = {
    "max_queued": "owner {owner} has {used} jobs waiting, and may have {allowed}",
    "max_spec_bytes": "the waiting jobs of owner {owner} take {used} bytes of {allowed}: no room for this",
    "submits_per_s": "owner {owner} may submit {allowed} jobs a second",
}
_WAIT: Final = "try again when some of them have started, or ask the operator to raise it: overpaint quota"
_LATER: Final = {"max_queued": _WAIT, "max_spec_bytes": _WAIT, "submits_per_s": "try again in a moment"}
