"""Random small jobs with random small pictures, most of which can be rendered: strategies for fuzzing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.unit.pictures import png16, saved
from tests.unit.spec_strategies import definition, objects, values

SIDES = st.sampled_from([1, 2, 7, 8, 9, 31, 40, 63, 64, 64, 64, 65, 72])
MODES = [
    "RGB",
    "RGB",
    "RGBA",
    "L",
    "LA",
    "P",
    "P keyed",
    "1",
    "grey 16",
    "RGB 16",
    "RGBA 16",
    "JPEG",
    "WebP",
    "TIFF",
]
STRANGE = [
    "CMYK",
    "float",
    "GIF",
    "moving WebP",
    "text",
    "empty",
    "bomb",
    "truncated",
    "scrambled",
    "zeros",
]
PROMPTS = ["a (red:1.4) hat", "(((", "(a:9e9)", "a " * 300]
MASKS = ["box", "box", "box", "soft", "noise", "thin", "empty", "full"]


def pixels_of(width: int, height: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def picture(kind: str, width: int, height: int, seed: int) -> bytes:
    """The file of a picture of noise."""
    rgb = Image.fromarray(pixels_of(width, height, 3, seed))
    rgba = Image.fromarray(pixels_of(width, height, 4, seed))
    deep = np.random.default_rng(seed).integers(0, 65536, (height, width, 4), np.uint16)
    made = {
        "RGB": lambda: saved(rgb), "RGBA": lambda: saved(rgba), "L": lambda: saved(rgb.convert("L")),
        "LA": lambda: saved(rgba.convert("LA")), "P": lambda: saved(rgb.convert("P")),
        "P keyed": lambda: saved(rgb.convert("P"), transparency=seed % 256),
        "1": lambda: saved(rgb.convert("1")),
        "grey 16": lambda: png16(deep[..., :1]), "RGB 16": lambda: png16(deep[..., :3]),
        "RGBA 16": lambda: png16(deep), "JPEG": lambda: saved(rgb, "JPEG"),
        "WebP": lambda: saved(rgba, "WEBP"), "TIFF": lambda: saved(rgb, "TIFF"),
        "CMYK": lambda: saved(rgb.convert("CMYK"), "JPEG"),
        "float": lambda: saved(rgb.convert("F"), "TIFF"), "GIF": lambda: saved(rgb, "GIF"),
        "moving WebP": lambda: saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        "text": lambda: b"<html>404</html>", "empty": lambda: b"", "zeros": lambda: bytes(4000),
        "bomb": lambda: saved(Image.new("1", (4000, 3000))),
        "truncated": lambda: cut(saved(rgb), seed), "scrambled": lambda: scrambled(saved(rgb), seed),
    }  # fmt: skip
    return made[kind]()


def cut(data: bytes, seed: int) -> bytes:
    return data[: Random(seed).randrange(len(data))]


def scrambled(data: bytes, seed: int) -> bytes:
    random, spoilt = Random(seed), bytearray(data)
    for _ in range(random.randrange(1, 6)):
        spoilt[random.randrange(len(spoilt))] = random.randrange(256)
    return bytes(spoilt)


def mask_picture(kind: str, width: int, height: int, seed: int) -> bytes:
    mask = np.zeros((height, width), np.uint8)
    box = np.s_[height // 4 : max(1, height * 3 // 4), width // 4 : max(1, width * 3 // 4)]
    if kind == "box":
        mask[box] = 255
    elif kind == "soft":
        mask[box] = np.linspace(20, 255, mask[box].shape[1], dtype=np.uint8)
    elif kind == "noise":
        mask = pixels_of(width, height, 1, seed)[..., 0]
    elif kind == "thin":
        mask[height // 2] = 255
    elif kind == "full":
        mask[:] = 255
    return saved(Image.fromarray(mask))


@dataclass
class Asked:
    """A job, and what is needed to judge its end."""

    spec: dict[str, Any]
    files: dict[str, bytes]
    size: tuple[int, int]


def rarely(
    strategy: st.SearchStrategy[Any], otherwise: Any = None, one_in: int = 4
) -> st.SearchStrategy[Any]:
    """The strategy's values now and then; drawn last, so that shrinking leads away from them."""
    return st.integers(0, one_in - 1).flatmap(lambda n: strategy if n == one_in - 1 else st.just(otherwise))


def from_schema(name: str, /, **instead: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """What the schema allows under that name, but for some fields; ranges the right way round."""
    own = definition(name)
    return objects({**own, "properties": {k: v for k, v in own["properties"].items() if k not in instead},
                    "required": [k for k in own.get("required", ()) if k not in instead]}).flatmap(
        lambda made: st.fixed_dictionaries(instead).map(lambda more: in_order({**made, **more})))  # fmt: skip


def in_order(made: dict[str, Any]) -> dict[str, Any]:
    """The smaller of two bounds first, since a spec is refused early and another test is of that."""
    for low, high in (("start", "end"), ("min_coverage", "max_coverage")):
        if low in made:
            made[low], made[high] = sorted((made[low], made.get(high, 1.0)))
    return made


SMALL = st.integers(1, 80)
SMALL_OPS = st.one_of(
    from_schema("Crop", x=st.integers(0, 20), y=st.integers(0, 20), width=SMALL, height=SMALL),
    from_schema("Scale", width=st.integers(0, 80), height=st.integers(0, 80)),
    from_schema("ScaleBy", factor=st.floats(0.01, 1.5)),
)  # fmt: skip
SMALL_PAD = st.fixed_dictionaries(
    {"op": st.just("pad")},
    optional={side: st.integers(0, 24) for side in ("left", "top", "right", "bottom", "feathering")},
)
LETTERS = st.characters(exclude_categories=["Cs", "Cc"])
OUTPUTS = st.one_of(
    st.fixed_dictionaries({"format": st.just("png"), "previews": st.booleans()}),
    st.fixed_dictionaries({"format": st.just("webp")}, optional={"previews": st.booleans()}),
    st.fixed_dictionaries({"format": st.sampled_from(["jpeg", "webp"]), "lossless": st.just(False)},
                          optional={"quality": st.integers(1, 100)}),
)  # fmt: skip
GUIDANCE = rarely(st.just(3.0), one_in=12)  # of distilled models, which are not here
MASK_OPS = values(definition("ImageMask")["properties"]["ops"]["items"])
CONTROLNETS = st.sampled_from(["tiny", "tiny", "other", "wide", "missing"])


@st.composite
def masks(draw: st.DrawFn, files: dict[str, bytes], size: tuple[int, int], depth: int = 0) -> dict[str, Any]:
    """A mask from any source; its picture goes among the files."""
    kinds = ["image", "image", "image", "alpha", "pad", "clipseg"] + ["combine"] * (depth == 0)
    kind = draw(st.sampled_from(kinds))
    mask: dict[str, Any] = {"from": kind}
    if ops := draw(
        rarely(st.lists(values(definition("ImageMask")["properties"]["ops"]["items"]), max_size=3))
    ):
        mask["ops"] = ops
    if kind == "image":
        name, sizes = f"mask{len(files)}.png", st.tuples(SIDES, SIDES)
        width, height = draw(rarely(sizes, size, one_in=10))
        files[name] = mask_picture(draw(st.sampled_from(MASKS)), width, height, draw(st.integers(0, 99)))
        mask |= {"image": name, "channel": draw(rarely(st.sampled_from(["alpha", "green"]), "red", one_in=8)),
                 "at": draw(rarely(st.just("canvas"), "source", one_in=8))}  # fmt: skip
    elif kind == "clipseg":
        segmenter = rarely(st.just("none"), "clipseg", one_in=10)
        mask |= draw(from_schema("ClipsegMask", segmenter=segmenter, ops=st.just(ops or [])))
    elif kind == "combine":
        mask |= {"how": draw(st.sampled_from(["union", "intersect", "subtract"])),
                 "masks": draw(st.lists(masks(files, size, depth + 1), min_size=2, max_size=3))}  # fmt: skip
    return mask


@st.composite
def methods(draw: st.DrawFn, names: Sequence[str]) -> dict[str, Any]:
    """One of the methods that the schema has under these names."""
    name = draw(st.sampled_from(names))
    return draw(from_schema(name, **({"controlnet": CONTROLNETS} if name == "ControlnetInpaint" else {})))


@st.composite
def asked(draw: st.DrawFn, names: Sequence[str]) -> Asked:
    """A small job that may render, with small pictures that may be pictures."""
    size, seed = draw(st.tuples(SIDES, SIDES)), draw(st.integers(0, 2**16))
    mode = draw(rarely(st.sampled_from(STRANGE), one_in=8)) or draw(st.sampled_from(MODES))
    files = {"source": picture(mode, *size, seed)}
    method = draw(methods(names))
    model = "inpaint" if method["kind"] == "inpaint_model" else "tiny"
    spec: dict[str, Any] = {
        "version": 1, "source": {"image": "source"}, "method": method,
        "model": draw(rarely(st.sampled_from(["tiny", "merged", "inpaint", "missing"]), model, one_in=8)),
        "prepare": [*draw(rarely(st.lists(SMALL_OPS | SMALL_PAD, max_size=3), []))],
        "finish": draw(rarely(st.lists(SMALL_OPS, max_size=2), [])),
        "prompt": draw(st.text(LETTERS, max_size=20) | st.sampled_from(PROMPTS)),
        "negative_prompt": draw(st.text(LETTERS, max_size=5)),
        "composite": draw(st.sampled_from([True, True, False])),
        "compat": draw(st.sampled_from(["none", "none", "comfyui"])),
        "sampling": draw(from_schema("Sampling", steps=st.integers(1, 3), guidance=GUIDANCE)),
        "output": draw(rarely(values(definition("Output")), {}, one_in=6)) or draw(OUTPUTS),
    }  # fmt: skip
    if draw(st.integers(0, 9)) or method["kind"] != "img2img":
        spec["mask"] = draw(masks(files, size))
        if "pad" in json.dumps(spec["mask"]):
            spec["prepare"].append(draw(rarely(SMALL_PAD, {"op": "pad", "right": 16}, one_in=4)))
    spec |= draw(extras(files, size))
    return Asked(spec, files, size)


@st.composite
def extras(draw: st.DrawFn, files: dict[str, bytes], size: tuple[int, int]) -> dict[str, Any]:
    """What most jobs do without."""
    some: dict[str, Any] = {}
    if draw(rarely(st.just(True), False)):
        some["controls"] = [draw(from_schema("Control", controlnet=CONTROLNETS, image=st.just("hint")))]
        kind = draw(rarely(st.sampled_from(STRANGE), "RGB", one_in=8))
        files["hint"] = picture(kind, *draw(rarely(st.tuples(SIDES, SIDES), size)), 1)
    if draw(rarely(st.just(True), False)):
        names = st.sampled_from(["ink", "wash", "ink-peft", "misfit", "none"])
        some["loras"] = draw(st.lists(from_schema("LoraUse", name=names), max_size=2))
    if draw(rarely(st.just(True), False)):
        some["vae"] = draw(st.sampled_from(["warm", "own", "own-single", "none"]))
    if draw(rarely(st.just(True), False)):
        some["region"] = draw(from_schema("OnlyMasked", size=st.sampled_from([None, 64, 72])))
    if draw(rarely(st.just(True), False)):
        some |= {"preserve": draw(values(definition("Preserve"))), "clip_skip": draw(st.integers(0, 2))}
    return some
