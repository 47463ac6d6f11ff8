"""A denoiser whose answer is known, and a way to run a sampler on it by hand.

The data are normal with a mean and a deviation. Their best denoiser is linear in the latent, and the flow
from noise to data has a closed form.
"""

import torch

from overpaint_worker.engine.sampler import SAMPLERS

DEVIATION = 0.7


def best(x, sigma, mean=0.0):
    """The denoised latent."""
    return mean + (x - mean) * share(sigma)


def share(sigma):
    """How much of a latent's distance to the mean its denoised latent keeps."""
    return DEVIATION**2 / (DEVIATION**2 + sigma**2)


def drive(name, x, sigmas, noise=None, denoiser=best):
    """Run a sampler to its end; what it asked for, and its result."""
    sampler = SAMPLERS[name].begin(x, sigmas, noise or torch.zeros_like)
    asked = []
    try:
        want = next(sampler)
        while True:
            asked.append(want)
            want = sampler.send(denoiser(want.x, want.sigma))
    except StopIteration as end:
        return asked, end.value


def start_at(sigma, dtype=torch.float64):
    """A latent of four known values at a level."""
    return torch.tensor([1.0, -0.4, 2.0, 0.1], dtype=dtype).view(1, 1, 2, 2) * sigma
