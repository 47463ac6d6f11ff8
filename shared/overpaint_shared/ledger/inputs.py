"""Which stored inputs the ledger's records name, and the deletion of those that no record names.

An accepted job keeps its inputs, whatever collectors and producers do at the same time:

- A producer takes the time of Redis (`checked`), then looks whether each picture is stored, or stores it.
  `submit.lua` makes the record only if none of them has been condemned with a deletion that ends at or after
  `checked`. Otherwise the producer looks again.
- A collector takes the time (`since`), reads the specs of all records made before it, and signs the deletion
  of an input. The S3 server refuses a signed deletion SIGNED_S later. Then `condemn.lua` condemns the input,
  unless a record made after `since` names it. Then the collector sends the deletion, and reports its end.

Redis runs one script at a time, so of each submit and each condemnation one comes first.
If it is the submit: its record was made before `since` and was read, or `condemn.lua` reads it. Either way
nothing is deleted.
If it is the condemnation: `submit` refuses whoever looked before the end of the deletion. A deletion ends
when S3 has answered it, or after CONDEMNED_S: by then S3 no longer accepts its signature. Whoever looked
later has seen what this deletion left.

A second collector that condemns the same input meanwhile is refused, so each deletion has its own end.
All times are those of Redis, except that of the signature, which S3 judges by its own clock. That clock may
run CONDEMNED_S - SIGNED_S behind the collector's.
"""

import re
import time
from collections.abc import Iterator
from typing import Any, Final, Literal

from overpaint_shared.ledger import listing
from overpaint_shared.ledger.faults import typed_errors
from overpaint_shared.ledger.scripts import CONDEMNED_S, Scripts
from overpaint_shared.ledger.tolerance import answers

SIGNED_S: Final = CONDEMNED_S // 6
"""How long a signed deletion is accepted."""
_REFERENCE: Final = re.compile(r"sha256:([0-9a-f]{64})")
_PAGE: Final = 500  # records read at a time
_UNREAD: Final = 50  # records that `condemn.lua` reads itself
_ROUNDS: Final = 5  # of reading and asking `condemn.lua`
_OVERLAP_S: Final = 1.0  # the clock of Redis may be set back a little
_PAUSE_S: Final = 0.3  # all rounds together outlast _OVERLAP_S, so that a burst of submits is behind them

Client = Any  # as in listing.py
Verdict = Literal["condemned", "taken", "named", "unread"]


def named_in(spec_json: str) -> frozenset[str]:
    """The SHA-256 of each stored input that a spec names. By pattern, so that newer specs count too."""
    return frozenset(_REFERENCE.findall(spec_json))


class InputCollector:
    """Condemns inputs for one collector of garbage; it remembers which inputs the records name."""

    def __init__(self, client: Client, scripts: Scripts, where: str) -> None:
        self._client = client
        self._scripts = scripts
        self._where = where
        self._named: dict[str, set[str]] = {}
        self._since: dict[str, float] = {}  # per owner: all records made before this were read

    def names(self, owner: str, sha256: str) -> bool:
        """Whether a record of `owner` names the input, as far as they have been read."""
        if owner not in self._since:
            with typed_errors(self._where):
                self._read(owner)
        return sha256 in self._named[owner]

    def condemn(self, owner: str, sha256: str) -> tuple[Verdict, float]:
        """Condemn an input; (verdict, end of its deletion). Only `condemned` allows to delete it.

        `taken`: another collector deletes it. `named`: a record names it. `unread`: the owner submits so fast
        that a record may name it which was not read; a later collector may read more.
        """
        for _ in range(_ROUNDS):
            if self.names(owner, sha256):
                return "named", 0.0
            since = self._since[owner] - _OVERLAP_S
            with typed_errors(self._where):
                verdict, ends = self._scripts.run("condemn", owner, sha256, since, _UNREAD)
                if verdict != "unread":
                    return verdict, float(ends or 0)
                time.sleep(_PAUSE_S)
                self._read(owner)
        return "unread", 0.0

    def deleted(self, owner: str, sha256: str, ends: float) -> None:
        """Tell that the deletion which was to end at `ends` has ended."""
        with typed_errors(self._where):
            self._scripts.run("deleted", owner, sha256, f"{ends:.6f}")

    def _read(self, owner: str) -> None:
        """Read the records that were made since the last call."""
        since, now = self._since.get(owner), listing.clock(self._client)
        named = self._named.setdefault(owner, set())
        start = "-inf" if since is None else since - _OVERLAP_S
        for ids in _made_since(self._client, owner, start):
            for spec in _specs(self._client, ids):
                named |= named_in(spec)
        self._since[owner] = now  # only after all were read: what is not known to be named may be deleted


def _made_since(client: Client, owner: str, start: float | str) -> Iterator[list[str]]:
    """The ids of an owner's records, oldest first. By time, not by rank: expired ones leave while we read."""
    seen: set[str] = set()
    size = _PAGE
    while True:
        rows = client.zrangebyscore(f"op:owner:{owner}", start, "+inf", start=0, num=size, withscores=True)
        yield [job_id for job_id, _ in rows if job_id not in seen]
        if len(rows) < size:
            return
        seen = {job_id for job_id, _ in rows}
        if rows[-1][1] == start:  # a page is not enough for the jobs of one moment
            size *= 2
        start = rows[-1][1]


def _specs(client: Client, ids: list[str]) -> list[str]:
    with client.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.get(f"op:spec:{job_id}")
        return [spec for spec in answers(pipe) if isinstance(spec, str)]
