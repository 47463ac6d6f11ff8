"""The table, and whether recovery was as quick as promised."""

from collections import Counter

import pytest

from tests.chaos.campaign import Result
from tests.chaos.invariants import Verdict
from tests.chaos.plan import Plan, Shape
from tests.chaos.recovery import Waits
from tests.chaos.report import late, table


def result(hosts: list[float], engines: list[float]) -> Result:
    verdict = Verdict(states=Counter(done=9, dead=1), lost=3)
    plan = Plan(7, Shape.long(2000, 300), (), ())
    return Result(plan, verdict, [], Waits(hosts), Waits(engines), Waits(), 60.0)


@pytest.mark.parametrize(
    ("hosts", "engines", "said"),
    [
        ([21.0] * 40, [1.0] * 40, ""),
        ([21.0] * 35 + [26.0] * 5, [1.0] * 40, "a host"),
        ([21.0] * 40, [1.0] * 35 + [6.0] * 5, "an engine"),
        ([26.0] * 5, [6.0] * 5, ""),
    ],
)
def test_a_recovery_that_is_later_than_promised_is_told(
    hosts: list[float], engines: list[float], said: str
) -> None:
    found = late(result(hosts, engines))
    assert [said in one for one in found] == ([True] if said else [])


def test_the_table_has_a_column_for_each_seed() -> None:
    shown = table([result([20.0, 22.0], [1.0]), result([], [])])
    assert "| seed " in shown
    (lost,) = [line for line in shown.splitlines() if line.startswith("| lost ")]
    assert lost.count(" 3 ") == 2
