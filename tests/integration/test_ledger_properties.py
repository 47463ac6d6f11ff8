"""The ledger under random interleavings of two workers, a reaper, a canceller and bad luck, on a real Redis.

Messages travel through the real lists: they are lost, doubled and taken in any order. After every step the
indexes agree with the records, and nobody exceeds the window; at the end everything that was submitted ends.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import redis
from celery import Celery
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from overpaint_shared.errors import OverpaintError
from overpaint_shared.ledger import (
    LEASED,
    LIVE,
    MOVES,
    REPLAYABLE,
    Beat,
    Cancelled,
    Done,
    Failed,
    JobRecord,
    JobState,
    Ledger,
    Outcome,
    ReleaseReason,
    Wakeup,
)
from overpaint_shared.ledger.ledger import MEMORY_REST_S
from overpaint_shared.ledger.scripts import PRIORITY_CLASSES
from overpaint_shared.queues import list_name, make_app, publish
from tests.integration.ledgers import Books, expire_lease, job, ledger, reaper, worker

WINDOW = 2
JOBS = 5  # few, so that attempts at the same job meet
WORKERS = ("w1", "w2")
MODELS = ("sd15", "sdxl")
FEATURES = {"w1": frozenset({"lora"}), "w2": frozenset({"lora", "vae"})}
ENDS: tuple[Outcome | ReleaseReason, ...] = (
    Done({"image.png": "k"}),
    Failed({"code": "input", "message": "torn"}),
    Cancelled(),
    *ReleaseReason,
)
numbers = st.integers(0, JOBS - 1)
newest = st.sampled_from([1, 0, 2, 3])  # attempts, counted back; stale ones first
submissions = st.fixed_dictionaries(
    {
        "owner": st.sampled_from(["ann", "ann", "ann", "bob"]),
        "model": st.sampled_from(["sd15", "sd15", "sd15", "sdxl"]),
        "priority": st.sampled_from([5, 5, 5, 0, 9]),
        "features": st.sampled_from([frozenset(), frozenset({"lora"}), frozenset({"vae"})]),
        "token": st.sampled_from([None, None, "t1", "t2"]),
        "deadline_s": st.sampled_from([None, None, 3600.0]),
    }
)


@dataclass(frozen=True)
class Attempt:
    """A claim that there once was; most are stale."""

    job: str
    worker: str
    token: int


class Farm(RuleBasedStateMachine):
    """What producers, workers, the reaper and bad luck may do, in any order."""

    client: redis.Redis
    app: Celery
    books: Ledger
    reaper: Ledger
    hasty: Ledger
    """A reaper to whom every job has waited too long."""

    def __init__(self) -> None:
        super().__init__()
        self.client.flushdb()
        self.listener = self.client.pubsub(ignore_subscribe_messages=True)
        self.listener.psubscribe("op:events:*")
        self.submitted: list[str] = []
        self.cancels_left = 2
        self.attempts: list[Attempt] = []
        self.committed: dict[str, int] = defaultdict(int)
        self.short: dict[tuple[str, str], float] = {}  # when a worker had no memory for a job

    @initialize(jobs=st.lists(submissions, min_size=2, max_size=JOBS - 1))
    def the_farm_opens(self, jobs) -> None:
        for name in WORKERS:
            self.books.announce(worker(name, *MODELS, features=FEATURES[name]))
        for values in jobs:
            self.submit(values, lost=False)

    def publish(self, wakeups: Iterable[Wakeup], *, lost: bool = False) -> None:
        if not lost:
            publish(self.app, wakeups)

    # Producers

    @precondition(lambda farm: len(farm.submitted) < JOBS)
    @rule(values=submissions, lost=st.booleans())
    def submit(self, values, *, lost: bool) -> None:
        name = f"j{len(self.submitted)}"
        (answer,) = self.books.submit([job(name, **values)])
        if answer.created:
            assert answer.id == name
            self.submitted.append(name)
        else:
            assert values["token"]
            assert answer.id in self.submitted
        self.publish(answer.wakeups, lost=lost)

    @precondition(lambda farm: farm.cancels_left)  # else most jobs end so, and little else is tried
    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        self.cancels_left -= 1
        name = self.submitted[number % len(self.submitted)]
        before, answer = self.state(name), self.books.cancel(name)
        expected = {JobState.QUEUED: JobState.CANCELLED, JobState.RUNNING: JobState.CANCELLING}
        assert answer.state is expected.get(before, before)
        self.publish(answer.wakeups)

    @rule(number=numbers)
    def replay(self, number: int) -> None:
        name = self.submitted[number % len(self.submitted)]
        before = self.state(name)
        try:
            self.publish(self.books.replay(name))
        except OverpaintError:
            assert before not in REPLAYABLE
        else:
            assert self.state(name) is JobState.QUEUED
            if before in REPLAYABLE:
                self.short = {key: at for key, at in self.short.items() if key[0] != name}

    # Workers

    @rule(
        who=st.sampled_from(WORKERS),
        model=st.sampled_from(["sd15", "sd15", "sdxl"]),
        fate=st.sampled_from(["arrives", "arrives", "arrives", "is doubled", "is lost"]),
    )
    def take_a_message(self, who: str, model: str, fate: str) -> None:
        """As a worker does: the next message, and the next again where there was nothing to do."""
        while (name := self.pop(model)) is not None and fate != "is lost":
            granted = self.claim(name, who)
            if fate == "is doubled":
                self.claim(name, who)
            if granted:
                return

    @rule(who=st.sampled_from(WORKERS), number=numbers)
    def take_a_stray_message(self, who: str, number: int) -> None:
        queued = [name for name in self.submitted if self.state(name) is JobState.QUEUED]
        names = queued or self.submitted
        self.claim(names[number % len(names)], who)

    def claim(self, name: str, who: str) -> bool:
        before = self.record(name)
        answer = self.books.claim(name, who, FEATURES[who], MODELS)
        self.publish(answer.wakeups)
        able = before.features <= FEATURES[who] and who not in before.excluded
        able = able and not self.rests(name, who)
        assert (answer.verdict == "ok") == (before.state is JobState.QUEUED and able)
        if answer.verdict == "ok":
            assert answer.token > max((attempt.token for attempt in self.attempts), default=0)
            self.attempts.append(Attempt(name, who, answer.token))
        return answer.verdict == "ok"

    def rests(self, name: str, who: str) -> bool:
        """Whether a worker that had too little memory for a job is not asked for it yet."""
        return time.monotonic() < self.short.get((name, who), -MEMORY_REST_S) + MEMORY_REST_S

    @precondition(lambda farm: farm.attempts)
    @rule(back=newest, step=st.integers(0, 3))
    def renew(self, back: int, step: int) -> None:
        attempt = self.attempt(back)
        expected = "lost"
        if self.is_current(attempt):
            expected = "ok" if self.state(attempt.job) is JobState.RUNNING else "cancel"
        beat = Beat(attempt.job, attempt.token, "denoise", step, 3)
        assert self.books.renew(attempt.worker, [beat]) == {attempt.job: expected}

    @precondition(lambda farm: farm.attempts)
    @rule(back=newest, end=st.sampled_from(ENDS), twice=st.booleans())
    def end_an_attempt(self, back: int, end: Outcome | ReleaseReason, *, twice: bool) -> None:
        attempt = self.attempt(back)
        for _ in range(1 + twice):  # twice: the first answer was lost
            if isinstance(end, ReleaseReason):
                self.release(attempt, end)
            else:
                self.finish(attempt, end)

    def finish(self, attempt: Attempt, outcome: Outcome) -> None:
        before, current = self.record(attempt.job), self.is_current(attempt)
        answer = self.books.finish(attempt.job, attempt.token, outcome)
        if before.state in LIVE:
            assert answer.accepted == current
            self.committed[attempt.job] += answer.accepted and isinstance(outcome, Done)
        elif answer.accepted:  # the same call again
            assert before.token == attempt.token
        self.publish(answer.wakeups)

    def release(self, attempt: Attempt, reason: ReleaseReason) -> None:
        before, current = self.state(attempt.job), self.is_current(attempt)
        answer = self.books.release(attempt.job, attempt.token, reason)
        assert current or answer.state is before
        if current and before is JobState.RUNNING and reason is ReleaseReason.NO_MEMORY:
            self.short[attempt.job, attempt.worker] = time.monotonic()
        self.publish(answer.wakeups)

    # The reaper, time and bad luck

    @precondition(lambda farm: farm.attempts)
    @rule(back=newest, lost=st.booleans())
    def a_worker_is_lost(self, back: int, *, lost: bool) -> None:
        expire_lease(self.client, self.attempt(back).job)
        self.publish(self.reaper.reap().wakeups, lost=lost)

    @rule(lost=st.booleans(), hasty=st.booleans())
    def reap(self, *, lost: bool, hasty: bool) -> None:
        reaped = (self.hasty if hasty else self.reaper).reap()
        assert not reaped.holding
        self.publish(reaped.wakeups, lost=lost)

    def attempt(self, back: int) -> Attempt:
        """One of the newest attempts."""
        return self.attempts[-1 - back % len(self.attempts)]

    def pop(self, model: str) -> str | None:
        """The job of the next message, as BRPOP would take it."""
        for priority in PRIORITY_CLASSES:
            if raw := self.client.rpop(list_name(model, priority)):
                return str(json.loads(raw)["headers"]["id"])
        return None

    # What must hold

    def record(self, name: str) -> JobRecord:
        record = self.books.job(name)
        assert record is not None
        return record

    def state(self, name: str) -> JobState:
        return self.record(name).state

    def is_current(self, attempt: Attempt) -> bool:
        record = self.record(attempt.job)
        return record.token == attempt.token and record.state in LEASED

    @invariant()
    def the_books_agree(self) -> None:
        Books(self.client).check(WINDOW)

    @invariant()
    def nothing_is_committed_twice(self) -> None:
        assert all(count <= 1 for count in self.committed.values())

    def teardown(self) -> None:
        try:
            self.everything_ends()
            self.only_legal_moves_were_published()
        finally:
            self.listener.close()

    def everything_ends(self) -> None:
        """With a worker that can do all, every job that is not over is rendered."""
        for _ in range(3 * len(self.submitted) + 3):
            open_jobs = [name for name in self.submitted if self.state(name) in LIVE]
            if not open_jobs:
                return
            for name in open_jobs:
                expire_lease(self.client, name)
            self.publish(self.reaper.reap().wakeups)
            for model in MODELS:
                while (name := self.pop(model)) is not None:
                    self.render(name)
        raise AssertionError(f"these were lost: {open_jobs}")

    def render(self, name: str) -> None:
        claim = self.books.claim(name, "w3")
        self.publish(claim.wakeups)
        if claim.verdict == "ok":
            assert self.books.finish(name, claim.token, Done({})).accepted

    def only_legal_moves_were_published(self) -> None:
        self.client.publish("op:events:end", "end")
        states: dict[str, JobState] = {}
        while (message := self.listener.get_message(timeout=10)) is None or message["data"] != b"end":
            if message is not None:
                event = json.loads(message["data"])
                before, now = states.get(event["job"]), JobState(event["state"])
                if "stage" in event:
                    assert now is before  # progress
                else:
                    assert now in MOVES[before] if before else now is JobState.QUEUED, (before, now)
                states[event["job"]] = now
        assert states == {name: self.state(name) for name in self.submitted}  # every move was published


def test_no_interleaving_loses_a_job_commits_it_twice_or_puts_it_in_two_places(
    redis_url: str, redis_client: redis.Redis
):
    limits = {"window": WINDOW, "max_crashes": 1, "max_lost_hosts": 1}
    Farm.client, Farm.app = redis_client, make_app(redis_url)
    Farm.books = ledger(redis_url, **limits)
    Farm.reaper = reaper(redis_url, unable_after_s=3600.0, **limits)
    Farm.hasty = reaper(redis_url, unable_after_s=3600.0, age_s=0.0, **limits)
    try:
        run_state_machine_as_test(
            Farm,
            settings=settings(
                max_examples=50,
                stateful_step_count=50,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    finally:
        Farm.app.close()
