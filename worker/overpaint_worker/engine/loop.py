"""The step loop: continuous batching of trajectories.

One turn is one forward pass of one group. A job joins at the next turn and leaves when it is done; nobody
waits for anybody else's steps. Whoever was served longest ago leads the next pass, and all that can share it
fill it up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog
import torch
from torch import Tensor

from overpaint_shared.errors import OutOfMemory
from overpaint_worker.engine.controls import residuals
from overpaint_worker.engine.limits import Limits, RowLimits
from overpaint_worker.engine.rows import (
    BUCKETS,
    DETERMINISTIC_ROWS,
    BufferPool,
    Row,
    bucket_of,
    common_tokens,
)
from overpaint_worker.engine.trajectory import Trajectory

log = structlog.get_logger(__name__)

LONGEST_REPEAT: Final = 2
"""Texts share a pass where their common length is at most this many times the longest of them."""

LONGEST_MEETING: Final = 77 * 128
"""Tokens at which texts of different lengths still meet; those of 127 and 128 blocks would at a million."""


@dataclass(slots=True)
class Turn:
    """What one turn did."""

    served: list[Trajectory] = field(default_factory=list)
    finished: list[Trajectory] = field(default_factory=list)
    failed: list[tuple[Trajectory, Exception]] = field(default_factory=list)
    rows: int = 0
    """Rows evaluated, padding not counted."""
    passes: int = 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)  # the CPU's allocator raises a plain RuntimeError
    if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)  # a loader gave it other words


class Loop:
    """The trajectories in flight. For one thread. `clock`: seconds, for the speed curve."""

    def __init__(
        self, limits: Limits | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.limits: Limits = limits or RowLimits()
        self.live: deque[Trajectory] = deque()
        """Served longest ago first."""
        self.turns = 0
        self._clock = clock
        self._buffers = BufferPool()
        self._ceilings: dict[Hashable, int] = {}

    def add(self, trajectory: Trajectory) -> None:
        """It takes part from the next turn on."""
        self.live.append(trajectory)

    def remove(self, trajectory: Trajectory) -> None:
        """It leaves at once; between turns only."""
        self.live.remove(trajectory)
        trajectory.close()

    def group(self) -> list[Trajectory]:
        """Who would share the next pass: the one served longest ago, and what fits with it, in that order."""
        if not self.live:
            return []
        head = self.live[0]
        limit, rows, lengths = self._row_limit(head), 0, list[int]()
        chosen: list[Trajectory] = []
        for other in self.live:
            fits = rows + other.row_count <= limit and _may_meet([*lengths, other.tokens])
            if other.key == head.key and (other is head or fits):
                chosen.append(other)
                lengths.append(other.tokens)
                rows += other.row_count
        return chosen

    def _row_limit(self, head: Trajectory) -> int:
        wanted = DETERMINISTIC_ROWS if head.deterministic else self.limits.rows(head.curve)
        return min(wanted, self._ceilings.get(head.curve, wanted))

    def turn(self, group: list[Trajectory] | None = None) -> Turn:
        """Evaluate `group` (as `group` has just returned it) and advance each of its trajectories."""
        turn = Turn(served=self.group() if group is None else group)
        if not turn.served:
            return turn
        self.turns += 1
        for trajectory, outcome in zip(turn.served, self._evaluate(turn), strict=True):
            self.live.remove(trajectory)
            self._advance(trajectory, outcome, turn)
        return turn

    def _advance(self, trajectory: Trajectory, outcome: Tensor | Exception, turn: Turn) -> None:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            trajectory.advance(outcome, len(turn.served))
        except Exception as error:
            trajectory.close()
            turn.failed.append((trajectory, error))
            return
        if trajectory.want is None:
            turn.finished.append(trajectory)
        else:
            self.live.append(trajectory)

    def _evaluate(self, turn: Turn) -> list[Tensor | Exception]:
        """For each trajectory its denoised rows, or what went wrong with it alone."""
        group = turn.served
        try:
            return list(self._pass(group, turn))
        except Exception as error:
            if len(group) == 1:
                return [error]
            log.warning(
                "pass failed, each job alone", action="split_jobs", jobs=len(group), error=repr(error)
            )
        outcomes: list[Tensor | Exception] = []
        for trajectory in group:
            try:
                outcomes += self._pass([trajectory], turn)
            except Exception as error:
                outcomes.append(error)
        return outcomes

    def _pass(self, group: Sequence[Trajectory], turn: Turn) -> Sequence[Tensor]:
        rows = [row for trajectory in group for row in trajectory.rows()]
        denoised = self._denoise(group, rows, turn)
        return torch.split(denoised, [trajectory.row_count for trajectory in group])

    def _denoise(self, group: Sequence[Trajectory], rows: Sequence[Row], turn: Turn) -> Tensor:
        """The rows' denoised latents; in several passes if there is not the memory for one."""
        head = group[0]
        limit = self._row_limit(head)
        if len(rows) > limit:
            return self._in_parts(group, rows, limit, turn)
        if not _can_meet([row.conditioning.tokens for row in rows]):
            return self._in_parts(group, rows, 1, turn)
        bucket = limit if head.deterministic else bucket_of(len(rows))
        try:
            return self._run(head, rows, bucket, turn)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._make_room(group, bucket, error)
        return self._denoise(group, rows, turn)

    def _in_parts(self, group: Sequence[Trajectory], rows: Sequence[Row], size: int, turn: Turn) -> Tensor:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return torch.cat([self._denoise(group, part, turn) for part in parts])

    def _run(self, head: Trajectory, rows: Sequence[Row], bucket: int, turn: Turn) -> Tensor:
        """One forward pass, timed."""
        inputs = self._buffers.get(rows, bucket)
        sizes = [bucket] if head.deterministic else [size for size in BUCKETS if size <= bucket]
        added = residuals(head.model, rows, inputs, sizes)
        if added is not None:
            _wait_for(head.model.device)  # the curve is the denoiser's own: who brings a ControlNet is chance
        began = self._clock()
        denoised = head.model.denoise(inputs.x, inputs.sigma, inputs.conditioning, added, inputs.extra)
        _wait_for(head.model.device)
        if not head.deterministic:
            more = sum(t.row_count for t in self.live if t.key == head.key) > len(rows)
            self.limits.record(head.curve, bucket, self._clock() - began, more_waiting=more)
        turn.rows += len(rows)
        turn.passes += 1
        return denoised[: len(rows)]

    def _make_room(self, group: Sequence[Trajectory], bucket: int, error: Exception) -> None:
        """Halve the rows of this curve for good, and say so. Raises `OutOfMemory` if one row is too many."""
        head = group[0]
        self._ceilings[head.curve] = max(bucket // 2, 1)
        self.limits.out_of_memory(head.curve, bucket)
        self._buffers.clear()
        if head.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if bucket == 1:
            raise OutOfMemory(
                f"the device has too little memory for one row of {tuple(head.z0.shape[1:])}",
                fix="use a device with more memory, or a smaller picture",
            ) from error
        note = f"memory ran out in a pass of {bucket} rows: it was split"
        log.warning(note, action="split_rows", bucket=bucket, jobs=[t.job for t in group])
        for trajectory in group:
            if note not in trajectory.adjustments:
                trajectory.adjustments.append(note)


def _may_meet(lengths: Sequence[int]) -> bool:
    return common_tokens(lengths) <= LONGEST_REPEAT * max(lengths) and _can_meet(lengths)


def _can_meet(lengths: Sequence[int]) -> bool:
    return len(set(lengths)) == 1 or common_tokens(lengths) <= LONGEST_MEETING


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
