"""The short form: one seed, on the shipped servers, with the fake engine. `bench/chaos` is the long one."""

from pathlib import Path

import pytest

from tests.chaos.campaign import campaign
from tests.chaos.plan import Plan, Shape
from tests.chaos.report import late, table

SHAPE = Shape.short(jobs=150, faults=30)


@pytest.mark.timeout(400)
def test_nothing_is_lost_shown_twice_or_blamed_on_innocents_under_every_kind_of_fault(tmp_path: Path) -> None:
    said: list[str] = []
    result = campaign(Plan.of(1, SHAPE), tmp_path / "farm", said.append)
    assert result.verdict.broken == [], "\n".join([*said, table([result])])
    assert late(result) == [], table([result])
    assert result.happened.total() >= 20, table([result])
