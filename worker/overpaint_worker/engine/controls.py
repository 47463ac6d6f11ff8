"""ControlNets in a pass: which act on which row, and what they add up to.

A ControlNet acts on a job between two noise levels, on its positive and its negative row alike. In a pass
each net runs once, on the rows that it acts on; all other rows get zeros, which change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from overpaint_worker.engine.families import Residuals

if TYPE_CHECKING:
    from overpaint_worker.engine.families import Model
    from overpaint_worker.engine.families.controlnet import ControlNet
    from overpaint_worker.engine.rows import Row, RowBuffers


@dataclass(frozen=True, eq=False, slots=True)
class Control:
    """A ControlNet at work on one job."""

    net: ControlNet
    hint: Tensor
    """[1, 3, 8 h, 8 w] on the model's device, as it is: a hint is never scaled to -1..1."""
    strength: float
    """Factor on all that it adds."""
    first: float
    """The noisiest sigma at which it acts."""
    last: float
    """The least noisy one."""

    def acts_at(self, sigma: Tensor) -> bool:
        """Whether it acts at this noise level; both ends count."""
        return self.strength != 0 and self.last <= float(sigma) <= self.first


@dataclass(frozen=True, eq=False, slots=True)
class _Use:
    """A control of one row of a pass."""

    row: int
    control: Control


def residuals(
    model: Model, rows: Sequence[Row], inputs: RowBuffers, sizes: Sequence[int]
) -> Residuals | None:
    """What the rows' ControlNets add to this pass; None where none acts.

    `inputs` holds the rows; `sizes` are the numbers of rows, rising, that a net is run with: its rows are
    padded to the smallest that holds them, and taken in parts of the largest.
    """
    uses = [_Use(i, control) for i, row in enumerate(rows) for control in row.controls]
    if not uses:
        return None
    found: dict[_Use, Residuals] = {}
    for chunk in _chunks(uses, sizes[-1]):
        size = next(size for size in sizes if size >= len(chunk))
        result = _run(model, chunk, inputs, size)
        found.update((use, result.row(i)) for i, use in enumerate(chunk))
    return _summed(uses, found, inputs.bucket)


def _chunks(uses: Sequence[_Use], largest: int) -> Iterator[list[_Use]]:
    """The uses net by net, at most `largest` at once."""
    by_net: dict[int, list[_Use]] = {}
    for use in uses:
        by_net.setdefault(id(use.control.net), []).append(use)
    for same in by_net.values():
        for start in range(0, len(same), largest):
            yield same[start : start + largest]


def _run(model: Model, uses: Sequence[_Use], inputs: RowBuffers, size: int) -> Residuals:
    """One net on its rows, padded to `size` with the first of them."""
    padded = [*uses, *[uses[0]] * (size - len(uses))]
    rows = [use.row for use in padded]
    places = torch.tensor(rows, device=inputs.x.device)
    return model.control(
        uses[0].control.net,
        inputs.x[places],
        inputs.sigma[rows],
        {name: tensor[places] for name, tensor in inputs.conditioning.items()},
        torch.cat([use.control.hint for use in padded]),
    )


def _summed(uses: Sequence[_Use], found: dict[_Use, Residuals], rows: int) -> Residuals:
    """Row by row, each row's controls in the job's own order: the sum's bits must not depend on company."""
    like = found[uses[0]]
    total = Residuals(tuple(_zeros(t, rows) for t in like.down), _zeros(like.mid, rows))
    for use in uses:
        part = found[use]
        for target, more in zip((*total.down, total.mid), (*part.down, part.mid), strict=True):
            target[use.row] += more[0] * use.control.strength
    return total


def _zeros(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros(rows, *like.shape[1:])
