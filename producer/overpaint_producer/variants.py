"""Many jobs from one file: `--seeds 1..8` and `--set path=value`, as pure functions on parsed JSON."""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overpaint_shared.errors import SpecError

MAX_VARIANTS = 100_000
_RANGE = re.compile(r"([0-9]{1,20})\.\.([0-9]{1,20})")
_NUMBER = re.compile(r"[0-9]{1,20}")  # not str.isdecimal, which takes the digits of every script

Json = Any
Assignment = tuple[tuple[str | int, ...], Json]


def parse_seeds(text: str) -> list[int]:
    """Seeds of `1..8`, `3,5,9` or a mixture. Raises ValueError for anything else and for too many."""
    seeds: list[int] = []
    for part in text.split(","):
        if match := _RANGE.fullmatch(part.strip()):
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < MAX_VARIANTS:
                raise ValueError(
                    f"{part.strip()!r}: the last seed must follow the first, by less than {MAX_VARIANTS}"
                )
            seeds.extend(range(first, last + 1))
        elif _NUMBER.fullmatch(part.strip()):
            seeds.append(int(part))
        else:
            raise ValueError(f"{part.strip()!r} is no seed; write 7, or 1..8, or 1,5,9")
    return seeds


def parse_assignment(text: str) -> Assignment:
    """`sampling.steps=30` as (("sampling", "steps"), 30). Raises ValueError without a path or `=`.

    The value is read as JSON if it is JSON, else as a text: `prompt=a red hat`, `prompt="42"`, `mask=null`.
    A number in the path counts in a list from 0: `prepare.0.factor=2` or `prepare[0].factor=2`.
    """
    path, equals, value = text.partition("=")
    names = re.sub(r"\[([0-9]+)\]", r".\1", path.strip()).split(".")
    steps = tuple(int(name) if _NUMBER.fullmatch(name) else name for name in names)
    if not equals or "" in steps:
        raise ValueError(f"{text!r} is no assignment; write path=value, as in sampling.steps=30")
    try:
        return steps, json.loads(value)
    except ValueError:
        return steps, value


def variants(data: Json, assignments: Sequence[Assignment], seeds: Sequence[int]) -> Iterator[Json]:
    """Every combination: a path assigned several times takes each value, and each goes with each seed.

    Yields changed copies of `data` in the order given, seeds fastest. Raises SpecError where a path leads
    nowhere, ValueError beyond MAX_VARIANTS.
    """
    choices = _choices(assignments)
    if seeds:
        choices[("sampling", "seed")] = list(seeds)
    count = 1
    for values in choices.values():
        count *= len(values)
    if count > MAX_VARIANTS:
        raise ValueError(f"that would make {count} jobs of one file; at most {MAX_VARIANTS} are made")
    for chosen in itertools.product(*choices.values()):
        yield _assigned(data, dict(zip(choices, chosen, strict=True)))


def _choices(assignments: Sequence[Assignment]) -> dict[tuple[str | int, ...], list[Json]]:
    choices: dict[tuple[str | int, ...], list[Json]] = {}
    for path, value in assignments:
        choices.setdefault(path, []).append(value)
    return choices


def _assigned(data: Json, values: Mapping[tuple[str | int, ...], Json]) -> Json:
    changed = copy.deepcopy(data)
    for path, value in values.items():
        _assign(changed, path, value)
    return changed


def _assign(data: Json, path: tuple[str | int, ...], value: Json) -> None:
    """Set one place; objects missing on the way are made (`sampling` of a spec that leaves it out)."""
    here = data
    for at, step in enumerate(path):
        last = at == len(path) - 1
        if isinstance(here, dict):
            name = str(step)
            if last:
                here[name] = value
            elif here.get(name) is None:
                here[name] = {}
            here = here[name]
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            if last:
                here[step] = value
            here = here[step]
        else:
            raise _no_such_place(path, at, here)


def _no_such_place(path: tuple[str | int, ...], at: int, here: Json) -> SpecError:
    where = ".".join(map(str, path[:at])) or "the job"
    holds = f"a list of {len(here)}" if isinstance(here, list) else f"{json.dumps(here)[:40]}"
    return SpecError(
        f"there is no {'.'.join(map(str, path))} in this job: {where} is {holds}",
        field=".".join(map(str, path)),
        fix="check the path after --set; a number counts in a list from 0",
    )
