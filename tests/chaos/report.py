"""What a campaign came to, as a table."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from tests.chaos.campaign import Result
from tests.chaos.recovery import Waits

HOST_S: Final = 25.0
ENGINE_S: Final = 5.0
"""What is promised of the 95th percentile, with the default lease."""
ENOUGH: Final = 20
"""Of fewer waits nobody can tell a 95th percentile."""


def table(results: Sequence[Result]) -> str:
    """One column for each seed, then the faults by kind."""
    rows: list[tuple[str, list[Any]]] = [("seed", [result.plan.seed for result in results])]
    rows += [(name, [find(result) for result in results]) for name, find in _ROWS.items()]
    kinds = sorted({kind for result in results for kind in (result.happened | result.missed)})
    rows += [(kind, [_kind(result, kind) for result in results]) for kind in kinds]
    width = max(len(name) for name, _ in rows)
    widths = [max(len(str(cells[column])) for _, cells in rows) for column in range(len(results))]
    lines = [
        " | ".join(
            [name.ljust(width), *(str(cell).rjust(size) for cell, size in zip(cells, widths, strict=True))]
        )
        for name, cells in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def late(result: Result) -> list[str]:
    """Promises on recovery that were not kept."""
    promised = (
        ("a host", result.hosts, result.plan.shape.lease_s + HOST_S - 20),
        ("an engine", result.engines, ENGINE_S),
    )
    return [
        f"after {what} ended, 95 % of its jobs ran again in {waits.share(95):.1f} s; promised: {limit:g} s"
        for what, waits, limit in promised
        if len(waits.clear) >= ENOUGH and (waits.share(95) or 0.0) > limit
    ]


def _waits(waits: Waits) -> str:
    if not waits.clear:
        return "none"
    shown = "/".join(f"{waits.share(percent):.1f}" for percent in (50, 95))
    return f"{shown}/{waits.longest:.1f} of {len(waits.clear)}"


def _kind(result: Result, kind: str) -> str:
    missed = result.missed[kind]
    return f"{result.happened[kind]}" + (f" (+{missed} missed)" if missed else "")


def _states(states: Counter[str]) -> str:
    return " ".join(f"{state}:{count}" for state, count in sorted(states.items()))


_ROWS: Final = {
    "jobs accepted": lambda r: sum(r.verdict.states.values()),
    "ended as": lambda r: _states(r.verdict.states),
    "faults": lambda r: r.happened.total(),
    "lost": lambda r: r.verdict.lost,
    "committed twice": lambda r: r.verdict.twice,
    "innocents dead or failed": lambda r: r.verdict.innocents_dead,
    "poison dead": lambda r: f"{r.verdict.poison_dead} of {r.verdict.poison}",
    "workers that ended unasked": lambda r: r.verdict.unasked,
    "starts refused while a server was away": lambda r: r.verdict.refused_starts,
    "defects in logs": lambda r: r.verdict.defects,
    "after a host, s: p50/p95/max": lambda r: _waits(r.hosts),
    "after an engine, s: p50/p95/max": lambda r: _waits(r.engines),
    "after a real engine, s: p50/p95/max": lambda r: _waits(r.real_engines),
    "beside an outage, longest after a host, s": lambda r: f"{max(r.hosts.beside_others, default=0):.1f}",
    "invariants broken": lambda r: len(r.verdict.broken),
    "minutes": lambda r: f"{r.seconds / 60:.1f}",
}
