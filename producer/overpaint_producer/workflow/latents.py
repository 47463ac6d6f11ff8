"""Nodes on latents: encoding, sampling, decoding, and what is done with the rendered picture."""

from __future__ import annotations

from dataclasses import replace

from overpaint_producer.workflow.graph import Node
from overpaint_producer.workflow.values import (
    Autoencoder,
    Composed,
    Conditioning,
    Denoiser,
    Draw,
    Encoded,
    InpaintUse,
    MaskValue,
    Picture,
    Rendered,
    Sampled,
    Value,
)
from overpaint_producer.workflow.walk import Walk, kind
from overpaint_shared.job import LARGEST_SEED, SAMPLERS, SCHEDULERS

MOST_STEPS = 10_000
LONGEST_TABLE = 1000
"""A model's noise levels: no schedule has more levels than these or its steps."""
UNEVEN = ("ddim_uniform", "beta")
"""Schedulers that may make more or fewer levels than they were asked for."""
SMALLEST_DENOISE = 0.01


def _picture(walk: Walk, node: Node, name: str) -> Picture:
    """The source, prepared; not a picture that a sampler made."""
    image = walk.image(node, name)
    if isinstance(image, Rendered):
        node.refuse(
            name,
            f"is made by {image.sampled.node.said}: two passes in one graph, and a job is one",
            allowed="a picture that was loaded: save the first pass, load it in a second workflow",
        )
    if not isinstance(image, Picture):
        node.refuse(
            name, f"comes from {image.node.said}, which is no picture to repaint", allowed="Load Image"
        )
    return image


def encode(walk: Walk, node: Node) -> tuple[Value, ...]:
    """VAE Encode."""
    return (
        Encoded(
            picture=_picture(walk, node, "pixels"),
            vae=walk.take(node, "vae", Autoencoder),
            kind="plain",
            node=node,
        ),
    )


def encode_inpaint(walk: Walk, node: Node) -> tuple[Value, ...]:
    """VAE Encode (for Inpainting)."""
    return (
        Encoded(
            picture=_picture(walk, node, "pixels"),
            vae=walk.take(node, "vae", Autoencoder),
            kind="grey",
            node=node,
            mask=walk.take(node, "mask", MaskValue),
            grow=node.whole("grow_mask_by", 0, 64, 6),
            mask_node=node,
        ),
    )


def noise_mask(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Set Latent Noise Mask; of several, the last counts."""
    latent = walk.latent(node, "samples")
    if not isinstance(latent, Encoded):
        node.refuse("samples", f"comes from {latent.node.said}: a job is one pass", allowed="VAE Encode")
    if latent.kind != "plain":
        node.refuse(
            "samples",
            f"comes from {latent.node.said}, which has set a noise mask; no method of a job has two",
            allowed="VAE Encode",
        )
    return (replace(latent, mask=walk.take(node, "mask", MaskValue), mask_node=node),)


def inpaint_conditioning(walk: Walk, node: Node) -> tuple[Value, ...]:
    """InpaintModelConditioning: both texts and the latent of a 9-channel model."""
    if not node.flag("noise_mask", default=True):
        node.refuse(
            "noise_mask", "is off, and a job's `inpaint_model` keeps it on", given="false", allowed="true"
        )
    picture, mask = _picture(walk, node, "pixels"), walk.take(node, "mask", MaskValue)
    vae = walk.take(node, "vae", Autoencoder)
    use = InpaintUse(picture=picture, mask=mask, vae=vae, node=node)
    positive = replace(walk.take(node, "positive", Conditioning), inpaint=use)
    negative = replace(walk.take(node, "negative", Conditioning), inpaint=use)
    latent = Encoded(picture=picture, vae=vae, kind="model", node=node, mask=mask, mask_node=node)
    return positive, negative, latent


def sample(walk: Walk, node: Node) -> tuple[Value, ...]:
    """KSampler."""
    denoise = node.number("denoise", 0, 1)
    if denoise < SMALLEST_DENOISE:
        node.refuse("denoise", "leaves the latent as it is", given=f"{denoise:g}", allowed="0.01 to 1")
    return (_sampled(walk, node, "seed", node.whole("steps", 1, MOST_STEPS), denoise),)


def sample_advanced(walk: Walk, node: Node) -> tuple[Value, ...]:
    """KSampler (Advanced), where it does what a KSampler does: noise added, run to the end."""
    _require_noise(node)
    total = node.whole("steps", 1, MOST_STEPS)
    first = node.whole("start_at_step", 0, MOST_STEPS)
    last = node.whole("end_at_step", 0, MOST_STEPS)
    scheduler = node.choice("scheduler", SCHEDULERS)
    enough = max(total, LONGEST_TABLE) if scheduler in UNEVEN else total
    if last < enough:
        node.refuse(
            "end_at_step",
            "stops before the end of the schedule, which a job cannot",
            given=str(last),
            allowed=f"{enough} or more",
        )
    if first >= total:
        node.refuse("start_at_step", "leaves no step to do", given=str(first), allowed=f"0 to {total - 1}")
    if first and scheduler in UNEVEN:
        node.refuse(
            "start_at_step",
            f"counts in a schedule of {scheduler}, whose length is not its steps; no denoise is the same",
            given=str(first),
            allowed="0, or another scheduler",
        )
    return (_sampled(walk, node, "noise_seed", total - first, _denoise(node, total, first)),)


def _require_noise(node: Node) -> None:
    words = ("enable", "disable")
    if node.choice("add_noise", words) == "disable":
        node.refuse(
            "add_noise",
            "is off: the sampler goes on with a latent that is noisy already, which a job never has",
            given='"disable"',
            allowed="enable",
        )
    node.choice("return_with_leftover_noise", words)  # at the end of the schedule there is none


def _denoise(node: Node, total: int, first: int) -> float:
    """The denoise whose schedule is as long: `int(steps / denoise) == total`, for `total - first` steps."""
    if first == 0:
        return 1.0
    denoise = (total - first) / (total + 0.5)
    if denoise < SMALLEST_DENOISE:
        node.refuse(
            "start_at_step",
            f"would be denoise {denoise:.2g}, less than a job may have",
            given=str(first),
            allowed=f"at most {int(total - SMALLEST_DENOISE * (total + 0.5))}",
        )
    return denoise


def _sampled(walk: Walk, node: Node, seed_input: str, steps: int, denoise: float) -> Sampled:
    draw = Draw(
        seed=node.whole(seed_input, 0, LARGEST_SEED),
        steps=steps,
        cfg=node.number("cfg", 0, 100),
        sampler=node.choice("sampler_name", SAMPLERS),
        scheduler=node.choice("scheduler", SCHEDULERS),
        denoise=denoise,
        seed_input=seed_input,
    )
    latent = walk.latent(node, "latent_image")
    if isinstance(latent, Sampled):
        node.refuse(
            "latent_image",
            f"comes from {latent.node.said}: two passes in one graph, and a job is one",
            allowed="VAE Encode (for Inpainting or not), Set Latent Noise Mask, InpaintModelConditioning",
        )
    return Sampled(
        model=walk.take(node, "model", Denoiser),
        positive=walk.take(node, "positive", Conditioning),
        negative=walk.take(node, "negative", Conditioning),
        latent=latent,
        draw=draw,
        node=node,
    )


def decode(walk: Walk, node: Node) -> tuple[Value, ...]:
    """VAE Decode."""
    latent = walk.latent(node, "samples")
    if isinstance(latent, Encoded):
        node.refuse("samples", f"comes from {latent.node.said} with no sampler between", allowed="KSampler")
    return (Rendered(sampled=latent, vae=walk.take(node, "vae", Autoencoder), node=node),)


def composite(walk: Walk, node: Node) -> tuple[Value, ...]:
    """ImageCompositeMasked, where it puts the rendered picture over its own canvas, or the canvas back."""
    for name in ("x", "y"):
        if given := node.whole(name, 0, 16_384):
            node.refuse(
                name,
                "puts the picture elsewhere; a job puts it where it was",
                given=str(given),
                allowed='0; for a part that was cropped, see `"region": {"kind": "only_masked"}`',
            )
    node.flag("resize_source", default=False)  # both pictures have one size, see `assemble`
    below = walk.image(node, "destination")
    above = walk.image(node, "source")
    mask = walk.take(node, "mask", MaskValue) if node.has("mask") else None
    if isinstance(below, Picture) and isinstance(above, Rendered):
        rendered, original = above, below
    elif isinstance(below, Rendered) and isinstance(above, Picture) and mask is not None:
        rendered, original = below, above
        mask = _other(mask, node)
    else:
        node.refuse(None, "does not join a rendered picture and the picture that it was made of")
    _require_own_canvas(node, rendered, original)
    if mask is None:
        return (replace(rendered, laid=node),)
    return (replace(rendered, composed=Composed(mask, node)),)


def _other(mask: MaskValue, node: Node) -> MaskValue:
    """What the mask leaves: with the original on top, the rendered picture shows there."""
    from overpaint_shared.job import Invert

    return mask.then(Invert(), node)


def _require_own_canvas(node: Node, rendered: Rendered, original: Picture) -> None:
    if rendered.composed is not None or rendered.laid is not None:
        node.refuse(None, "is a second composite; a job has one")
    if rendered.ops:
        node.refuse(
            None,
            f"takes a rendered picture that {rendered.ops[-1].node.said} has changed; a job puts the "
            "original back before anything else is done",
        )
    canvas = rendered.sampled.latent.picture
    if original != canvas:
        node.refuse(
            None,
            "joins the rendered picture with another one than it was made of",
            allowed=f"the picture at {rendered.sampled.latent.node.said}.pixels",
        )


_SAMPLER = "model positive negative latent_image cfg sampler_name scheduler steps"

KINDS = {
    "VAEEncode": kind(encode, "pixels vae", "`method` img2img"),
    "VAEEncodeForInpaint": kind(
        encode_inpaint, "pixels vae mask grow_mask_by", "`method` vae_encode_inpaint"
    ),
    "SetLatentNoiseMask": kind(noise_mask, "samples mask", "`method` latent_noise_mask"),
    "InpaintModelConditioning": kind(
        inpaint_conditioning, "positive negative vae pixels mask noise_mask", "`method` inpaint_model"
    ),
    "KSampler": kind(sample, f"{_SAMPLER} seed denoise", "`sampling`"),
    "KSamplerAdvanced": kind(
        sample_advanced,
        f"{_SAMPLER} noise_seed add_noise start_at_step end_at_step return_with_leftover_noise",
        "`sampling`",
    ),
    "VAEDecode": kind(decode, "samples vae", "the end of rendering"),
    "ImageCompositeMasked": kind(
        composite, "destination source x y resize_source mask", "`composite`, with `mask`"
    ),
}
SAMPLER_NODES = frozenset({"KSampler", "KSamplerAdvanced"})
