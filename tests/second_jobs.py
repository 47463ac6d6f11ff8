"""Jobs for the reference's way written a second time, and the pictures that they name."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.rendering import INPUTS
from tests.second import Painted, networks, paint


def png(array: np.ndarray, **options: Any) -> bytes:
    """A PNG file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


@cache
def files() -> Mapping[str, bytes]:
    """The parity inputs, and pictures of other kinds cut from them."""
    found = {path.name: path.read_bytes() for path in INPUTS.iterdir()}
    rgba = np.asarray(Image.open(INPUTS / "rgba256.png"))[100:175, 60:141]
    turned = Image.Exif()
    turned[0x0112] = 6
    found["rgba.png"] = png(rgba)
    found["turned.png"] = png(rgba, exif=turned)
    found["turned-mask.png"] = png(rgba[..., 3], exif=turned)
    palette = Image.fromarray(rgba[..., :3]).quantize(16)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=bytes([0, 40, 128, 200, 255] + [255] * 11))
    found["palette.png"] = out.getvalue()
    found["deep.png"] = png(rgba[..., 0].astype(np.uint16) * 3)
    small = np.asarray(Image.open(INPUTS / "img_odd.png").convert("RGB"))[20:95, 30:111]
    found["small.png"] = png(small)
    soft = np.asarray(Image.open(INPUTS / "mask256_soft.png"))
    for name, (height, width) in {"soft": (75, 81), "large": (112, 122)}.items():
        found[f"{name}.png"] = png(np.asarray(Image.fromarray(soft).resize((width, height))))
    grey = np.asarray(Image.open(io.BytesIO(found["soft.png"])))
    found["channels.png"] = png(np.stack([grey * 0, grey, 255 - grey, grey // 2], axis=-1))
    return found


def job(
    kind: str,
    image: str = "small.png",
    mask: Any = "soft.png",
    *,
    model: str = "tiny",
    method: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A job of three steps; what is not of `sampling` goes into the spec as it is."""
    sampling = {"seed": 42, "steps": 3, "cfg": 7.0, "sampler": "euler", "scheduler": "normal", "denoise": 1.0}
    sampling |= {key: more.pop(key) for key in [*sampling, "differential"] if key in more}
    masked = {"mask": {"from": "image", "image": mask}} if isinstance(mask, str) else {"mask": mask}
    return {
        "version": 1, "model": model, "source": {"image": image}, **(masked if mask else {}),
        "method": {"kind": kind, **(method or {})}, "sampling": sampling, "composite": False,
        "prompt": "a red brick house", "negative_prompt": "blurry", **more,
    }  # fmt: skip


def again(registry: Path, spec: Mapping[str, Any], given: Mapping[str, bytes] | None = None) -> Painted:
    """The job's picture, written a second time."""
    folders = {"tiny": "sd15", "tiny-inpaint": "sd15_inpaint9"}
    weights = registry.parent / "weights" / "diffusers"
    return paint(spec, given or files(), networks(weights, folders[spec["model"]]))
