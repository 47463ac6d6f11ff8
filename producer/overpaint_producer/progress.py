"""Jobs as they run: bars on a terminal, plain lines elsewhere. Both are fed the same events."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from overpaint_producer.pace import Pace, clock, speed
from overpaint_shared.errors import visible
from overpaint_shared.ledger.records import Event
from overpaint_shared.ledger.states import TERMINAL, JobState

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.progress import Progress, TaskID

FEW = 8
"""Up to so many jobs each have lines of their own where there is no terminal."""
SUMMARY_EVERY_S = 5.0
TENTHS = 10


class Display(Protocol):
    """Shows events while its context is open."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...

    def show(self, event: Event) -> None:
        """Something happened to a job."""


Title = Callable[[str], str | None]
"""Words for people about a job, by its id; asked only for jobs that have a bar of their own."""


def display(ids: Sequence[str], title: Title, stream: TextIO | None = None) -> Display:
    """Bars if `stream` (default: standard error) is a terminal, else lines."""
    stream = stream or sys.stderr
    return Bars(ids, title) if stream.isatty() else Lines(ids, stream)


class Tally:
    """How many of some jobs are in which state, and how fast they end.

    Time is the events' own: they may come in a rush, after an outage or at the beginning.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.states = dict.fromkeys(ids, JobState.QUEUED)
        self._counts = Counter(self.states.values())
        self._pace = Pace()

    @property
    def ended(self) -> int:
        """Jobs that have ended, however that was."""
        return sum(self._counts[state] for state in TERMINAL)

    def tell(self, event: Event) -> bool:
        """Take an event in; whether the job's state changed."""
        before = self.states.get(event.job_id)
        changed = before is not event.state
        if changed:
            self._counts[event.state] += 1
            if before is not None:
                self._counts[before] -= 1
        self.states[event.job_id] = event.state
        if changed and event.state in TERMINAL and event.at:
            self._pace.tell(event.at, self.ended, len(self.states))
        return changed

    def counts(self) -> str:
        """`3 done, 1 failed, 2 running, 7 waiting`: only what is there."""
        count = self._counts
        words = {JobState.QUEUED: "waiting"}
        order = (
            JobState.DONE,
            JobState.FAILED,
            JobState.DEAD,
            JobState.CANCELLED,
            JobState.CANCELLING,
            JobState.RUNNING,
            JobState.QUEUED,
        )
        return ", ".join(f"{count[state]} {words.get(state, state)}" for state in order if count[state])

    def speed(self) -> tuple[str, str]:
        """(jobs per second, time left) in words."""
        return speed(self._pace.rate(), "job"), clock(self._pace.left_s())


class Lines:
    """A line for each change of a few jobs, or a summary now and then for many. A failure always has its
    line.
    """

    def __init__(self, ids: Sequence[str], stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._now = now
        self._tally = Tally(ids)
        self._said: dict[str, tuple[object, ...]] = {}
        self._next_summary = now() + SUMMARY_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._tally.states) > FEW:
            self._summary()

    def show(self, event: Event) -> None:
        """Say what changed, a tenth of a job's steps at a time."""
        changed = self._tally.tell(event)
        if len(self._tally.states) <= FEW:
            self._detail(event)
        elif changed and event.state in TERMINAL and event.state is not JobState.DONE:
            self._say(f"{event.job_id} {event.state}")
        elif self._now() >= self._next_summary:
            self._summary()

    def _detail(self, event: Event) -> None:
        tenth = event.step * TENTHS // event.of if event.of else 0
        running = event.state is JobState.RUNNING
        words = (event.state, event.stage, tenth, event.attempt) if running else (event.state,)
        if self._said.get(event.job_id) == words:
            return
        self._said[event.job_id] = words
        steps = f" {event.step}/{event.of}" if event.of and running else ""
        self._say(
            f"{event.job_id} {event.state}{f' {event.stage}' if running and event.stage else ''}{steps}"
        )

    def _summary(self) -> None:
        self._next_summary = self._now() + SUMMARY_EVERY_S
        rate, left = self._tally.speed()
        total = len(self._tally.states)
        tail = f", {rate}, {left} left" if rate and self._tally.ended < total else ""
        self._say(f"{self._tally.ended}/{total} ended: {self._tally.counts()}{tail}")

    def _say(self, line: str) -> None:
        print(visible(line), file=self._stream, flush=True)


class Bars:
    """A bar for each running job, as many as fit, and one for all where there are several."""

    def __init__(
        self,
        ids: Sequence[str],
        title: Title,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or _progress()
        self._title = title
        self._tally = Tally(ids)
        self._rows: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}
        self._all = self._add("all jobs", total=len(ids)) if len(ids) > 1 else None
        if self._all is None:
            self._row(ids[0])

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Move the job's bar, and the one for all."""
        changed = self._tally.tell(event)
        if self._all is not None:
            if event.state in TERMINAL or event.state is JobState.QUEUED:
                self._drop(event.job_id)
            elif event.job_id in self._rows or len(self._rows) < self._room():
                self._move(event)
            if changed:
                self._move_all(self._all)
        else:
            self._move(event)

    def _room(self) -> int:
        """Rows for jobs: the terminal's height less the line for all, the prompt's, and one to breathe."""
        return max(1, self._progress.console.height - 3)

    def _row(self, job_id: str) -> TaskID:
        if job_id not in self._rows:
            self._rows[job_id] = self._add(self._title(job_id) or job_id, total=None)
        return self._rows[job_id]

    def _add(self, title: str, total: int | None) -> TaskID:
        return self._progress.add_task(visible(title), total=total, what="waiting", rate="", left="")

    def _drop(self, job_id: str) -> None:
        if (row := self._rows.pop(job_id, None)) is not None:
            self._progress.remove_task(row)
            self._paces.pop(job_id, None)

    def _move(self, event: Event) -> None:
        row = self._row(event.job_id)
        if event.state is JobState.RUNNING and event.of:
            rate, left = self._told(event)
            what = f"{event.stage} {event.step}/{event.of}"
            self._progress.update(
                row, total=event.of, completed=event.step, what=visible(what), rate=rate, left=left
            )
            return
        ended, done = event.state in TERMINAL, event.state is JobState.DONE
        what = "waiting" if event.state is JobState.QUEUED else str(event.state)
        if event.state is JobState.RUNNING and event.stage:
            what = visible(event.stage)
        total = 1 if ended else None  # None: the bar moves to and fro
        self._progress.update(row, total=total, completed=int(done), what=what, rate="", left="")

    def _told(self, event: Event) -> tuple[str, str]:
        pace = self._paces.setdefault(event.job_id, Pace())
        if event.at:
            pace.tell(event.at, event.step, event.of)
        return speed(pace.rate(), "step"), clock(pace.left_s())

    def _move_all(self, row: TaskID) -> None:
        rate, left = self._tally.speed()
        left = left if self._tally.ended < len(self._tally.states) else ""
        self._progress.update(
            row, completed=self._tally.ended, what=self._tally.counts(), rate=rate, left=left
        )


def _progress(console: Console | None = None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(template: str, *, justify: JustifyMethod = "left", max_width: int | None = None) -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis", justify=justify, max_width=max_width)
        return TextColumn(
            template, markup=False, table_column=column
        )  # titles come from job files: no markup

    return Progress(
        text("{task.description}", max_width=52),
        BarColumn(bar_width=24),
        text("{task.fields[what]}"),
        text("{task.fields[rate]}"),
        text("{task.fields[left]}", justify="right"),
        console=console or Console(stderr=True, highlight=False),
        transient=False,
    )
