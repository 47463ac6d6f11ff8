"""Whose fault is it? What an exception in the engine means for its job."""

from __future__ import annotations

from typing import Final, Literal

import structlog
import torch

from overpaint_shared.errors import (
    JobError,
    ModelLoadError,
    OutOfMemory,
    OverpaintError,
    PrecisionError,
    SpecError,
    UnsupportedError,
)
from overpaint_worker.engine.loop import is_out_of_memory

log = structlog.get_logger(__name__)

Kind = Literal["job", "device", "unable"]

_UNABLE: Final = (UnsupportedError, ModelLoadError, OutOfMemory)
"""Another worker may: one that has the feature, the weights, or more memory."""


def judge(error: Exception) -> tuple[Kind, OverpaintError]:
    """How a job's failure counts, and the error that is told.

    `job`: its own fault. `unable`: this engine cannot, another may. `device`: something is wrong here. A bug,
    seen as an exception that nobody meant, fails the one job it met, so that it is seen and not repeated for
    ever.
    """
    if isinstance(error, _UNABLE):
        return "unable", error
    if isinstance(error, JobError | SpecError):
        return "job", error
    if isinstance(error, OverpaintError):
        return "device", error
    if is_out_of_memory(error):
        return "unable", OutOfMemory(
            "the device has too little memory for this job",
            fix="use a device with more memory, or a smaller picture",
        )
    if is_broken_device(error):
        return "device", OverpaintError(f"the device failed: {error}")
    log.error("unexpected error in a job", action="job_crashed", exc_info=error)
    return "job", OverpaintError(f"the engine met an unexpected error: {type(error).__name__}: {error}")


def is_broken_device(error: BaseException) -> bool:
    """After such an error nothing works on the device until the process is started anew."""
    return isinstance(error, torch.AcceleratorError)


def all_numbers(latent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The latent that a model made in `dtype`, looked at before a VAE is: it would take values that are none
    for an overflow of its own.

    The same job does it again, so it is not tried again. Raises PrecisionError.
    """
    if bool(torch.isfinite(latent).all()):
        return latent
    computed = str(dtype).removeprefix("torch.")
    fix = "lower `cfg` and the weights of LoRAs and ControlNets; a model all of whose jobs fail so is damaged"
    if dtype == torch.float16:
        fix = f'have an operator write dtype = "bfloat16" or "float32" for the model; else {fix}'
    raise PrecisionError(
        f"the steps left the range of numbers of {computed}, in which this worker computes the model",
        field="model",
        value=computed,
        fix=fix,
    )
