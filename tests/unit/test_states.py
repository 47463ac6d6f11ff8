"""The table of states: what design says, said once more."""

import pytest

from overpaint_shared.ledger.states import LIVE, MOVES, REPLAYABLE, TERMINAL, JobState, is_legal

S = JobState


def test_every_state_has_its_row_and_is_live_or_terminal():
    assert set(MOVES) == set(JobState)
    assert set(JobState) == LIVE | TERMINAL
    assert not LIVE & TERMINAL


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(S.QUEUED, S.DONE, id="done without having run"),
        pytest.param(S.QUEUED, S.CANCELLING, id="a queued job has nobody to confirm its cancel"),
        pytest.param(S.CANCELLING, S.QUEUED, id="a cancelled job comes back to life"),
        pytest.param(S.CANCELLING, S.RUNNING, id="a cancel is forgotten"),
        pytest.param(S.DONE, S.QUEUED, id="a result is rendered again"),
        pytest.param(S.CANCELLED, S.QUEUED, id="a cancelled job is replayed"),
        pytest.param(S.RUNNING, S.RUNNING, id="a job is taken while it runs"),
    ],
)
def test_moves_that_must_never_be(before: JobState, after: JobState):
    assert not is_legal(before, after)


def test_only_failed_and_dead_jobs_leave_an_end_and_only_to_the_queue():
    leaving = {state: MOVES[state] for state in TERMINAL if MOVES[state]}
    assert leaving == dict.fromkeys(REPLAYABLE, frozenset({S.QUEUED}))


def test_every_state_can_be_reached_and_every_live_one_can_end():
    reached, edge = {S.QUEUED}, {S.QUEUED}
    while edge := {after for state in edge for after in MOVES[state]} - reached:
        reached |= edge
    assert reached == set(JobState)
    for state in LIVE:
        assert MOVES[state] & TERMINAL
