"""The audit trail: what is read of its entries, and how a line is shown."""

import json
from typing import Any

import click
import pytest
import redis

from overpaint_producer.cli import audit as command
from overpaint_producer.cli import quota
from overpaint_shared.ledger import audit
from overpaint_shared.ledger.audit import AuditFilter, AuditLine, parse


def entry(**changes: Any) -> str:
    who = json.dumps({"os_user": "ann", "host": "desk", "program": "overpaint 0.1.0", "as": "studio"})
    values = {"at": 1_700_000_000.5, "action": "cancel", "result": "ok", "rights": "operator", "who": who}
    more = {"owner": "bob", "group": "night", "jobs": 7, "changed": 6, "ids": ["a", "b"]}
    return json.dumps(values | more | changes)


def line(**changes: Any) -> AuditLine:
    found = parse(entry(**changes), "op:audit")
    assert found is not None
    return found


def test_a_line_is_read_whole() -> None:
    found = line()
    assert (found.os_user, found.host, found.acts_for) == ("ann", "desk", "studio")
    assert (found.owner, found.group, found.jobs, found.changed) == ("bob", "night", 7, 6)
    assert found.to_json()["ids"] == ("a", "b")


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "{}", entry(at="1"), entry(at=True), entry(at=1e300), entry(at=-1)]
)
def test_what_has_no_time_is_no_line(text: str) -> None:
    assert parse(text, "op:audit") is None


@pytest.mark.parametrize(
    "odd",
    [{"who": "{"}, {"who": 7}, {"who": "[1]"}, {"jobs": "x"}, {"jobs": 1e300}, {"ids": {}}, {"owner": []}],
)
def test_a_field_that_is_odd_costs_itself_alone(odd: dict[str, Any]) -> None:
    assert line(**odd).action == "cancel"


def test_a_line_in_the_producers_list_is_a_producers() -> None:
    found = parse(entry(rights="operator"), audit.PRODUCERS)
    assert found is not None
    assert found.rights == "producer"


def test_lines_are_chosen_by_time_owner_and_action() -> None:
    assert AuditFilter().wants(line())
    assert AuditFilter(since=1_700_000_000.0, owner="bob", action="cancel").wants(line())
    for other in (AuditFilter(since=1_700_000_001.0), AuditFilter(owner="ann"), AuditFilter(action="get")):
        assert not other.wants(line())


def test_a_row_tells_when_who_and_which_jobs() -> None:
    cells = command.row(line())
    assert cells[0] == "2023-11-14 22:13:20"
    assert "ann@desk" in cells
    assert cells[-1] == "a b ..., group night"
    assert command.row(line(who=""))[6] == ""


def test_who_calls_is_short_and_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/\x1b[31mevil\u202e" + "x" * 5000])
    text = audit.caller("o\n" * 500)
    assert len(text.encode()) < 1200
    assert json.loads(text)["program"].startswith("[31mevilx")
    assert json.loads(text)["as"] == "o" * 60


def test_the_command_knows_every_action() -> None:
    assert command.ACTIONS == audit.ACTIONS


class Crowded:
    """A Redis that closes the connection when an answer is longer than it may be."""

    def __init__(self, sizes: list[int], most: int, away: bool = False) -> None:
        self.sizes, self.most, self.away = sizes, most, away

    def llen(self, _key: str) -> int:
        return len(self.sizes)

    def lrange(self, _key: str, start: int, end: int) -> list[str]:
        if sum(self.sizes[start : end + 1]) > self.most or self.away:
            raise redis.ConnectionError("Connection closed by server.")
        return [entry(at=number) for number in range(start, end + 1)]

    def ping(self) -> None:
        if self.away:
            raise redis.ConnectionError("refused")


def test_entries_that_are_too_long_for_one_answer_are_read_in_several() -> None:
    found = audit.trail(Crowded([8] * 20, most=64), "redis", AuditFilter(), 100)
    assert (len(found.lines), found.unreadable) == (40, 0)


def test_an_entry_that_no_answer_can_hold_hides_no_other() -> None:
    found = audit.trail(Crowded([1, 1, 100, 1], most=64), "redis", AuditFilter(), 100)
    assert (len(found.lines), found.unreadable) == (6, 2)


def test_a_trail_of_a_redis_that_is_away_is_not_read_as_empty() -> None:
    with pytest.raises(redis.ConnectionError, match="refused"):
        audit.trail(Crowded([1], most=64, away=True), "redis", AuditFilter(), 100)


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 16, "-1", "x"])
def test_a_limit_that_is_too_long_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match="is no limit"):
        quota.Limit().convert(value, None, None)
