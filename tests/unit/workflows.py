"""Hand-made ComfyUI graphs in API format, and what becomes of them."""

from typing import Any

import pytest

from overpaint_producer.workflow import convert
from overpaint_shared.errors import Problem, SpecError
from overpaint_shared.job import parse_job

Graph = dict[str, dict[str, Any]]

CHECKPOINT = "v1-5-pruned.safetensors"
SIZES = {"photo.png": (512, 512), "mask.png": (512, 512), "large.png": (1024, 1024), "odd.png": (500, 512)}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def graph(latent: dict[str, Any] | None = None, **more: Any) -> Graph:
    """Image to image; `latent` stands in for node 5, `more` adds nodes, `n12=...` as node 12."""
    made = {
        "4": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "10": node("LoadImage", image="photo.png", upload="image"),
        "6": node("CLIPTextEncode", text="a red hat", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "5": latent or node("VAEEncode", pixels=["10", 0], vae=["4", 2]),
        "3": node(
            "KSampler", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
            seed=7, steps=20, cfg=7.5, sampler_name="euler", scheduler="karras", denoise=0.6,
        ),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="ComfyUI"),
    }  # fmt: skip
    return made | {name.removeprefix("n"): value for name, value in more.items()}


def grey(mask: list[Any] | None = None, pixels: list[Any] | None = None) -> dict[str, Any]:
    """VAE Encode (for Inpainting)."""
    return node(
        "VAEEncodeForInpaint",
        pixels=pixels or ["10", 0], vae=["4", 2], mask=mask or ["10", 1], grow_mask_by=6,
    )  # fmt: skip


def noise(mask: list[Any] | None = None, pixels: list[Any] | None = None) -> Graph:
    """Set Latent Noise Mask as node 5."""
    return {
        "n5": node("SetLatentNoiseMask", samples=["50", 0], mask=mask or ["10", 1]),
        "n50": node("VAEEncode", pixels=pixels or ["10", 0], vae=["4", 2]),
    }


def changed(made: Graph, name: str, **inputs: Any) -> Graph:
    """The graph with other inputs at one node; None takes an input away."""
    merged = made[name]["inputs"] | inputs
    kept = {key: value for key, value in merged.items() if value is not None}
    return made | {name: made[name] | {"inputs": kept}}


def spec(made: Graph, **more: Any) -> dict[str, Any]:
    """The one job of a graph."""
    (job,) = convert(made, size_of=SIZES.get, **more).jobs
    assert parse_job(job.spec)
    return dict(job.spec)


def problems(made: Any, **more: Any) -> list[Problem]:
    """Why a graph is refused."""
    with pytest.raises(SpecError) as caught:
        convert(made, **({"size_of": SIZES.get} | more))
    return caught.value.problems


def problem(made: Any, **more: Any) -> Problem:
    """The one reason."""
    (found,) = problems(made, **more)
    return found


def clipseg(image: list[Any], **more: Any) -> dict[str, Any]:
    return node("CLIPSeg", image=image, text="the hat", **more)


def composed(made: Graph, **inputs: Any) -> Graph:
    node_30 = node(
        "ImageCompositeMasked",
        destination=["10", 0], source=["8", 0], x=0, y=0, resize_source=False, mask=["10", 1],
    )  # fmt: skip
    return changed(changed(made | {"30": node_30}, "9", images=["30", 0]), "30", **inputs)


SCALE = node("ImageScale", image=["10", 0], upscale_method="bicubic", width=768, height=0, crop="disabled")
