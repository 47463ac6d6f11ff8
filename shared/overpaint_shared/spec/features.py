"""What a worker must be able to do to render a spec, as names that workers announce."""

import re
from typing import TYPE_CHECKING, Final

from overpaint_shared.spec.masks import CombinedMask, leaves
from overpaint_shared.spec.output import OnlyMasked
from overpaint_shared.spec.sampling import SAMPLERS, SCHEDULERS

if TYPE_CHECKING:
    from overpaint_shared.job import JobSpec

_OPENED = re.compile(r"(?<!\\)\(")
_CLOSED = re.compile(r"(?<!\\)\)")

FEATURES: Final = frozenset(
    [f"sampler:{name}" for name in SAMPLERS]
    + [f"scheduler:{name}" for name in SCHEDULERS]
    + [
        "method:img2img",
        "method:vae_encode_inpaint",
        "method:latent_noise_mask",
        "method:controlnet_inpaint",
        "method:inpaint_model",
        "mask:image",
        "mask:alpha",
        "mask:pad",
        "mask:clipseg",
        "mask:combine",
        "lora",
        "controls",
        "vae",
        "clip_skip",
        "guidance",
        "differential",
        "region:only_masked",
        "finish",
        "preserve",
        "prompt:weights",
    ]
)
"""Every feature of version 1. A worker announces those that it has."""


def features(spec: "JobSpec") -> frozenset[str]:
    """What this spec needs. A sampler or scheduler left to the model's defaults is not yet among it."""
    needs = {f"method:{spec.method.kind}"} | _mask_features(spec)
    if spec.sampling.sampler:
        needs.add(f"sampler:{spec.sampling.sampler}")
    if spec.sampling.scheduler:
        needs.add(f"scheduler:{spec.sampling.scheduler}")
    wanted = {
        "lora": bool(spec.loras),
        "controls": bool(spec.controls),
        "vae": spec.vae is not None,
        "clip_skip": spec.clip_skip > 0,
        "guidance": spec.sampling.guidance is not None,
        "differential": spec.sampling.differential,
        "region:only_masked": isinstance(spec.region, OnlyMasked),
        "finish": bool(spec.finish),
        "preserve": spec.preserve is not None,
        "prompt:weights": has_weights(spec.prompt) or has_weights(spec.negative_prompt),
    }
    return frozenset(needs | {name for name, is_wanted in wanted.items() if is_wanted})


def has_weights(prompt: str) -> bool:
    r"""Whether the prompt holds parentheses that mean a weight: `(hat:1.3)`, `(hat)`; `\(` is a plain one."""
    opened = _OPENED.search(prompt)
    return opened is not None and _CLOSED.search(prompt, opened.end()) is not None


def _mask_features(spec: "JobSpec") -> set[str]:
    if spec.mask is None:
        return set()
    sources = {f"mask:{mask.from_}" for _, mask in leaves(spec.mask)}
    return sources | ({"mask:combine"} if isinstance(spec.mask, CombinedMask) else set())
