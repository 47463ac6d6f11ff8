"""How the noise is drawn and taken away."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from overpaint_shared.spec.fields import LARGEST_SEED, Part, Side, value_error

SamplerName = Literal[
    "euler",
    "euler_ancestral",
    "heun",
    "heunpp2",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "ddpm",
    "lcm",
    "ipndm",
    "ipndm_v",
    "deis",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
]
SchedulerName = Literal[
    "normal",
    "karras",
    "exponential",
    "sgm_uniform",
    "simple",
    "ddim_uniform",
    "beta",
    "linear_quadratic",
    "kl_optimal",
]
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)

Steps = Annotated[int, Field(ge=1, le=10_000)]
Cfg = Annotated[float, Field(ge=0, le=100)]


def _seed_as_int(seed: Any) -> Any:
    """A decimal string, for languages whose numbers cannot hold 64 bits, becomes the integer it writes."""
    if not isinstance(seed, str):
        return seed
    if not re.fullmatch(r"[0-9]{1,20}", seed):
        raise value_error(
            "is not a decimal number", allowed=f"0 to {LARGEST_SEED}, a number or the same in quotes, or null"
        )
    return int(seed)


_SEED_IN_SCHEMA = (
    Annotated[int, Field(ge=0, le=LARGEST_SEED)] | Annotated[str, Field(pattern="^[0-9]{1,20}$")]
)
Seed = Annotated[
    int, Field(ge=0, le=LARGEST_SEED), BeforeValidator(_seed_as_int, json_schema_input_type=_SEED_IN_SCHEMA)
]


class ModelDefaults(Part):
    """What a model's registry entry says for a spec that leaves it out."""

    steps: Steps = Field(20, description="Steps, 1 to 10000.")
    cfg: Cfg = Field(8.0, description="Classifier-free guidance, 0 to 100.")
    sampler: SamplerName = Field("euler", description="Sampler.")
    scheduler: SchedulerName = Field("normal", description="Schedule of the noise levels.")
    size: Side = Field(512, description="The side that the model was trained at, pixels, 1 to 16384.")


class Sampling(Part):
    """How the noise is drawn and taken away. What is left out takes the model's defaults."""

    seed: Seed | None = Field(
        None,
        description="Seed of the noise: 0 to 18446744073709551615, a number or the same in quotes; "
        "null or absent: drawn at submit and stored.",
    )
    steps: Steps | None = Field(
        None, description="Evaluations of the schedule, 1 to 10000; absent: the model's default."
    )
    cfg: Cfg | None = Field(
        None,
        description="Classifier-free guidance, 0 to 100; 1 halves the work; absent: the model's default.",
    )
    guidance: Cfg | None = Field(
        None, description="Guidance that distilled models take as an input, 0 to 100; null: the model's own."
    )
    sampler: SamplerName | None = Field(None, description="Sampler; absent: the model's default.")
    scheduler: SchedulerName | None = Field(None, description="Noise schedule; absent: the model's default.")
    denoise: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="How much is painted anew, 0.01 to 1; absent: 0.6 for img2img, 0.8 for "
        "latent_noise_mask, 1 for the others.",
    )
    differential: bool = Field(
        False,
        description="Differential diffusion: a soft mask says from which step on each place is repainted.",
    )
    deterministic: bool = Field(
        False, description="The same bits whatever else the device renders at the same time; a little slower."
    )
