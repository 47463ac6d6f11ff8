"""Known mistakes are told with their place, reason and mend, and what is right is let pass without a word."""

import re
from pathlib import Path
from typing import Any

import pytest

from overpaint_shared.catalogue import SpecWarning
from overpaint_shared.job import ModelDefaults, parse_job
from overpaint_shared.lint import RULES, lint

SD15 = ModelDefaults(size=512)
MASK = {"from": "image", "image": "mask.png"}
GREY: dict[str, Any] = {"kind": "vae_encode_inpaint"}
NOISE: dict[str, Any] = {"kind": "latent_noise_mask"}
CONTROL = {"kind": "controlnet_inpaint", "controlnet": "inpaint"}
FULL = {"sampling": {"denoise": 1.0}}
FEATHER, BLUR, THRESHOLD = (
    {"op": "feather", "by": 8},
    {"op": "blur", "radius": 4},
    {"op": "threshold", "at": 0.5},
)


def told(
    changes: dict[str, Any], size: tuple[int, int] | None = (512, 512), defaults: ModelDefaults | None = SD15
) -> list[SpecWarning]:
    minimal = {"version": 1, "model": "m", "source": {"image": "a.png"}, "method": {"kind": "img2img"}}
    return list(lint(parse_job(minimal | changes), defaults=defaults, source_size=size))


def masked(method: dict[str, Any], *ops: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"method": method, "mask": MASK | {"ops": list(ops)}, **changes}


UNION = {"from": "combine", "how": "union"}
CLIPSEG = {"from": "clipseg", "text": "hat"}
PADDED = {"prepare": [{"op": "pad", "right": 64}]}

MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "grey shows": (masked(GREY, sampling={"denoise": 0.8}), "sampling.denoise", "grey"),
    "grey shows under a ControlNet": (masked(CONTROL, sampling={"denoise": 0.8}), "sampling.denoise", "grey"),
    "nothing is kept": (FULL, "sampling.denoise", "next to nothing of the source"),
    "a small mask is filled": (masked(NOISE, **FULL), "sampling.denoise", "small mask"),
    "a mask without effect": (
        {"mask": MASK, "composite": False, "sampling": {"denoise": 0.5}}, "mask", "no effect",
    ),
    "threshold after feather": (
        masked(NOISE, FEATHER, {"op": "invert"}, THRESHOLD), "mask.ops[2]", "ops[0] (feather)",
    ),
    "threshold in a combined part": (
        {"method": NOISE, "mask": UNION | {"masks": [MASK, MASK | {"ops": [BLUR, THRESHOLD]}]}},
        "mask.masks[1].ops[1]", "ops[0] (blur)",
    ),
    "threshold of a soft mask": (
        {"method": NOISE, "mask": CLIPSEG | {"ops": [THRESHOLD, FEATHER]}}, "mask.ops[0]", "own softness",
    ),
    "threshold of a pad": (
        {"method": NOISE, "mask": {"from": "pad", "ops": [THRESHOLD, FEATHER]}, **PADDED},
        "mask.ops[0]", "own softness",
    ),
    "softness that is rounded": (masked(GREY, FEATHER, composite=False), "mask.ops[0]", "rounds its mask"),
    "softness that is undone before it is rounded": (
        masked(GREY, FEATHER, THRESHOLD, composite=False), "mask.ops[1]", "hard again",
    ),
    "hard differential": (
        masked(NOISE, THRESHOLD, sampling={"differential": True}), "sampling.differential", "soft mask",
    ),
    "borders off by one": (
        masked(NOISE, {"op": "feather_borders", "right": 4}, compat="comfyui"),
        "mask.ops[0]", "at the right:",
    ),
    "preserve without composite": (
        masked(NOISE, composite=False, preserve={"max_outside": 0}), "preserve", "fail the job",
    ),
    "a negative prompt at cfg 1": (
        {"negative_prompt": "blurry", "sampling": {"cfg": 1.0}}, "negative_prompt", "ignored",
    ),
    "many lcm steps": ({"sampling": {"sampler": "lcm", "cfg": 1.5, "steps": 20}}, "sampling.steps", "lcm"),
    "high lcm cfg": ({"sampling": {"sampler": "lcm", "cfg": 7.0, "steps": 6}}, "sampling.cfg", "burn"),
    "many steps": ({"sampling": {"steps": 200}}, "sampling.steps", "change little"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "path", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_known_mistake_is_told_alone_with_place_reason_and_mend(
    changes: dict[str, Any], path: str, words: str
) -> None:
    (warning,) = told(changes)
    assert (warning.path, words in warning.message, bool(warning.fix)) == (path, True, True)


RIGHT: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grey at 1": masked(GREY, **FULL),
    "grey by default": masked(GREY),
    "the other latent": masked(CONTROL | {"latent": "latent_noise_mask"}, sampling={"denoise": 0.7}),
    "a mask that must be large": {"method": NOISE, "mask": MASK | {"min_coverage": 0.3}, **FULL},
    "an inpainting model at 1": masked({"kind": "inpaint_model"}, **FULL),
    "a mask that limits the composite": {"mask": MASK},
    "threshold first": masked(NOISE, THRESHOLD, FEATHER),
    "threshold between": masked(NOISE, FEATHER, {"op": "grow", "by": 4}),
    "a hard pad": {"method": NOISE, "mask": {"from": "pad", "ops": [THRESHOLD, FEATHER]},
                   "prepare": [{"op": "pad", "right": 64, "feathering": 0}]},
    "a soft mask left soft": {"method": NOISE, "mask": CLIPSEG | {"ops": [FEATHER]}},
    "softness for the composite": masked(GREY, FEATHER),
    "a soft differential": masked(NOISE, THRESHOLD, FEATHER, sampling={"differential": True}),
    "left and top borders": masked(NOISE, {"op": "feather_borders", "left": 4, "top": 4}, compat="comfyui"),
    "mended borders": masked(NOISE, {"op": "feather_borders", "right": 4, "bottom": 4}),
    "preserve": masked(NOISE, preserve={"max_outside": 0}),
    "a negative prompt that counts": {"negative_prompt": "blurry", "sampling": {"cfg": 7.0}},
    "cfg 1 alone": {"sampling": {"cfg": 1.0}},
    "lcm": {"sampling": {"sampler": "lcm", "cfg": 1.5, "steps": 6}},
}  # fmt: skip


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes_without_a_word(changes: dict[str, Any]) -> None:
    assert told(changes) == []


def test_a_models_defaults_stand_in_for_what_a_spec_leaves_out() -> None:
    lcm = ModelDefaults(size=512, steps=30, cfg=1.0, sampler="lcm")
    assert [warning.path for warning in told({"negative_prompt": "x"}, defaults=lcm)] == [
        "negative_prompt",
        "sampling.steps",
    ]
    assert told({"negative_prompt": "x"}, defaults=None) == []


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        ((1024, 1024), {}, "twice"),
        ((768, 760), {}, None),
        ((1024, 1024), {"sampling": {"denoise": 0.4}}, None),
        ((1024, 1024), {"prepare": [{"op": "scale", "width": 512, "height": 0}]}, None),
        ((512, 512), {"prepare": [{"op": "scale_by", "factor": 2.0}]}, "twice"),
        ((256, 256), {}, "fall apart"),
        ((2048, 2048), masked(GREY, region={"kind": "only_masked"}), None),
        ((2048, 2048), masked(GREY, region={"kind": "only_masked", "size": 128}), "fall apart"),
        (None, {}, None),
        (None, {"prepare": [{"op": "scale", "width": 2048, "height": 2048}]}, "twice"),
    ],
)
def test_a_size_far_from_the_models_own_is_told(
    size: Any, changes: dict[str, Any], words: str | None
) -> None:
    warnings = told(changes, size)
    assert [words in warning.message for warning in warnings if words] == ([True] if words else [])
    assert len(warnings) == bool(words)
    assert told(changes, size, None) == []


def test_a_large_masked_picture_is_pointed_to_only_masked() -> None:
    (warning,) = told(masked(GREY), (2048, 2048))
    assert "only_masked" in str(warning.fix)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "repeated up to 504 x 512"),
        ({"compat": "comfyui"}, "the centre of 496 x 512"),
        (masked(NOISE, compat="comfyui"), "3.5 pixels beside"),
        (masked(GREY, region={"kind": "only_masked"}), None),
        ({"prepare": [{"op": "crop", "width": 496, "height": 512}]}, None),
    ],
)
def test_sides_that_are_no_multiples_of_8_are_told_with_what_will_happen(
    changes: dict[str, Any], words: str | None
) -> None:
    warnings = told(changes, (500, 512))
    assert len(warnings) == bool(words)
    assert all(words in warning.message for warning in warnings if words)


def test_every_rule_has_its_line_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "job-spec.md").read_text(encoding="utf-8")
    section = page.partition("## Known mistakes")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| (?!told|---)", line)]
    assert len(rows) == len(RULES) - 1  # both of lcm and of many steps stand in one line


def test_a_rectangle_worked_on_too_small_is_mended_by_its_own_size() -> None:
    (warning,) = told(masked(GREY, region={"kind": "only_masked", "size": 128}), (2048, 2048))
    assert (warning.path, "prepare" in str(warning.fix)) == ("region.size", False)
    assert "write 512" in str(warning.fix)
