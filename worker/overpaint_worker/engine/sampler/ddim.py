"""DDIM, eta 0 (Song et al. 2020, "Denoising Diffusion Implicit Models").

In sigma its step is Euler's (Karras et al. 2022). As in the reference, what a
mask spares is noised with noise of its own, of the next seed.
"""

from __future__ import annotations

from overpaint_worker.engine.sampler.base import SamplerKind
from overpaint_worker.engine.sampler.euler import euler

KIND = SamplerKind("ddim", euler, fresh_blend=True)
