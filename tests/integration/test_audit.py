"""The audit trail on the farm as shipped: one line for each call, whoever makes it and however it ends."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from overpaint_producer.client import Farm
from overpaint_shared.errors import (
    JobError,
    LedgerUnreachable,
    OverpaintError,
    SpecError,
    TokenConflict,
    UnknownJob,
)
from overpaint_shared.ledger import JobState, QuotaExceeded
from overpaint_shared.ledger.audit import AuditLine
from overpaint_shared.ledger.scripts import AUDIT_KEPT
from tests.integration.hand import Hand, job, png, working
from tests.integration.ledgers import job as submission
from tests.integration.ledgers import reaper
from tests.shipped import ROOT, Shipped

USERS = ROOT / "deploy" / "valkey" / "users.acl.template"


class Trail:
    """What the operator reads, since the last look."""

    def __init__(self, shipped: Shipped) -> None:
        self.farm = Farm(shipped.settings("operator"))
        self.seen = 0

    def new(self) -> list[AuditLine]:
        """Lines since the last look."""
        lines = self.farm.ledger.audit(limit=1000).lines
        found, self.seen = lines[self.seen :], len(lines)
        return list(found)

    def one(self) -> AuditLine:
        """The only new line."""
        (line,) = self.new()
        return line


@pytest.fixture
def farm(shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    """A producer's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(png())
    with Farm(shipped.settings("worker")) as worker, Farm(shipped.settings("producer")) as made:
        worker.ledger.reap()
        with working(worker):
            yield made


@pytest.fixture
def hand(shipped: Shipped, farm: Farm) -> Iterator[Hand]:
    with Farm(shipped.settings("worker")) as worker:
        yield Hand(worker)


@pytest.fixture
def trail(shipped: Shipped, farm: Farm) -> Iterator[Trail]:
    made = Trail(shipped)
    yield made
    made.farm.close()


def test_a_batch_of_many_jobs_leaves_one_line_which_tells_who_and_what(
    farm: Farm, trail: Trail, shipped: Shipped
) -> None:
    jobs = farm.submit_many([job() for _ in range(40)], group="night")
    line = trail.one()
    assert (line.action, line.result, line.rights) == ("submit", "ok", "producer")
    assert (line.owner, line.acts_for, line.group) == (farm.settings.owner, farm.settings.owner, "night")
    assert (line.jobs, line.changed) == (40, 40)
    assert line.ids == tuple(each.id for each in jobs[:5])
    assert line.host
    assert line.os_user
    assert abs(line.at - farm.ledger.now()) < 60
    assert shipped.redis.denied() == set()


def test_a_submit_that_finds_its_job_there_changes_nothing_and_is_told(farm: Farm, trail: Trail) -> None:
    farm.submit(job(), token="t")
    farm.submit(job(), token="t")
    assert [(line.result, line.changed) for line in trail.new()] == [("ok", 1), ("ok", 0)]


def test_a_token_of_another_spec_is_told(farm: Farm, trail: Trail) -> None:
    farm.submit(job(), token="t")
    with pytest.raises(TokenConflict) as refused:
        farm.submit(job(prompt="another"), token="t")
    assert [line.result for line in trail.new()] == ["ok", refused.value.code]


def test_a_submit_beyond_a_limit_is_told_with_what_was_taken(farm: Farm, trail: Trail) -> None:
    trail.farm.ledger.set_limits(farm.settings.owner, {"max_queued": 3})
    with pytest.raises(QuotaExceeded):
        farm.submit_many([job() for _ in range(5)])
    line = trail.one()
    assert (line.result, line.jobs, line.changed) == ("quota_exceeded", 5, 3)


def test_a_job_that_is_wrong_reaches_no_trail(farm: Farm, trail: Trail) -> None:
    with pytest.raises(SpecError):
        farm.submit(job(model="nowhere"))
    assert trail.new() == []


def test_cancel_leaves_one_line_for_many_jobs_and_tells_unknown_ones(farm: Farm, trail: Trail) -> None:
    jobs = farm.submit_many([job() for _ in range(10)], group="night")
    trail.new()
    farm.cancel([each.id for each in jobs])
    line = trail.one()
    assert (line.action, line.result, line.jobs, line.changed) == ("cancel", "ok", 10, 10)
    assert (line.owner, line.group) == (farm.settings.owner, "night")
    jobs[0].cancel()
    again = trail.one()
    assert (again.changed, again.ids) == (0, (jobs[0].id,))
    assert farm.cancel(["nobody"]) == {}
    assert trail.one().result == UnknownJob.code


def test_replay_and_its_refusals_are_told(farm: Farm, trail: Trail, hand: Hand) -> None:
    failing = farm.submit(job())
    hand.claim(failing.id)
    other = farm.submit(job())
    hand.fail(other.id, {"code": "input", "message": "torn"})
    trail.new()
    other.replay()
    line = trail.one()
    assert (line.action, line.result, line.changed, line.owner) == ("replay", "ok", 1, farm.settings.owner)
    with pytest.raises(OverpaintError):
        failing.replay()
    assert trail.one().result == "refused"
    with pytest.raises(UnknownJob):
        farm.ledger.replay("nobody")
    assert trail.one().result == UnknownJob.code


def test_fetching_is_told_with_the_name_of_the_picture(
    farm: Farm, trail: Trail, hand: Hand, tmp_path: Path
) -> None:
    named = farm.submit(job(output={"key": "hats/red.png"}))
    hand.render(named.id)
    trail.new()
    named.save(tmp_path / "out")
    line = trail.one()
    assert (line.action, line.result, line.name) == ("get", "ok", "hats/red.png")
    assert (line.owner, line.ids) == (farm.settings.owner, (named.id,))
    named.links()
    assert trail.one().action == "links"
    named.image()
    named.files()
    assert [line.action for line in trail.new()] == ["get", "get"]


def test_fetching_what_is_not_there_is_told(farm: Farm, trail: Trail, hand: Hand) -> None:
    from overpaint_producer.job import Job

    with pytest.raises(UnknownJob):
        Job(farm, "nobody").files()
    assert trail.one().result == UnknownJob.code
    failed = farm.submit(job())
    hand.fail(failed.id, {"code": "input", "message": "torn"})
    trail.new()
    with pytest.raises(JobError):
        failed.files()
    assert trail.one().result == "input"


def test_discard_is_told_as_the_operators(farm: Farm, trail: Trail, hand: Hand) -> None:
    failed = farm.submit(job())
    hand.fail(failed.id, {"code": "input", "message": "torn"})
    trail.new()
    trail.farm.job(failed.id).discard()
    line = trail.one()
    assert (line.action, line.rights, line.owner) == ("discard", "operator", farm.settings.owner)


def test_the_role_is_what_redis_knows_and_not_what_the_client_says(shipped: Shipped, trail: Trail) -> None:
    for role in ("producer", "worker", "operator"):
        with Farm(shipped.settings(role)) as farm:
            farm.cancel(["nobody"])
        assert trail.one().rights == role
    assert shipped.redis.denied() == set()


def test_forged_lines_are_set_apart_and_damaged_ones_are_counted(
    farm: Farm, trail: Trail, shipped: Shipped
) -> None:
    with shipped.redis.client("producer") as liar:
        liar.rpush("op:audit:producer", json.dumps({"at": 1, "action": "cancel", "rights": "operator"}))
        for odd in ("no JSON", "[1]", '{"at": "x"}', '{"at": 1e300}', '{"at": NaN}', "[" * 100_000, "\x00"):
            liar.rpush("op:audit:producer", odd)
    farm.cancel(["nobody"])
    found = trail.farm.ledger.audit()
    assert found.unreadable == 7
    assert [line.rights for line in found.lines] == ["producer", "producer"]


def test_a_key_of_another_type_stops_no_call_and_is_cleared(
    farm: Farm, trail: Trail, shipped: Shipped
) -> None:
    with shipped.redis.client() as operator, Farm(shipped.settings("worker")) as worker:
        operator.set("op:audit:producer", "x")
        farm.submit(job())
        assert trail.new() == []
        assert reaper(shipped.redis.url("worker")).reap().odd
        farm.cancel(["nobody"])
        assert trail.one().action == "cancel"
        assert worker.ledger.job("nobody") is None


def test_the_trail_is_bounded_and_the_reaper_shortens_it(farm: Farm, shipped: Shipped) -> None:
    with shipped.redis.client() as operator:
        operator.rpush("op:audit:producer", *(str(number) for number in range(20_000)))
        farm.cancel(["nobody"])
        assert operator.llen("op:audit:producer") == 20_000, "a full trail takes no more"
        reaper(shipped.redis.url("worker")).reap()
        farm.cancel(["nobody"])
        assert operator.llen("op:audit:producer") == AUDIT_KEPT + 1
        assert operator.lindex("op:audit:producer", 0) == str(20_000 - AUDIT_KEPT)


def test_a_producer_without_the_right_is_served_and_told_once_in_the_log(
    own_redis: Shipped, caplog: pytest.LogCaptureFixture
) -> None:
    """As with the users of the version before."""
    with own_redis.redis.client() as operator:
        rights = re.findall(r"\([^)]*\)", USERS.read_text().split("user producer", 1)[1].split("\n", 1)[0])
        rights.remove("(+rpush +llen %W~op:audit:producer)")
        operator.execute_command("ACL", "SETUSER", "producer", "clearselectors", *rights)
    with Farm(own_redis.settings("operator")) as other, Farm(own_redis.settings("producer")) as farm:
        other.ledger.load_scripts()
        farm.ledger.submit([submission("a"), submission("b")])
        assert farm.ledger.cancel("a").state is JobState.CANCELLED
        farm.cancel(["b"])
        assert other.ledger.audit().lines == ()
    assert [record.action for record in caplog.records if "audit" in record.message] == ["audit.unwritten"]
    assert own_redis.redis.denied() == set()


@pytest.mark.parametrize("role", ["producer", "monitor"])
def test_who_may_not_read_the_trail_is_told_which_user_may(shipped: Shipped, role: str) -> None:
    with Farm(shipped.settings(role)) as farm, pytest.raises(LedgerUnreachable) as refused:
        farm.ledger.audit()
    assert "operator" in str(refused.value.fix)
    with shipped.redis.client() as client:
        client.acl_log_reset()


def test_a_full_redis_still_tells_of_cancels(own_redis: Shipped) -> None:
    with (
        Farm(own_redis.settings("producer")) as farm,
        Farm(own_redis.settings("operator")) as operator,
        own_redis.redis.client() as client,
    ):
        operator.ledger.load_scripts()
        farm.ledger.submit([submission("a")])
        client.config_set("maxmemory", "1")
        assert farm.ledger.cancel("a").state is JobState.CANCELLED
        assert [line.action for line in operator.ledger.audit().lines] == ["submit", "cancel"]


def test_long_fields_of_a_producer_hide_no_other_job(farm: Farm, trail: Trail, shipped: Shipped) -> None:
    ids = [farm.submit(job()).id for _ in range(9)]
    with redis.Redis.from_url(shipped.settings("producer").redis_url) as producer:
        for job_id in ids:
            producer.hset(f"op:job:{job_id}", "labels", b"x" * 8_000_000)
    assert len(trail.farm.ledger.jobs(limit=100)) == 9
