"""Noise that is a Brownian path over sigma, for samplers of stochastic differential equations.

The noise of a step is the path's increment over it, so the noise of two half steps adds up to that of the
whole step, and other numbers of steps follow the same path. `torchsde` draws it (Li et al. 2020, "Scalable
Gradients for Stochastic Differential Equations": the virtual Brownian tree): a value depends on the seed, on
the ends and on the place asked, not on what was asked before.
"""

from __future__ import annotations

from typing import Final

import torch
import torchsde
from torch import Tensor

TOLERANCE: Final = 1e-6
DIGITS: Final = 6
"""Decimal places to which the tree then resolves sigma; its ends too."""


class BrownianPath:
    """A path over [low, high], drawn on the CPU in float32: on every device the same.

    Args:
        like: [1, C, h, w]; its shape, device and dtype are the noise's.
        low: the least sigma that is asked for, above 0.
        high: the greatest.
        seed: 0 or more. All of its bits count, unlike those of the CPU's generator: it goes into a hash.

    """

    def __init__(self, like: Tensor, low: Tensor, high: Tensor, seed: int) -> None:
        self._device, self._dtype = like.device, like.dtype
        ends = float(low), float(high)
        self._low, self._high = (round(end, DIGITS) for end in ends)
        self._tree = torchsde.BrownianTree(
            t0=ends[0], w0=torch.zeros(like.shape), t1=ends[1], entropy=seed, tol=TOLERANCE
        )

    def __call__(self, sigma: Tensor, target: Tensor) -> Tensor:
        """`(W(target) - W(sigma)) / sqrt(|target - sigma|)`: standard normal; the sigmas must differ."""
        start, end = sorted(self._inside(level) for level in (sigma, target))
        increment: Tensor = self._tree(start, end) * (1 if sigma < target else -1)
        return increment.to(self._device, self._dtype) / (target - sigma).abs().sqrt()

    def _inside(self, level: Tensor) -> float:
        """An end of the path may have been rounded inwards: beyond it the path stands still."""
        return min(max(float(level), self._low), self._high)
