"""`bench/chaos`: one seed after the other, and a table. Status 1: an invariant or a promise is broken."""

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.chaos.campaign import Result, campaign
from tests.chaos.plan import Plan, Shape
from tests.chaos.report import late, table


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="bench/chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--real", type=int, default=2, help="workers with the real engine")
    parser.add_argument("--short", action="store_true", help="with a lease of 3 s, as in ./test")
    parser.add_argument("--without", nargs="+", default=(), metavar="KIND", help="faults to leave out")
    parser.add_argument("--folder", type=Path, help="where logs go [default: a temporary folder]")
    given = parser.parse_args()
    logging.getLogger("overpaint_producer").setLevel(logging.ERROR)  # what its producers try again
    folder = given.folder or Path(tempfile.mkdtemp(prefix="overpaint-chaos-"))
    shape = (Shape.short if given.short else Shape.long)(given.jobs, given.faults)
    shape = replace(shape, without=tuple(given.without), real_jobs=shape.real_jobs if given.real else 0)
    results = [
        _one(Plan.of(seed, shape), folder, given.real) for seed in range(given.seed, given.seed + given.seeds)
    ]
    print(table(results))
    return 1 if any(result.verdict.broken or late(result) for result in results) else 0


def _one(plan: Plan, folder: Path, real: int) -> Result:
    where, began = folder / f"seed-{plan.seed}", time.monotonic()
    print(f"seed {plan.seed}: {len(plan.jobs)} jobs, {len(plan.faults)} faults; {where}", flush=True)

    def say(words: str) -> None:
        print(f"  {time.monotonic() - began:5.0f} s  {words}", flush=True)

    result = campaign(plan, where, say, real)
    for words in (*result.verdict.broken, *late(result)):
        print(f"  BROKEN {words}", flush=True)
    print(f"  {sum(result.verdict.states.values())} jobs, {len(result.verdict.broken)} broken", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
