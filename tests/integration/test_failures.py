"""What breaks, and what must come of it: real processes are killed, stopped and asked to leave.

The farm of these tests notices a lost worker after 3 s where a farm of the default settings takes 20 s; that
the
defaults stay within the promised 25 s is checked by arithmetic on them.
"""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from overpaint_producer.services import RedisService, start_redis
from overpaint_shared.ledger import JobState
from overpaint_shared.queues import STAMP_HEADER
from overpaint_shared.settings import LedgerSettings, Settings
from overpaint_worker.stopping import EXIT_DEVICE_FAULT
from overpaint_worker.transport import QUARANTINE_KEY
from tests import fake_engine
from tests.at_work import kill_at
from tests.unit.test_transport import HOSTILE, message
from tests.waiting import wait_until
from tests.workers import TestFarm

DONE, RUNNING = JobState.DONE, JobState.RUNNING


def starts(farm: TestFarm, job_id: str) -> list[dict[str, Any]]:
    return [e for w in farm.workers for e in w.events if e["event"] == "admitted" and e["job"] == job_id]


# The engine


def test_jobs_of_a_killed_engine_are_released_within_a_second_and_run_again(farm: TestFarm) -> None:
    worker = farm.start().ready()
    ids = farm.submit(farm.long(), farm.long())
    for job_id in ids:
        farm.stepping(job_id)
    kill_at(worker.engine_pid, ids)
    killed = time.monotonic()
    wait_until(lambda: all(worker.said("job.released", job=i, reason="suspected") for i in ids), within_s=5)
    assert time.monotonic() - killed < 1.0
    worker.until("engine.ready", times=2)
    assert {farm.job(job_id).crashes for job_id in ids} == {0}, "either may have done it"
    # Both return alone, one after the other: cancel the first to see the second.
    first = wait_until(lambda: next((i for i in ids if len(starts(farm, i)) == 2), None))
    assert starts(farm, first)[1]["alone"]
    farm.ledger.cancel(first)
    second = next(i for i in ids if i != first)
    wait_until(lambda: len(starts(farm, second)) == 2)
    assert starts(farm, second)[1] | {"alone": True, "company": 0} == starts(farm, second)[1]


def test_a_poison_job_is_dead_after_its_crashes_while_its_neighbours_finish(farm: TestFarm) -> None:
    worker = farm.start().ready()
    before = farm.submit(*[farm.spec(steps=10) for _ in range(3)])
    (poison,) = farm.submit(farm.spec(do="kill", at=2))
    after = farm.submit(*[farm.spec(steps=10) for _ in range(6)])
    assert farm.all_ended([*before, *after]) == {DONE: 9}
    record = farm.until(poison, JobState.DEAD)
    assert record.crashes == farm.ledger._settings.max_crashes + 1
    assert "SIGKILL" in (record.fault or "")
    assert farm.commits().keys() == {*before, *after}
    assert all(event["alone"] for event in starts(farm, poison)[1:])
    assert {farm.job(i).crashes for i in (*before, *after)} == {0}
    assert worker.popen.poll() is None


def test_a_poison_job_that_comes_alone_takes_no_worker_with_it(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (poison,) = farm.submit(farm.spec(do="kill", at=0))
    farm.until(poison, JobState.DEAD)
    (after,) = farm.submit(farm.spec())
    farm.until(after, DONE)
    assert worker.popen.poll() is None


def test_a_job_that_hangs_in_decoding_counts_against_itself_alone(farm: TestFarm) -> None:
    farm.start(stage_s=1.0).ready()
    innocents = farm.submit(*[farm.spec(steps=100, step_s=0.02) for _ in range(3)])
    for job_id in innocents:
        farm.stepping(job_id)
    (culprit,) = farm.submit(farm.spec(do="decode"))
    assert farm.until(culprit, JobState.DEAD).crashes == farm.ledger._settings.max_crashes + 1
    assert farm.all_ended(innocents) == {DONE: 3}
    assert {farm.job(i).crashes for i in innocents} == {0}


def test_eight_poison_jobs_are_dead_and_their_worker_and_the_innocents_live(farm: TestFarm) -> None:
    worker = farm.start(environment={"OVERPAINT_MAX_CRASHES": "0"}).ready()
    poison = farm.submit(*[farm.spec(do="kill", at=0) for _ in range(8)])
    innocents = farm.submit(*[farm.spec(steps=5) for _ in range(4)])
    assert farm.all_ended([*poison, *innocents]) == {JobState.DEAD: 8, DONE: 4}
    assert {farm.job(i).state for i in innocents} == {DONE}
    assert {farm.job(i).crashes for i in innocents} == {0}
    assert worker.said("engine.tested"), "the device showed that it is well"
    assert worker.popen.poll() is None


def test_a_device_that_ends_every_job_stops_the_worker_before_a_job_is_dead(farm: TestFarm) -> None:
    worker = farm.start(environment={fake_engine.DEVICE_DIES: "1"}).ready()
    ids = farm.submit(*[farm.spec() for _ in range(4)])
    assert worker.wait(120) == EXIT_DEVICE_FAULT
    assert {farm.job(job_id).state for job_id in ids} == {JobState.QUEUED}
    assert max(farm.job(job_id).crashes for job_id in ids) <= 2
    farm.start().ready()
    assert farm.all_ended(ids) == {DONE: 4}


def test_a_stopped_engine_is_killed_at_its_deadline_and_the_job_runs_again(farm: TestFarm) -> None:
    worker = farm.start(environment={fake_engine.BUDGET_S: "1.0"}).ready()
    (job_id,) = farm.submit(farm.spec(steps=100, step_s=0.02))
    farm.stepping(job_id)
    os.kill(worker.engine_pid, signal.SIGSTOP)
    worker.until("engine.hung", within_s=10)
    record = farm.until(job_id, DONE)
    assert record.crashes == 1
    assert record.attempt == 2


def test_an_engine_that_cannot_start_stops_the_worker_with_a_message(farm: TestFarm) -> None:
    worker = farm.start(environment={fake_engine.DIE_AT_START: "1"})
    (job_id,) = farm.submit(farm.spec())
    assert worker.wait(60) == EXIT_DEVICE_FAULT
    assert "without one step" in worker.until("worker.device_fault")["reason"]
    assert farm.job(job_id).attempt == 0, "no job was taken by a worker without an engine"


# The worker


def test_jobs_of_a_lost_worker_run_elsewhere_after_the_lease(farm: TestFarm) -> None:
    settings = farm.ledger._settings
    lost = farm.start().ready()
    ids = farm.submit(farm.long(step_s=0.05), farm.long(step_s=0.05))
    for job_id in ids:
        farm.stepping(job_id)
    other = farm.start().ready()
    lost.kill_group()
    killed = time.monotonic()
    wait_until(lambda: all(farm.job(i).attempt == 2 and farm.job(i).state is RUNNING for i in ids))
    took = time.monotonic() - killed
    assert took < settings.lease_s + settings.reap_s + 2.0
    assert {farm.job(i).lost_hosts for i in ids} == {1}
    wait_until(lambda: {e["job"] for e in other.events if e["event"] == "admitted"} == set(ids))


def test_the_default_settings_restart_the_jobs_of_a_lost_worker_within_25_s() -> None:
    settings = LedgerSettings()
    # The lease was renewed at the latest just before the loss; a reaper looks each `reap_s`; a message takes
    # well
    # under a second, and the measured slack of the test above is allowed for.
    assert settings.lease_s + settings.reap_s + 2.0 <= 25.0


def test_the_engine_of_a_killed_worker_does_not_stay(farm: TestFarm) -> None:
    worker = farm.start().ready()
    engine = worker.engine_pid
    os.kill(worker.popen.pid, signal.SIGKILL)  # the worker alone, not its group
    wait_until(lambda: not _alive(engine), within_s=5)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Stopping


def test_sigterm_lets_what_runs_finish_and_takes_nothing_more(farm: TestFarm) -> None:
    worker = farm.start(grace_s=30).ready()
    (job_id,) = farm.submit(farm.spec(steps=100, step_s=0.02))
    farm.stepping(job_id)
    worker.terminate()
    worker.until("worker.draining")
    (late,) = farm.submit(farm.spec())
    assert worker.wait() == 0
    assert farm.job(job_id).state is DONE
    assert farm.job(late).attempt == 0
    farm.start().ready()
    farm.until(late, DONE)


def test_after_its_grace_a_worker_gives_back_and_another_goes_on_within_a_second(farm: TestFarm) -> None:
    worker = farm.start(grace_s=0.5).ready()
    (job_id,) = farm.submit(farm.long())
    farm.stepping(job_id)
    other = farm.start().ready()
    worker.terminate()
    released = worker.until("job.released", job=job_id)
    wait_until(lambda: starts(farm, job_id)[1:], within_s=5)
    assert _at(other.until("job.claimed", job=job_id)) - _at(released) < 1.0
    assert worker.wait(5) == 0
    record = farm.job(job_id)
    assert (record.crashes, record.lost_hosts, record.attempt) == (0, 0, 2)


def test_a_second_sigterm_gives_back_now(farm: TestFarm) -> None:
    worker = farm.start(grace_s=600).ready()
    (job_id,) = farm.submit(farm.long())
    farm.stepping(job_id)
    worker.terminate()
    worker.until("worker.draining")
    worker.terminate()
    assert worker.wait(5) == 0
    assert farm.job(job_id).state is JobState.QUEUED
    assert farm.job(job_id).crashes == 0


def test_a_worker_leaves_while_its_engine_is_still_starting(farm: TestFarm) -> None:
    worker = farm.start(environment={fake_engine.START_S: "60"})
    worker.until("engine.started")
    worker.terminate()
    assert worker.wait(5) == 0


def test_celerys_own_shutdown_gives_back_too(farm: TestFarm) -> None:
    worker = farm.start(grace_s=600, remote_control="all").ready()
    (job_id,) = farm.submit(farm.long())
    farm.stepping(job_id)
    farm.app.control.shutdown()
    assert worker.wait(15) == 0
    assert farm.job(job_id).state is JobState.QUEUED


def test_a_worker_answers_pings_while_it_renders(farm: TestFarm) -> None:
    worker = farm.start(slots=1).ready()
    (job_id,) = farm.submit(farm.long())
    farm.stepping(job_id)
    replies = farm.app.control.ping(timeout=10, limit=1)
    assert [list(reply.values()) for reply in replies] == [[{"ok": "pong"}]]
    assert worker.popen.poll() is None


def _at(line: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(line["timestamp"]).timestamp()


# A worker that was away


def test_a_worker_that_froze_commits_nothing_when_it_wakes(farm: TestFarm) -> None:
    workers = [farm.start().ready(), farm.start().ready()]
    (job_id,) = farm.submit(farm.spec(steps=150, step_s=0.02))
    wait_until(lambda: any(w.said("job.claimed", job=job_id) for w in workers))
    frozen, other = sorted(workers, key=lambda w: not w.said("job.claimed", job=job_id))
    os.killpg(frozen.popen.pid, signal.SIGSTOP)
    try:
        record = farm.until(job_id, DONE)
    finally:
        os.killpg(frozen.popen.pid, signal.SIGCONT)
    assert record.attempt == 2
    frozen.until("job.fenced", job=job_id)
    assert farm.job(job_id) == record
    assert (len(frozen.said("job.done")), len(other.said("job.done"))) == (0, 1)
    mine = f"results/{job_id}/{record.token}/"
    wait_until(
        lambda: [a.token for a in farm.store.attempts() if a.job_id == job_id] == [record.token], what=mine
    )
    (after,) = farm.submit(farm.spec())
    farm.until(after, DONE)


# What is no message


def test_hostile_items_are_put_aside_and_the_worker_lives(farm: TestFarm, redis_client: redis.Redis) -> None:
    worker = farm.start().ready()
    raw: list[bytes] = [json.dumps(item).encode() for item in HOSTILE.values()]
    raw += [b"", b"\xff\xfe\x00", b"{", b"[" * 100_000, b'{"body": 1e999}', b"null"]
    raw += [b"9" * 5000, b"[" * 60_000, b" " * 100_000_000, b'{"__type__": "decimal", "__value__": "none"}']
    raw += [b'{"__type__": [], "__value__": 1}', b'"\\ud800"']
    for item in raw:
        redis_client.lpush("m.tiny", item)
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, DONE)
    wait_until(lambda: redis_client.llen("m.tiny") == 0)
    assert worker.popen.poll() is None
    assert redis_client.llen(QUARANTINE_KEY) == len(raw)
    assert len(worker.said("message.quarantined")) == len(raw)


def test_a_message_with_an_impossible_time_still_wakes_the_worker(
    farm: TestFarm, redis_client: redis.Redis
) -> None:
    worker = farm.start().ready()
    item = message("no-such-job", headers={STAMP_HEADER: 10**400})
    redis_client.lpush("m.tiny", json.dumps(item))
    assert worker.until("job.noop")["verdict"] == "gone"
    assert worker.popen.poll() is None


def test_hostile_remote_control_is_put_aside_and_the_worker_lives(
    farm: TestFarm, redis_client: redis.Redis
) -> None:
    worker = farm.start().ready()
    raw: list[bytes] = [json.dumps(item).encode() for item in HOSTILE.values() if item]
    raw += [b"\xff", b"{", b"[" * 100_000, b"9" * 5000, b'{"__type__": "decimal", "__value__": "none"}']
    wait_until(lambda: redis_client.publish("/0.celery.pidbox", raw[0]))
    for item in raw[1:]:
        redis_client.publish("/0.celery.pidbox", item)
    replies = wait_until(lambda: farm.app.control.ping(timeout=2, limit=1))
    assert [list(reply.values()) for reply in replies] == [[{"ok": "pong"}]]
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, DONE)
    assert worker.popen.poll() is None


def test_a_message_for_another_task_runs_the_render_task_or_nothing(
    farm: TestFarm, redis_client: redis.Redis
) -> None:
    worker = farm.start().ready()
    farm.app.send_task(
        "celery.backend_cleanup", args=("no-such-job",), queue=farm.app.amqp.queues.select_add("m.tiny")
    )
    assert worker.until("job.noop")["verdict"] == "gone"


# Redis


def test_a_killed_redis_loses_nothing_and_doubles_nothing(farm_settings: Settings, tmp_path: Any) -> None:
    folder = tmp_path / "redis"
    server: RedisService = start_redis(folder)
    quick = {"lease_s": 4.0, "renew_s": 0.5, "reap_s": 0.3, "reap_grace_s": 1.0, "worker_ttl_s": 3.0}
    settings = Settings.load(
        **{
            name: getattr(farm_settings, name)
            for name in ("s3_endpoint_url", "s3_bucket", "s3_access_key", "s3_secret_key")
        },
        redis_url=server.url,
        **quick,
    )
    farm = TestFarm(settings, tmp_path)
    try:
        for _ in range(2):
            farm.start().ready()
        ids = farm.submit(*[farm.spec(steps=30, step_s=0.02) for _ in range(40)])
        wait_until(lambda: farm.commits().total() >= 5)
        server.kill()
        server = start_redis(folder, port=server.port)
        assert farm.all_ended(ids, within_s=120) == {DONE: 40}
        for worker in farm.workers:
            fatal = [line for line in worker.lines if line.get("level") == "critical"]
            assert worker.popen.poll() is None, fatal
        # A second's appends may be lost with the server (everysec), so a commit may be made again; never
        # shown twice.
        shown = Counter(key for i in ids for key in (farm.job(i).result or {})["files"].values())
        assert set(shown.values()) == {1}
    finally:
        farm.end()
        server.kill()


# All of it at once


def test_200_jobs_on_two_workers_survive_a_kill_each_committed_once(farm: TestFarm) -> None:
    doomed, steady = farm.start(), farm.start()
    doomed.ready()
    steady.ready()
    ids = farm.submit(*[farm.spec(steps=10, step_s=0.01) for _ in range(200)])
    wait_until(lambda: farm.commits().total() >= 60)
    doomed.kill_group()
    farm.start().ready()
    assert farm.all_ended(ids) == {DONE: 200}
    assert set(farm.commits().values()) == {1}
    tokens = {i: {k.split("/")[2] for k in (farm.job(i).result or {})["files"].values()} for i in ids}
    assert all(len(of_one) == 1 for of_one in tokens.values())
    assert all(tokens[i] == {str(farm.job(i).token)} for i in ids)


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGHUP, signal.SIGINT])
def test_other_signals_stop_the_worker_as_sigterm_does(farm: TestFarm, number: signal.Signals) -> None:
    worker = farm.start(grace_s=30).ready()
    (job_id,) = farm.submit(farm.spec(steps=60, step_s=0.02))
    farm.stepping(job_id)
    os.killpg(worker.popen.pid, number)
    assert worker.wait() == 0
    assert farm.job(job_id).state is DONE
