"""From a rendered picture, as the graph made it, to a job: what goes together, and what a job cannot say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from overpaint_producer.workflow.graph import Node
from overpaint_producer.workflow.maskplace import Place, SizeOf, canvas_size, lay
from overpaint_producer.workflow.names import Names
from overpaint_producer.workflow.values import (
    Autoencoder,
    Conditioning,
    ControlUse,
    Denoiser,
    Encoded,
    Hint,
    MaskValue,
    Picture,
    Placed,
    Rendered,
    Sampled,
)
from overpaint_shared.sizes import is_whole

SD1_WIDTH = 768
"""Width of the text features of Stable Diffusion 1.x, whose layers are counted from the very last."""


@dataclass
class Assembly:
    """A job as it grows: its JSON, where each part came from, what people should know."""

    names: Names
    size_of: SizeOf
    reference: Callable[[str], str]
    """From the name in Load Image to the reference in a job."""
    spec: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, tuple[Node, str | None]] = field(default_factory=dict)
    """Path in the spec: the node, and the input of it, that it comes from."""
    notes: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any, node: Node, name: str | None = None) -> None:
        """Write a value into the job: `sampling.seed`."""
        at = self.spec
        *parents, last = path.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
        self.origins[path] = (node, name)

    def called(self, path: str, kind: Any, file: str, node: Node, name: str) -> str:
        """The registry's name for a file, noted as the origin of `path`."""
        found, note = self.names.find(kind, file, node, name)
        self.origins[path] = (node, name)
        if note:
            self.notes.append(note)
        return found


def assemble(rendered: Rendered, job: Assembly) -> None:
    """Fill in the job of a rendered picture. Raises `Refused` for what a job cannot say."""
    sampled = rendered.sampled
    job.spec["version"] = 1
    _model(rendered, job)
    _source(sampled.latent.picture, job)
    hint = _controls(sampled, job)
    _method(sampled, hint, job)
    _mask(rendered, job)
    _texts(sampled, job)
    _sampling(sampled, job)
    _composite(rendered, job)
    _ops("finish", rendered.ops, job)


def _model(rendered: Rendered, job: Assembly) -> None:
    sampled = rendered.sampled
    model = sampled.model
    _same_texts(sampled)
    name = job.called("model", "model", model.file, model.node, "ckpt_name")
    job.put("model", name, model.node, "ckpt_name")
    for i, step in enumerate(model.loras):
        path = f"loras[{i}]"
        lora = job.called(path, "lora", step.file, step.node, "lora_name")
        job.spec.setdefault("loras", []).append({"name": lora, "weight": step.weight})
    _clip_skip(sampled, name, job)
    _vae(rendered, job)


def _same_texts(sampled: Sampled) -> None:
    """Model and both texts come from one checkpoint with the same LoRAs."""
    model, node = sampled.model, sampled.node
    for name, text in (("positive", sampled.positive), ("negative", sampled.negative)):
        if text.clip.file != model.file:
            node.refuse(
                name,
                f"comes from the text encoder of {text.clip.file!r}, and the model is {model.file!r}; a job "
                "takes both from one entry of the registry",
                allowed="one Load Checkpoint for both",
            )
        if text.clip.loras != model.loras:
            node.refuse(
                name,
                "comes from a text encoder with other LoRAs than the model has; a job gives both the same, "
                "with one weight",
                given=_loras(text) or "none",
                allowed=_loras(model) or "none",
            )
    if sampled.positive.clip != sampled.negative.clip:
        node.refuse("negative", "comes from a text encoder with another last layer than the positive text's")


def _loras(value: Conditioning | Denoiser) -> str:
    steps = value.clip.loras if isinstance(value, Conditioning) else value.loras
    return ", ".join(f"{step.file} at {step.weight:g}" for step in steps)


def _clip_skip(sampled: Sampled, model: str, job: Assembly) -> None:
    """The layer that is read, counted from the last: -1 is a `clip_skip` of 0, -2 of 1.

    SDXL reads the one before the last anyhow, without the final norm, so -2 changes nothing there and a
    `clip_skip` of 0 or 1 is the same; of -1, the very last one without that norm, no job speaks. SD 2.x is
    kept without its last layer, so that its count begins elsewhere.
    """
    clip = sampled.positive.clip
    if clip.last_layer is None or clip.layer_node is None:
        return
    traits = job.names.traits("model", model)
    if traits is None:
        job.notes.append(
            f"{clip.layer_node.said}: counted as for Stable Diffusion 1.x and, from -2 on, XL; "
            "for other models clip_skip differs"
        )
    elif traits.family == "sdxl":
        if clip.last_layer == -1:
            clip.layer_node.refuse(
                "stop_at_clip_layer",
                f"asks for the very last layer, which {model!r} (family sdxl) never reads",
                given="-1",
                allowed="-2, which is what it reads by itself, or less",
            )
    elif traits.family != "sd" or traits.context_width not in {None, SD1_WIDTH}:
        clip.layer_node.refuse(
            "stop_at_clip_layer",
            f"counts from the very last layer, and {model!r} (family {traits.family}) does not begin there",
            given=str(clip.last_layer),
            allowed="no CLIP Set Last Layer with this model",
        )
    job.put("clip_skip", -1 - clip.last_layer, clip.layer_node, "stop_at_clip_layer")


def _vae(rendered: Rendered, job: Assembly) -> None:
    sampled, vae = rendered.sampled, rendered.vae
    encoder = sampled.latent.vae
    if encoder != vae:
        rendered.node.refuse(
            "vae",
            f"is {_vae_said(vae)}, and {sampled.latent.node.said} encodes with {_vae_said(encoder)}; "
            "a job has one",
        )
    if not vae.own:
        name = job.called("vae", "vae", vae.file, vae.node, "vae_name")
        job.put("vae", name, vae.node, "vae_name")
    elif vae.file != sampled.model.file:
        rendered.node.refuse(
            "vae",
            f"is {_vae_said(vae)}, and the model is {sampled.model.file!r}; "
            "a job takes another VAE by its own name",
            allowed="the model's own VAE, or Load VAE",
        )


def _vae_said(vae: Autoencoder) -> str:
    return f"the VAE of {vae.file!r}" if vae.own else f"{vae.file!r}"


def _source(picture: Picture, job: Assembly) -> None:
    job.spec["source"] = {"image": job.reference(picture.file)}
    job.origins["source"] = (picture.loader, "image")
    _ops("prepare", picture.ops, job)


def _ops(part: str, ops: tuple[Placed, ...], job: Assembly) -> None:
    for i, placed in enumerate(ops):
        job.spec.setdefault(part, []).append(placed.op.model_dump(mode="json"))
        job.origins[f"{part}[{i}]"] = (placed.node, None)
        job.origins.setdefault(part, (placed.node, None))


def _controls(sampled: Sampled, job: Assembly) -> ControlUse | None:
    """Fill in `controls`; return the ControlNet that inpaints, if there is one."""
    inpainting: ControlUse | None = None
    for use in _on_both(sampled):
        if isinstance(use.image, Hint):
            if inpainting is not None:
                use.node.refuse(
                    "image", f"is a second hint of InpaintPreprocessor; {inpainting.node.said} has one"
                )
            inpainting = use
            continue
        if use.image.ops:
            use.node.refuse(
                "image",
                f"has gone through {use.image.node.said}; a job's hint is a picture file as it is",
                allowed="Load Image: save the changed picture and load it",
            )
        controls = job.spec.setdefault("controls", [])
        path = f"controls[{len(controls)}]"
        job.origins[path] = (use.node, None)
        name = job.called(f"{path}.controlnet", "controlnet", use.net.file, use.net.node, "control_net_name")
        controls.append({"controlnet": name, "image": job.reference(use.image.file), **_range(use)})
        job.origins[f"{path}.image"] = (use.image.node, "image")
    return inpainting


def _range(use: ControlUse) -> dict[str, float]:
    return {"strength": use.strength, "start": use.start, "end": use.end}


def _on_both(sampled: Sampled) -> tuple[ControlUse, ...]:
    """The ControlNets, which a job applies to both texts."""
    positive, negative = sampled.positive.controls, sampled.negative.controls
    if positive != negative and (negative or not all(use.spreads for use in positive)):
        uses = (*positive, *negative)
        odd = next((use for use in uses if not (use in positive and use in negative)), uses[0])
        odd.node.refuse(
            None,
            "does not act on the positive and the negative text alike; in a job a ControlNet does",
            allowed="both texts through the same ControlNets, in the same order",
        )
    return positive


def _method(sampled: Sampled, hint: ControlUse | None, job: Assembly) -> None:
    latent = sampled.latent
    _check_inpaint(sampled)
    if hint is not None:
        _controlnet_inpaint(latent, hint, job)
    elif latent.kind == "model":
        job.put("method", {"kind": "inpaint_model"}, latent.node)
    elif latent.kind == "grey":
        job.put("method", {"kind": "vae_encode_inpaint", "grow_mask_by": latent.grow}, latent.node)
    elif latent.mask is not None:
        job.put("method", {"kind": "latent_noise_mask"}, latent.mask_node or latent.node)
    else:
        job.put("method", {"kind": "img2img"}, latent.node)


def _check_inpaint(sampled: Sampled) -> None:
    """The texts, and the latent, of InpaintModelConditioning come together."""
    latent, node = sampled.latent, sampled.node
    for name, text in (("positive", sampled.positive), ("negative", sampled.negative)):
        use = text.inpaint
        if use is None and latent.kind != "model":
            continue
        if use is None or latent.kind != "model":
            node.refuse(
                name if use is None else "latent_image",
                "does not come from InpaintModelConditioning, and the sampler's other inputs do",
                allowed="positive, negative and latent of one InpaintModelConditioning",
            )
        if (use.picture, use.mask, use.vae) != (latent.picture, latent.mask, latent.vae):
            node.refuse(name, f"and the latent come from different pictures or masks ({use.node.said})")


def _controlnet_inpaint(latent: Encoded, use: ControlUse, job: Assembly) -> None:
    hint = use.image
    if latent.mask is None or latent.kind == "model" or not isinstance(hint, Hint):
        use.node.refuse(
            "image",
            f"is a hint for repainting, and {latent.node.said} "
            + ("is for 9-channel models" if latent.kind == "model" else "sets no mask")
            + "; no method of a job joins them",
            allowed="VAE Encode (for Inpainting), or VAE Encode and Set Latent Noise Mask",
        )
    if (hint.picture, hint.mask) != (latent.picture, latent.mask):
        what = "picture" if hint.picture != latent.picture else "mask"
        hint.node.refuse(
            "image" if what == "picture" else "mask",
            f"is not the {what} of {(latent.mask_node or latent.node).said}; "
            "a job has one canvas and one mask",
        )
    name = job.called("method.controlnet", "controlnet", use.net.file, use.net.node, "control_net_name")
    method: dict[str, Any] = {"kind": "controlnet_inpaint", "controlnet": name, **_range(use)}
    if latent.kind == "grey":
        method |= {"latent": "vae_encode_inpaint", "grow_mask_by": latent.grow}
    else:
        method |= {"latent": "latent_noise_mask"}
    job.put("method", method, use.node)


def _mask(rendered: Rendered, job: Assembly) -> None:
    latent = rendered.sampled.latent
    value, node = latent.mask, latent.mask_node
    is_scaled = latent.kind != "plain"
    if rendered.composed is not None:
        value, node, is_scaled = _composite_mask(rendered, is_scaled=is_scaled)
    if value is None or node is None:
        return
    place = Place(canvas=latent.picture, size_of=job.size_of, is_scaled=is_scaled, node=node)
    laid = lay(value, place)
    if "image" in laid.mask:
        laid.mask["image"] = job.reference(laid.mask["image"])
    if laid.mask["from"] == "clipseg":
        name = job.called("mask.segmenter", "segmenter", "clipseg", laid.origin, "image")
        laid.mask["segmenter"] = name
    job.put("mask", laid.mask, laid.origin)
    for i, placed in enumerate(value.ops):
        job.origins[f"mask.ops[{i}]"] = (placed.node, None)
    job.notes += laid.notes


def _composite_mask(rendered: Rendered, *, is_scaled: bool) -> tuple[MaskValue | None, Node | None, bool]:
    """The mask of a job that puts the original back: the method's own, or, for img2img, the composite's."""
    latent, composed = rendered.sampled.latent, rendered.composed
    if composed is None:
        raise AssertionError(rendered.node.said)
    if latent.mask is None:
        return composed.mask, composed.node, True
    if composed.mask != latent.mask:
        composed.node.refuse(
            "mask",
            f"is not the mask of {(latent.mask_node or latent.node).said}, or with the original on top, "
            "that mask inverted; a job has one mask, and puts the original back outside it",
            allowed="the same mask at both nodes",
        )
    return latent.mask, latent.mask_node, is_scaled


def _texts(sampled: Sampled, job: Assembly) -> None:
    job.put("prompt", sampled.positive.text, sampled.positive.node, "text")
    job.put("negative_prompt", sampled.negative.text, sampled.negative.node, "text")


def _sampling(sampled: Sampled, job: Assembly) -> None:
    draw, node = sampled.draw, sampled.node
    job.put("sampling.seed", draw.seed, node, draw.seed_input)
    job.put("sampling.steps", draw.steps, node, "steps")
    job.put("sampling.cfg", draw.cfg, node, "cfg")
    job.put("sampling.sampler", draw.sampler, node, "sampler_name")
    job.put("sampling.scheduler", draw.scheduler, node, "scheduler")
    job.put("sampling.denoise", draw.denoise, node, "denoise")
    differential = sampled.model.differential
    if differential is not None and sampled.latent.mask is not None:
        job.put("sampling.differential", True, differential)
    elif differential is not None:
        job.notes.append(f"{differential.said}: does nothing, since the latent has no noise mask; left out")


def _composite(rendered: Rendered, job: Assembly) -> None:
    node = rendered.laid if rendered.composed is None else rendered.composed.node
    if node is not None:
        _require_whole(rendered.sampled.latent.picture, node, job)
    job.spec["composite"] = rendered.composed is not None
    job.spec["compat"] = "comfyui"
    if rendered.composed is not None:
        job.origins["composite"] = (rendered.composed.node, None)
    elif rendered.laid is not None:
        job.notes.append(f"{rendered.laid.said}: without a mask it changes nothing; left out")


def _require_whole(canvas: Picture, node: Node, job: Assembly) -> None:
    """On other sizes ComfyUI's VAE crops the picture, and the composite lands beside its place."""
    size = canvas_size(canvas, job.size_of)
    if size is None:
        job.notes.append(
            f"{node.said}: the same as in ComfyUI only if the picture's sides are multiples of 8; "
            "its size is not known here"
        )
    elif not is_whole(size):
        node.refuse(
            None,
            f"puts a cropped picture over one of {size[0]} x {size[1]} pixels, which in ComfyUI lands up to "
            "4 pixels beside its place; a job does not",
            given=f"{size[0]} x {size[1]}",
            allowed="sides that are multiples of 8",
        )
