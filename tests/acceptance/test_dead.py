"""`overpaint dead`: jobs that were given up are listed, explained, replayed and discarded."""

import json

import pytest

from overpaint_producer.client import Farm
from overpaint_shared.ledger import JobState, ReleaseReason
from tests.acceptance.commands import Shell
from tests.integration.hand import Hand, job
from tests.shipped import Shipped, ShippedFarm

SAID = "Fatal Python error: Segmentation fault\n\x1b[31mthread 1\x1b[0m"


def dying(farm: Farm, hand: Hand, shell: Shell, **changes: object) -> str:
    """A job whose engine crashes until it is dead."""
    submitted = farm.submit(job(**changes), folder=shell.folder)
    while submitted.status().state is not JobState.DEAD:
        token = hand.claim(submitted.id).token
        farm.store.put_result(submitted.id, token, "image.png", b"half", "image/png")
        farm.ledger.release(submitted.id, token, ReleaseReason.CRASHED, "killed by SIGSEGV", SAID)
    return submitted.id


def test_dead_jobs_are_listed_by_what_is_asked_for(shell: Shell, farm: Farm, hand: Hand) -> None:
    assert "no job is dead" in shell.overpaint("dead").err
    one = dying(farm, hand, shell, group="night", labels={"shot": "1"})
    two = dying(farm, hand, shell)
    shown = shell.overpaint("dead").out.splitlines()
    assert shown[0].split() == ["ID", "OWNER", "MODEL", "DIED", "CRASHES", "LOST", "WHY"]
    assert [line.split()[0] for line in shown[1:]] == [two, one]

    def ids(*argv: str) -> list[str]:
        return [line["id"] for line in shell.overpaint("dead", "list", "--json", *argv).lines]

    assert ids() == [two, one]
    assert ids("--limit", "1") == [two]
    assert ids("--group", "night") == ids("--label", "shot=1") == [one]
    assert ids("--model", "other") == ids("--older-than", "1h") == ids("--owner", "bob") == []
    assert ids("--newer-than", "2h") == ids("--owner", "bob", "--all-owners") == [two, one]
    wrong = shell.overpaint("dead", "list", "--older-than", "soon")
    assert (wrong.code, "write 90s, 15m, 2h or 3d" in wrong.err) == (2, True)


def test_show_tells_the_cause_each_attempt_and_the_engines_last_lines(
    shell: Shell, farm: Farm, hand: Hand
) -> None:
    job_id = dying(farm, hand, shell)
    result = shell.overpaint("dead", "show", job_id)
    assert result.code == 0
    assert result.out.count("crashed") >= 4
    for part in ("died or hung 4 times", "hand@here", "killed by SIGSEGV", "Segmentation fault"):
        assert part in result.out
    assert "\x1b" not in result.out
    (told,) = shell.overpaint("dead", "show", job_id, "--json").lines
    assert [each["attempt"] for each in told["history"]["attempts"]] == [1, 2, 3, 4]
    assert told["history"]["said"][0] == "Fatal Python error: Segmentation fault"
    assert shell.overpaint("dead", "show", "nobody").code == 2


def test_replay_asks_before_it_queues_many(shell: Shell, farm: Farm, hand: Hand) -> None:
    one, two = (dying(farm, hand, shell) for _ in range(2))
    refused = shell.overpaint("dead", "replay", "--all")
    assert (refused.code, "add --yes" in refused.err) == (2, True)
    assert shell.overpaint("dead", "replay").code == 2
    assert shell.overpaint("dead", "replay", one).out == f"{one} queued\n"
    assert shell.overpaint("dead", "replay", "--all", "--yes", "--json").lines == [
        {"id": two, "state": "queued"}
    ]
    assert farm.ledger.counts()[JobState.DEAD] == 0
    hand.render(one)
    assert farm.ledger.history(one).said == "", "what is done needs no last words"


def test_discard_leaves_neither_record_nor_files(shell: Shell, farm: Farm, hand: Hand) -> None:
    one, two = (dying(farm, hand, shell) for _ in range(2))
    waiting = farm.submit(shell.folder / "job.json").id
    refused = shell.overpaint("dead", "discard", one)
    assert (refused.code, farm.job(one).status().state) == (2, JobState.DEAD)
    result = shell.overpaint("dead", "discard", one, waiting, "nobody", "--yes")
    assert result.out == f"{one} discarded\n"
    assert "only a failed or dead job can be discarded" in result.err
    assert result.code != 0
    assert {each.job_id for each in farm.store.attempts()} == {two}
    assert [record.id for record in farm.jobs()] == [waiting, two]
    assert {each.state: each.jobs for each in farm.ledger.census()} == {JobState.DEAD: 1, JobState.QUEUED: 1}
    assert farm.ledger.history(one).attempts == ()


def test_what_a_dying_engine_wrote_reaches_the_ledger_of_the_farm_as_shipped(
    shipped: Shipped, shipped_farm: ShippedFarm
) -> None:
    worker = shipped_farm.start().ready()
    secret = shipped.redis.password("worker")
    words = f"Traceback (most recent call last):\n  boom with {secret}"
    (poison,) = shipped_farm.submit(shipped_farm.spec(do="kill", at=1, say=words))
    shipped_farm.until(poison, JobState.DEAD)
    with Farm.connect(shipped.settings("producer")) as producer:
        history = producer.ledger.history(poison)
        assert [each.how for each in history.attempts] == ["crashed"] * 4
        assert all(each.worker.startswith("gpu0@") and each.started for each in history.attempts)
        assert "Traceback (most recent call last):" in history.said
        assert secret not in json.dumps(history.to_json())
    with Farm.connect(shipped.settings("operator")) as operator:
        operator.job(poison).discard()
        assert operator.ledger.job(poison) is None
    assert "boom with" in worker.log.read_text()
    assert shipped.redis.denied() == set()


@pytest.mark.parametrize("entry", ["no json", "[]", '{"attempt": "x"}', '{"ended": "soon"}'])
def test_a_damaged_entry_of_the_history_is_passed_over(
    farm: Farm, hand: Hand, shell: Shell, entry: str
) -> None:
    job_id = dying(farm, hand, shell)
    farm.ledger._client.rpush(f"op:attempts:{job_id}", entry)
    assert len(farm.ledger.history(job_id).attempts) == 4
    farm.ledger._client.set(f"op:attempts:{job_id}", "of another type")
    assert farm.ledger.history(job_id).attempts == ()


def test_a_fault_that_a_job_survived_is_no_reason_of_its_end(shell: Shell, farm: Farm, hand: Hand) -> None:
    done, stopped = (farm.submit(job(), folder=shell.folder).id for _ in range(2))
    for job_id in (done, stopped):
        hand.crash(job_id, hand.claim(job_id).token)
    assert "last fault" in shell.overpaint("status", done).out
    hand.render(done)
    farm.job(stopped).cancel()
    shown = shell.overpaint("status", done, stopped).out
    assert "why" not in shown
    assert "fault" not in shown
    assert "signal 11" not in shell.overpaint("watch", done, stopped).err
