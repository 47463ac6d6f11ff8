"""Hand-made ComfyUI graphs in API format."""

from typing import Any

Graph = dict[str, dict[str, Any]]

CHECKPOINT = "v1-5-pruned.safetensors"


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
