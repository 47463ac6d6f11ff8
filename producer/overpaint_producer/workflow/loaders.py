"""Loaders, text and control: from files to models, texts and ControlNets."""

import re
from dataclasses import replace
from typing import TypeVar

from overpaint_producer.workflow.graph import Node
from overpaint_producer.workflow.values import (
    Autoencoder,
    Conditioning,
    ControlNet,
    ControlUse,
    Denoiser,
    LoraStep,
    Rendered,
    Shown,
    TextEncoder,
    Value,
)
from overpaint_producer.workflow.walk import Walk, kind

C = TypeVar("C", Denoiser, TextEncoder)

_EMBEDDING = re.compile(r"embedding:", re.IGNORECASE)
_MOST_LORA = 100.0


def checkpoint(_: Walk, node: Node) -> tuple[Value, ...]:
    """Load Checkpoint: model, text encoder and VAE of one file."""
    file = node.file("ckpt_name")
    return (
        Denoiser(file=file, loras=(), node=node),
        TextEncoder(file=file, loras=(), node=node),
        Autoencoder(file=file, own=True, node=node),
    )


def vae(_: Walk, node: Node) -> tuple[Value, ...]:
    """Load VAE."""
    return (Autoencoder(file=node.file("vae_name"), own=False, node=node),)


def lora(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Load LoRA: one file, a weight for the model and one for the text encoder."""
    file = node.file("lora_name")
    model, clip = walk.take(node, "model", Denoiser), walk.take(node, "clip", TextEncoder)
    return _with_lora(model, file, "strength_model", node), _with_lora(clip, file, "strength_clip", node)


def _with_lora(value: C, file: str, strength: str, node: Node) -> C:
    weight = node.number(strength, -_MOST_LORA, _MOST_LORA)
    if weight == 0:
        return value
    return replace(value, loras=(*value.loras, LoraStep(file, weight, node)))


def last_layer(walk: Walk, node: Node) -> tuple[Value, ...]:
    """CLIP Set Last Layer."""
    clip = walk.take(node, "clip", TextEncoder)
    layer = node.whole("stop_at_clip_layer", -24, -1)
    return (replace(clip, last_layer=layer, layer_node=node),)


def text(walk: Walk, node: Node) -> tuple[Value, ...]:
    """CLIP Text Encode."""
    written = node.text("text")
    if _EMBEDDING.search(written):
        node.refuse("text", "names a textual inversion embedding, which a job cannot", allowed="words")
    return (Conditioning(text=written, clip=walk.take(node, "clip", TextEncoder), node=node),)


def differential(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Differential Diffusion, at its full strength."""
    model = walk.take(node, "model", Denoiser)
    strength = node.number("strength", 0, 1, 1.0)
    if strength != 1:
        node.refuse(
            "strength",
            "cannot be said in a job, which has differential diffusion on or off",
            given=f"{strength:g}",
            allowed="1",
        )
    return (replace(model, differential=node),)


def controlnet(_: Walk, node: Node) -> tuple[Value, ...]:
    """Load ControlNet Model."""
    file = node.file("control_net_name")
    if file.rpartition(".")[0].endswith("_shuffle"):
        node.refuse(
            "control_net_name",
            "names a shuffle ControlNet, whose result the reference averages over the picture; a job cannot",
            given=f'"{file}"',
        )
    return (ControlNet(file=file, node=node),)


def apply_control(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Apply ControlNet (old): from begin to end; put on the positive text it acts on the negative too."""
    conditioning = walk.take(node, "conditioning", Conditioning)
    use = _control_use(walk, node, 0.0, 1.0, spreads=True)
    return (_controlled(conditioning, use),)


def apply_control_advanced(walk: Walk, node: Node) -> tuple[Value, ...]:
    """Apply ControlNet: on both texts, over a share of the schedule."""
    positive = walk.take(node, "positive", Conditioning)
    negative = walk.take(node, "negative", Conditioning)
    use = _control_use(
        walk,
        node,
        node.number("start_percent", 0, 1, 0.0),
        node.number("end_percent", 0, 1, 1.0),
        spreads=False,
    )
    return _controlled(positive, use), _controlled(negative, use)


def _control_use(walk: Walk, node: Node, start: float, end: float, *, spreads: bool) -> ControlUse:
    image = walk.image(node, "image")
    if isinstance(image, Rendered | Shown):
        node.refuse(
            "image",
            f"is made by {image.node.said} in the same graph; a job's hint is a picture file",
            allowed="Load Image or InpaintPreprocessor",
        )
    return ControlUse(
        net=walk.take(node, "control_net", ControlNet),
        image=image,
        strength=node.number("strength", 0, 10),
        start=start,
        end=end,
        node=node,
        spreads=spreads,
    )


def _controlled(conditioning: Conditioning, use: ControlUse) -> Conditioning:
    if use.strength == 0:
        return conditioning
    return replace(conditioning, controls=(*conditioning.controls, use))


KINDS = {
    "CheckpointLoaderSimple": kind(checkpoint, "ckpt_name", "`model`"),
    "VAELoader": kind(vae, "vae_name", "`vae`"),
    "LoraLoader": kind(lora, "model clip lora_name strength_model strength_clip", "one of `loras`"),
    "CLIPTextEncode": kind(text, "clip text", "`prompt` or `negative_prompt`"),
    "CLIPSetLastLayer": kind(last_layer, "clip stop_at_clip_layer", "`clip_skip`"),
    "DifferentialDiffusion": kind(differential, "model strength", "`sampling.differential`"),
    "ControlNetLoader": kind(controlnet, "control_net_name", "the name of a ControlNet"),
    "ControlNetApply": kind(
        apply_control, "conditioning control_net image strength", "`method` or one of `controls`"
    ),
    "ControlNetApplyAdvanced": kind(
        apply_control_advanced,
        "positive negative control_net image strength start_percent end_percent vae",
        "`method` or one of `controls`",
    ),
}
