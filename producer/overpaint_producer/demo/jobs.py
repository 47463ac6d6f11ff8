"""The demo's jobs: the cat becomes a dog by every method that the farm's models can do."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint_shared.catalogue import INPAINT_CHANNELS
from overpaint_shared.errors import UnsupportedError
from overpaint_shared.offers import Catalogue, ModelTraits

FOLDER = Path(__file__).parent
SCENE, MASK = FOLDER / "scene.png", FOLDER / "mask.png"
SIDE = 256
"""Of both pictures, pixels."""
PROMPT = "a dog and a tree on a blue background"
WORD = "cat"
SEED = 8
_PAINTED = {"from": "image", "image": MASK.name, "ops": [{"op": "feather", "by": 8}]}


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One job of the demo, and what the sheet calls its picture."""

    name: str
    label: str
    spec: dict[str, Any]


def shots(catalogue: Catalogue) -> list[Shot]:
    """The jobs that these models can do. Raises UnsupportedError where they can do none."""
    models = [traits for traits in catalogue.entries() if traits.kind == "model"]
    base = next((traits for traits in models if traits.channels != INPAINT_CHANNELS), None)
    inpainting = next((traits for traits in models if traits.channels == INPAINT_CHANNELS), None)
    made = [] if base is None else list(_with_base(base, catalogue))
    if inpainting is not None:
        made.append(_shot("inpaint-model", "inpainting model", inpainting, {"kind": "inpaint_model"}))
    if base is not None:
        made += _with_words(base, catalogue)
    if not made:
        raise UnsupportedError(
            "the worker offers no model", fix="name one in its models.toml: docs/models.md"
        )
    return made


def _with_base(base: ModelTraits, catalogue: Catalogue) -> Iterator[Shot]:
    for denoise in (0.3, 0.6):
        yield _shot(
            f"img2img-{denoise}", f"img2img, denoise {denoise}", base, {"kind": "img2img"},
            mask=None, denoise=denoise,
        )  # fmt: skip
    yield _shot("vae-encode-inpaint", "VAE Encode (for Inpainting)", base, {"kind": "vae_encode_inpaint"})
    yield _shot("latent-noise-mask", "Set Latent Noise Mask", base, {"kind": "latent_noise_mask"})
    if net := _inpainting_net(base, catalogue):
        method = {"kind": "controlnet_inpaint", "controlnet": net}
        yield _shot("controlnet-inpaint", "ControlNet Inpaint", base, method)


def _with_words(base: ModelTraits, catalogue: Catalogue) -> Iterator[Shot]:
    for segmenter in catalogue.names("segmenter")[:1]:
        mask = {
            "from": "clipseg", "text": WORD, "segmenter": segmenter, "dilation_factor": 10,
            "ops": [{"op": "grow", "by": 8}, {"op": "feather", "by": 8}],
        }  # fmt: skip
        yield _shot("clipseg", f'CLIPSeg "{WORD}"', base, {"kind": "latent_noise_mask"}, mask=mask)


def _inpainting_net(base: ModelTraits, catalogue: Catalogue) -> str | None:
    """The first inpainting ControlNet made for such a model, told by its name."""
    for traits in catalogue.entries():
        alike = traits.family == base.family and traits.context_width == base.context_width
        if traits.kind == "controlnet" and alike and "inpaint" in traits.name:
            return traits.name
    return None


def _shot(
    name: str,
    label: str,
    model: ModelTraits,
    method: dict[str, Any],
    *,
    mask: dict[str, Any] | None = _PAINTED,
    denoise: float | None = None,
) -> Shot:
    spec: dict[str, Any] = {
        "version": 1,
        "model": model.name,
        "source": {"image": SCENE.name},
        "method": method,
        "prompt": PROMPT,
        "sampling": {"seed": SEED, **({} if denoise is None else {"denoise": denoise})},
        "group": "demo",
    }
    size = model.defaults.size if model.defaults else SIDE
    if size != SIDE:
        spec["prepare"] = [{"op": "scale", "width": size, "height": size}]
    if mask is not None:
        spec["mask"] = mask
    return Shot(name=name, label=label, spec=spec)
