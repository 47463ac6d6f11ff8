"""Mutated inputs of every kind that strangers write: only results and typed errors may come of them.

    bench/fuzz --minutes 30 [--seed N] [--kinds picture,job] [--out FOLDER]
    bench/fuzz --again FOLDER/picture-1-17.bin

Each case runs in a process with a limit of memory and is watched: a traceback, a hang, a death, a case that
takes long or much memory is a failure. Failing inputs are saved. Exit status: 1 if there were any.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANG_S = 30.0
SLOW_S = 5.0
"""Of the process's own time, for one case."""
TELL_S = 60.0
MOST_MEMORY = 3 * 2**30
MOST_GROWTH = 2**30
"""Bytes by which a case may raise the process's peak."""


@dataclass
class Tally:
    """What became of the cases; failing inputs go to `out`."""

    out: Path
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def tell(self) -> None:
        """Print a line each minute, so that a person sees that the run goes on."""
        now = time.monotonic()
        if now - self.told >= TELL_S:
            self.told = now
            cases, minutes = sum(self.ends.values()), (now - self.began) / 60
            print(f"{minutes:.0f} min: {cases} cases, {len(self.failures)} failures", flush=True)


def child(kinds: Sequence[str], seed: int, first: int) -> None:
    """Run cases for ever: before each a line with its kind and number, after it one with how it ended."""
    sys.path.insert(0, str(ROOT))
    from tests import fuzzing

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    number = first
    while True:
        for kind in kinds:
            print(json.dumps({"kind": kind, "number": number}), flush=True)
            print(json.dumps(attempt(fuzzing, kind, seed, number)), flush=True)
        number += 1


def attempt(fuzzing: object, kind: str, seed: int, number: int) -> dict[str, object]:
    data = fuzzing.case(kind, seed, number)  # type: ignore[attr-defined]
    peak, began = _peak(), time.process_time()
    try:
        end, why = fuzzing.run(kind, data), ""  # type: ignore[attr-defined]
    except Exception:
        end, why = "failed", traceback.format_exc()
    spent, grown = time.process_time() - began, _peak() - peak
    if spent > SLOW_S or grown > MOST_GROWTH:
        end, why = "failed", f"it took {spent:.1f} s and {grown >> 20} MiB"
    return {"end": end, "seconds": spent, "why": why}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(kinds: Sequence[str], seed: int, seconds: float, out: Path) -> Tally:
    """Run cases in processes of their own until the time is up."""
    tally, until, first = Tally(out), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        first = _one_process(kinds, seed, first, until, tally) + 1
    return tally


def _one_process(kinds: Sequence[str], seed: int, first: int, until: float, tally: Tally) -> int:
    """Until it ends, hangs, or the time is up; the number of its last case."""
    argv = [sys.executable, __file__, "--child", str(first), "--seed", str(seed), "--kinds", ",".join(kinds)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    pipe, rest, begun = process.stdout, b"", {"kind": "", "number": first}
    assert pipe is not None
    try:
        while time.monotonic() < until:
            ready, _, _ = select.select([pipe], [], [], HANG_S if begun["kind"] else 120)
            more = os.read(pipe.fileno(), 65_536) if ready else b""
            if not more:
                why = "hung" if not ready else f"the process ended: {process.wait()}"
                _failed(begun, seed, why, tally)
                break
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                begun = _heard(json.loads(line), begun, seed, tally)
            tally.tell()
    finally:
        process.kill()
        process.wait()
    return int(begun["number"])


def _heard(said: dict, begun: dict, seed: int, tally: Tally) -> dict:  # type: ignore[type-arg]
    if "kind" in said:
        return said
    tally.ends[begun["kind"], said["end"]] += 1
    tally.seconds[begun["kind"]] += said["seconds"]
    if said["end"] == "failed":
        _failed(begun, seed, said["why"], tally)
    return begun


def _failed(begun: dict, seed: int, why: str, tally: Tally) -> None:  # type: ignore[type-arg]
    sys.path.insert(0, str(ROOT))
    from tests import fuzzing

    tally.out.mkdir(parents=True, exist_ok=True)
    path = tally.out / f"{begun['kind'] or 'start'}-{seed}-{begun['number']}.bin"
    if begun["kind"]:
        path.write_bytes(fuzzing.case(begun["kind"], seed, begun["number"]))
    tally.failures.append(str(path))
    print(f"FAILED {path}\n{why}\nagain: bench/fuzz --again {path}", flush=True)


def show(tally: Tally, kinds: Sequence[str]) -> None:
    print(f"{'kind':12}{'cases':>9}{'fine':>9}{'refused':>9}{'failed':>8}{'a second':>10}")
    for kind in kinds:
        fine, refused, failed = (tally.ends[kind, end] for end in ("fine", "refused", "failed"))
        cases = fine + refused + failed
        speed = cases / tally.seconds[kind] if tally.seconds[kind] else 0
        print(f"{kind:12}{cases:9}{fine:9}{refused:9}{failed:8}{speed:10.0f}")
    print(f"{len(tally.failures)} failures")


def again(path: Path) -> None:
    """One saved input, in this process."""
    sys.path.insert(0, str(ROOT))
    from tests import fuzzing

    print(fuzzing.run(path.name.split("-")[0], path.read_bytes()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="picture,profile,job,prompt,item,workflow,receipt,registry")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--again", type=Path, metavar="FILE")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    if asked.again is not None:
        again(asked.again)
        return 0
    if asked.child is not None:
        child(kinds, asked.seed, asked.child)
    tally = fuzz(kinds, asked.seed, asked.minutes * 60, asked.out)
    show(tally, kinds)
    return 1 if tally.failures or not tally.ends else 0


if __name__ == "__main__":
    sys.exit(main())
