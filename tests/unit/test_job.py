"""Reading and writing job specs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from overpaint_shared.errors import SpecError
from overpaint_shared.job import (
    FEATURES,
    LARGEST_SPEC_BYTES,
    CombinedMask,
    Crop,
    ImageMask,
    Img2Img,
    JobSpec,
    ModelDefaults,
    Sampling,
    Source,
    is_name,
    parse_job,
    reference_kind,
    schema,
)
from tests.unit.spec_strategies import specs

MINIMAL: dict[str, Any] = {
    "version": 1,
    "model": "sd15",
    "source": {"image": "photo.png"},
    "method": {"kind": "img2img"},
}
MASKED = MINIMAL | {
    "mask": {"from": "image", "image": "mask.png"},
    "method": {"kind": "latent_noise_mask"},
}
EVERYTHING = MINIMAL | {
    "loras": [{"name": "ink", "weight": 0.8}],
    "clip_skip": 1,
    "vae": "mse",
    "prepare": [
        {"op": "crop", "x": 0, "y": 0, "width": 512, "height": 512},
        {"op": "scale", "width": 768, "height": 0, "filter": "lanczos", "crop": "disabled"},
        {"op": "scale_by", "factor": 2.0, "filter": "bicubic"},
        {"op": "pad", "left": 0, "top": 0, "right": 128, "bottom": 0, "feathering": 40},
    ],
    "mask": {
        "from": "combine",
        "how": "union",
        "masks": [
            {"from": "image", "image": "mask.png", "channel": "red", "at": "source"},
            {"from": "alpha"},
            {"from": "pad"},
            {
                "from": "clipseg",
                "text": "the hat",
                "threshold": 0.4,
                "dilation_factor": 4,
                "blur": 7.0,
                "segmenter": "clipseg",
                "on_empty": "skip",
            },
        ],
        "ops": [
            {"op": "grow", "by": 6, "tapered": True},
            {"op": "feather", "by": 8},
            {"op": "feather_borders", "left": 0, "top": 0, "right": 0, "bottom": 0},
            {"op": "blur", "radius": 4},
            {"op": "invert"},
            {"op": "threshold", "at": 0.5},
        ],
        "min_coverage": 0.0,
        "max_coverage": 1.0,
    },
    "method": {
        "kind": "controlnet_inpaint",
        "controlnet": "inpaint",
        "strength": 1.0,
        "start": 0.0,
        "end": 1.0,
        "latent": "latent_noise_mask",
        "grow_mask_by": 6,
    },
    "controls": [{"controlnet": "depth", "image": "depth.png", "strength": 1.0, "start": 0.0, "end": 1.0}],
    "prompt": "a (red:1.2) hat",
    "negative_prompt": "",
    "sampling": {
        "seed": 0,
        "steps": 20,
        "cfg": 8.0,
        "guidance": 3.5,
        "sampler": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "differential": True,
        "deterministic": False,
    },
    "region": {"kind": "only_masked", "padding": 32, "size": 512, "threshold": 0.5},
    "finish": [{"op": "scale_by", "factor": 2.0, "filter": "lanczos"}],
    "composite": True,
    "compat": "none",
    "preserve": {"max_outside": 0},
    "output": {"format": "png", "quality": None, "lossless": True, "previews": True, "key": "shots/12.png"},
    "priority": 5,
    "group": "night",
    "labels": {"shot": "12"},
}


def broken(changes: dict[str, Any] | str | bytes) -> SpecError:
    """The error of a spec that must not parse."""
    with pytest.raises(SpecError) as caught:
        parse_job(MINIMAL | changes if isinstance(changes, dict) else changes)
    return caught.value


def paths(changes: dict[str, Any]) -> set[str]:
    return {problem.path for problem in broken(changes).problems}


def test_a_spec_with_every_field_parses_and_comes_back_as_it_was() -> None:
    spec = parse_job(EVERYTHING)
    written = json.loads(spec.to_json())
    assert parse_job(spec.to_json()) == spec
    assert _without_defaults(written, EVERYTHING) == EVERYTHING


def _without_defaults(written: Any, given: Any) -> Any:
    """What was written, reduced to the keys that were given."""
    if isinstance(given, dict):
        return {key: _without_defaults(written[key], value) for key, value in given.items()}
    if isinstance(given, list):
        assert len(written) == len(given)
        return [_without_defaults(*pair) for pair in zip(written, given, strict=True)]
    return written


def test_defaults_are_those_of_the_contract() -> None:
    spec = parse_job(MASKED)
    assert json.loads(spec.to_json()) == MASKED | {
        "loras": [],
        "clip_skip": 0,
        "vae": None,
        "prepare": [],
        "mask": {
            "from": "image",
            "image": "mask.png",
            "channel": "red",
            "at": "source",
            "ops": [],
            "min_coverage": 0.0,
            "max_coverage": 1.0,
        },
        "controls": [],
        "prompt": "",
        "negative_prompt": "",
        "sampling": {
            "seed": None,
            "steps": None,
            "cfg": None,
            "guidance": None,
            "sampler": None,
            "scheduler": None,
            "denoise": None,
            "differential": False,
            "deterministic": False,
        },
        "region": {"kind": "full"},
        "finish": [],
        "composite": True,
        "compat": "none",
        "preserve": None,
        "output": {"format": "png", "quality": None, "lossless": True, "previews": True, "key": None},
        "priority": 5,
        "group": None,
        "labels": {},
    }


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(specs())
def test_whatever_parses_comes_back_from_its_canonical_form(data: dict[str, Any]) -> None:
    try:
        spec = parse_job(data)
    except SpecError as error:
        # Each field is allowed by itself, so only a rule between fields may refuse.
        if not all(_is_a_rule(problem.message) for problem in error.problems):
            raise
        reject()
    text = spec.to_json()
    assert parse_job(text) == spec
    assert parse_job(text).to_json() == text
    assert spec.features() <= FEATURES


def _is_a_rule(message: str) -> bool:
    words = (
        "needs a `mask`",
        "what `pad` added",
        "stitches",
        "what a mask spares",
        "cannot be kept",
        "needs a mask on",
    )
    more = ("greater than `max_coverage`", "comes after `end`", "is always", "means nothing for a lossless")
    return any(word in message for word in (*words, *more))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=300)
@given(JSON_VALUES)
def test_any_json_value_parses_or_raises_a_spec_error(value: Any) -> None:
    for data in (value if isinstance(value, dict) else {"version": value}, json.dumps(value)):
        with pytest.raises(SpecError) as caught:
            parse_job(data)
        str(caught.value).encode()
        json.dumps(caught.value.to_json()).encode()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(sorted(EVERYTHING)), JSON_VALUES)
def test_a_spec_with_one_wrong_part_parses_or_raises_a_spec_error(data: Any, key: str, value: Any) -> None:
    part = EVERYTHING[key]
    if isinstance(part, dict) and data.draw(st.booleans()):
        value = part | {data.draw(st.sampled_from(sorted(part)) | st.text(max_size=4)): value}
    elif isinstance(part, list) and part and data.draw(st.booleans()):
        value = [part[0] | {data.draw(st.sampled_from(sorted(part[0]))): value}, *part[1:]]
    try:
        spec = parse_job(EVERYTHING | {key: value})
    except SpecError as error:
        str(error).encode()
        return
    assert parse_job(spec.to_json()) == spec


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_parse_or_raise_a_spec_error(data: bytes | str) -> None:
    with pytest.raises(SpecError):
        parse_job(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        (
            '{"version": 1,}',
            "last entry, which JSON does not have, line 1, column 14",
        ),
        (
            '{"a": [1,\n 2\t,\n\n ]}',
            "last entry, which JSON does not have, line 2, column 4",
        ),
        ('{"a": 1, // why\n "b": 2}', "a comment, which JSON does not have, line 1, column 10"),
        ('{\n "a": 1}\n /* why */', "a comment, which JSON does not have, line 3, column 2"),
        ('{"a": "// no comment",, "b": 1}', "line 1, column 23"),
        ("[1]", "not an object"),
        ('{"prompt": "a", "prompt": "b"}', 'the key "prompt" twice'),
        ('{"source": {"image": "a", "image": "b"}}', 'the key "image" twice'),
        ('{"sampling": {"cfg": NaN}}', "holds NaN, which is no JSON number"),
        ('{"sampling": {"cfg": -Infinity}}', "holds -Infinity, which is no JSON number"),
        ('{"a":' * 5000, "nested too deep"),
        ("[" * 100_000, "nested too deep"),
        ('{"clip_skip": ' + "9" * 5000 + "}", "cannot be read"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_broken_text_is_refused_with_its_reason(text: str | bytes, says: str) -> None:
    assert says in str(broken(text))


def test_a_number_too_large_for_a_float_is_refused() -> None:
    text = json.dumps(MINIMAL | {"sampling": {"cfg": "X"}}).replace('"X"', "1e999")
    assert "sampling.cfg" in str(broken(text))


def test_a_lone_surrogate_is_refused_and_can_be_printed() -> None:
    error = broken(json.dumps(MINIMAL | {"prompt": "\ud800"}))
    str(error).encode()


def test_a_spec_over_the_size_limit_is_refused_before_it_is_read() -> None:
    fits = "{" + " " * (LARGEST_SPEC_BYTES - 2) + "}"
    assert "is missing" in str(broken(fits))
    for data in (fits + " ", (fits + " ").encode(), "ä" * (LARGEST_SPEC_BYTES // 2 + 1)):
        assert "too large" in str(broken(data))
    assert "too large" in str(broken({"prompt": "x" * 10_000_000}))


def test_a_byte_order_mark_is_let_pass() -> None:
    assert parse_job(b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode()) == parse_job(MINIMAL)


def test_an_object_that_is_no_json_is_refused() -> None:
    looped: dict[str, Any] = {}
    looped["self"] = looped
    for value in (looped, {"model": object()}, {"model": b"x"}):
        with pytest.raises(SpecError):
            parse_job(value)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, "0", "18446744073709551615", "007", None])
def test_a_seed_is_a_number_or_its_digits_or_null(seed: Any) -> None:
    spec = parse_job(MINIMAL | {"sampling": {"seed": seed}})
    assert spec.sampling.seed == (None if seed is None else int(seed))
    assert parse_job(spec.to_json()) == spec


@pytest.mark.parametrize(
    "seed", [-1, 2**64, "18446744073709551616", "-1", "1.0", " 1", "", "x", 1.0, True, "٣"]
)
def test_any_other_seed_is_refused(seed: Any) -> None:
    assert paths({"sampling": {"seed": seed}}) == {"sampling.seed"}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.0}, "version"),
        ({"version": "1"}, "version"),
        ({"clip_skip": "1"}, "clip_skip"),
        ({"clip_skip": True}, "clip_skip"),
        ({"clip_skip": 1.5}, "clip_skip"),
        ({"composite": 1}, "composite"),
        ({"composite": None}, "composite"),
        ({"sampling": {"cfg": "8"}}, "sampling.cfg"),
        ({"sampling": {"cfg": False}}, "sampling.cfg"),
        ({"sampling": {"denoise": 0.009}}, "sampling.denoise"),
        ({"sampling": {"denoise": 1.01}}, "sampling.denoise"),
        ({"sampling": {"steps": 0}}, "sampling.steps"),
        ({"sampling": {"steps": 10_001}}, "sampling.steps"),
        ({"priority": 10}, "priority"),
        ({"loras": [{"name": "a"}] * 17}, "loras"),
        ({"loras": {"name": "a"}}, "loras"),
        ({"prepare": [{"op": "crop", "width": 0, "height": 1}]}, "prepare[0].width"),
        ({"prepare": [{"op": "scale", "width": 16_385, "height": 0}]}, "prepare[0].width"),
        ({"finish": [{"op": "pad"}]}, "finish[0].op"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"prompt": "a\x00b"}, "prompt"),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"labels": {"a\n": "b"}}, "labels.a\\n"),
        ({"labels": {str(i): "" for i in range(33)}}, "labels"),
        ({"group": ""}, "group"),
        ({"output": {"format": "jpeg", "lossless": True}}, "output.lossless"),
        ({"output": {"format": "png", "lossless": False}}, "output.lossless"),
        ({"output": {"format": "webp", "quality": 80}}, "output.quality"),
        ({"output": {"quality": 80}}, "output.quality"),
        ({"controls": [{"controlnet": "a", "image": "b", "start": 0.6, "end": 0.5}]}, "controls[0].start"),
    ],
)
def test_a_wrong_value_is_refused_at_its_path(changes: dict[str, Any], path: str) -> None:
    assert paths(changes) == {path}


@pytest.mark.parametrize("name", ["a", "sd15", "sd-1.5_inpaint", "0", "a" * 64])
def test_a_name_may_be(name: str) -> None:
    assert is_name(name)
    assert parse_job(MINIMAL | {"model": name}).model == name


@pytest.mark.parametrize(
    "name", ["", "SD15", "-a", ".a", "../etc", "a/b", "a b", "a\n", "a" * 65, "ä", "a\x00"]
)
def test_a_name_may_not_be(name: str) -> None:
    assert not is_name(name)
    assert paths({"model": name}) == {"model"}


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("photo.png", "path"),
        ("/tmp/a b/ö.png", "path"),  # noqa: S108
        ("C:\\pictures\\a.png", "path"),
        ("s3://bucket/a/b.png", "s3"),
        ("sha256:" + "0a" * 32, "sha256"),
    ],
)
def test_a_picture_is_named_by(reference: str, kind: str) -> None:
    assert parse_job(MINIMAL | {"source": {"image": reference}}).source.image == reference
    assert reference_kind(reference) == kind


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "a\x00.png",
        "a\n.png",
        "http://host/a.png",
        "file:///etc/passwd",
        "s3://bucket",
        "s3://bucket/",
        "s3:///key",
        "sha256:abc",
        "sha256:" + "0A" * 32,
        "sha256:" + "0a" * 33,
        "x" * 4097,
    ],
)
def test_a_picture_is_not_named_by(reference: str) -> None:
    assert paths({"source": {"image": reference}}) == {"source.image"}


@pytest.mark.parametrize("key", ["a", "a/b.png", "a b", "..a", "a..b", ".a"])
def test_an_output_key_may_be(key: str) -> None:
    assert parse_job(MINIMAL | {"output": {"key": key}}).output.key == key


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "a\x00", "a\nb", "x" * 513, "ü" * 401]
)
def test_an_output_key_may_not_be(key: str) -> None:
    assert paths({"output": {"key": key}}) == {"output.key"}


def test_compat_follows_composite_unless_it_is_written() -> None:
    assert parse_job(MINIMAL).compat == "none"
    assert parse_job(MINIMAL | {"composite": False}).compat == "comfyui"
    assert parse_job(MINIMAL | {"composite": False, "compat": "none"}).compat == "none"
    assert parse_job(MINIMAL | {"compat": "comfyui"}).compat == "comfyui"


def test_loss_follows_the_format_unless_it_is_written() -> None:
    assert parse_job(MINIMAL | {"output": {"format": "jpeg", "quality": 90}}).output.lossy
    assert not parse_job(MINIMAL | {"output": {"format": "webp"}}).output.lossy
    assert parse_job(MINIMAL | {"output": {"format": "webp", "lossless": False, "quality": 80}}).output.lossy


def _nested(levels: int) -> dict[str, Any]:
    mask: dict[str, Any] = {"from": "alpha"}
    for _ in range(levels):
        mask = {"from": "combine", "how": "union", "masks": [mask, {"from": "alpha"}]}
    return mask


@pytest.mark.parametrize("levels", [5, 60, 70, 300])
def test_combined_masks_nested_too_deep_are_refused(levels: int) -> None:
    assert parse_job(MASKED | {"mask": _nested(4)})
    assert broken({"mask": _nested(levels)}).problems


def test_every_picture_of_a_spec_is_found_and_can_be_replaced() -> None:
    inner = {
        "from": "combine",
        "how": "subtract",
        "masks": [{"from": "alpha"}, {"from": "image", "image": "b"}],
    }
    mask = {"from": "combine", "how": "union", "masks": [{"from": "image", "image": "a"}, inner]}
    spec = parse_job(
        MASKED | {"mask": mask, "source": {"image": "a"}, "controls": [{"controlnet": "c", "image": "d"}]}
    )
    assert spec.image_refs() == [
        ("source.image", "a"),
        ("mask.masks[0].image", "a"),
        ("mask.masks[1].masks[1].image", "b"),
        ("controls[0].image", "d"),
    ]
    stored = "sha256:" + "00" * 32
    moved = spec.with_images({"a": stored, "b": "B"})
    assert [reference for _, reference in moved.image_refs()] == [stored, stored, "B", "d"]
    assert moved.with_images({stored: "a", "B": "b"}) == spec
    assert parse_job(moved.to_json()) == moved


def test_with_images_refuses_what_a_spec_would_refuse() -> None:
    with pytest.raises(SpecError):
        parse_job(MASKED).with_images({"mask.png": "http://host/a"})


def test_with_seed_changes_the_seed_alone() -> None:
    spec = parse_job(EVERYTHING)
    seeded = spec.with_seed(2**64 - 1)
    assert seeded.sampling.seed == 2**64 - 1
    assert seeded.with_seed(0) == spec
    for seed in (-1, 2**64, True, "1"):
        with pytest.raises(SpecError, match=r"sampling\.seed"):
            spec.with_seed(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "denoise"),
    [
        ("img2img", 0.6),
        ("latent_noise_mask", 0.8),
        ("vae_encode_inpaint", 1.0),
        ("inpaint_model", 1.0),
    ],
)
def test_resolving_fills_what_is_absent_and_nothing_else(kind: str, denoise: float) -> None:
    defaults = ModelDefaults(steps=7, cfg=3.0, sampler="dpmpp_2m", scheduler="karras", size=64)
    spec = parse_job(MASKED | {"method": {"kind": kind}})
    filled = Sampling(steps=7, cfg=3.0, sampler="dpmpp_2m", scheduler="karras", denoise=denoise)
    assert spec.resolved(defaults).sampling == filled
    written = parse_job(EVERYTHING)
    assert written.resolved(defaults) == written


def test_features_name_all_that_a_worker_must_do() -> None:
    assert parse_job(MINIMAL).features() == {"method:img2img"}
    assert parse_job(EVERYTHING).features() == {
        "method:controlnet_inpaint",
        "mask:combine",
        "mask:image",
        "mask:alpha",
        "mask:pad",
        "mask:clipseg",
        "sampler:euler",
        "scheduler:normal",
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
    }


@pytest.mark.parametrize(
    ("prompt", "weighted"),
    [
        ("a (red) hat", True),
        ("(a:1.3)", True),
        ("a hat :(", False),
        ("a \\(red\\) hat", False),
        ("a ) b (", False),
        ("a \\(red) hat", False),
    ],
)
def test_parentheses_in_a_prompt_are_weights_unless_escaped(prompt: str, weighted: bool) -> None:
    assert ("prompt:weights" in parse_job(MINIMAL | {"prompt": prompt}).features()) is weighted
    assert ("prompt:weights" in parse_job(MINIMAL | {"negative_prompt": prompt}).features()) is weighted


def test_a_spec_is_frozen_and_can_be_built_in_python() -> None:
    spec = JobSpec(version=1, model="sd15", source=Source(image="photo.png"), method=Img2Img())
    assert spec == parse_job(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        spec.model = "other"
    assert isinstance(parse_job(EVERYTHING).mask, CombinedMask)
    assert ImageMask(image="a").from_ == "image"
    assert Crop(width=1, height=1).op == "crop"


def test_the_schema_describes_every_field_and_requires_the_tags() -> None:
    text = schema()
    for node in [text, *text["$defs"].values()]:
        assert node["additionalProperties"] is False
        for name, field in node["properties"].items():
            target = text["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1], {})
            assert field.get("description") or target.get("description"), (node["title"], name)
            if "const" in field and name in {"op", "from", "kind"}:
                assert name in node["required"], (node["title"], name)


def test_every_number_of_the_schema_has_a_range_that_its_description_names() -> None:
    found = 0
    for node in [schema(), *schema()["$defs"].values()]:
        for name, field in node["properties"].items():
            for option in [field, *field.get("anyOf", ())]:
                if option.get("type") in {"integer", "number"} and "const" not in option:
                    for bound in (option["minimum"], option["maximum"]):
                        written = re.compile(rf"(?<![\d.]){re.escape(str(bound))}(?!\d)")
                        assert written.search(field["description"]), (node["title"], name, bound)
                        found += 1
    assert found > 60


@pytest.mark.parametrize(
    "case", sorted(Path(__file__).parent.parent.glob("data/parity/cases/*/job.json")), ids=str
)
def test_the_reference_cases_parse(case: Path) -> None:
    assert parse_job(case.read_bytes()).compat == "comfyui"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"sampling": {"cfg": NaN}}', "sampling.cfg"),
        ('{"mask": {"ops": [{"op": "invert"}, {"op": "blur", "radius": -Infinity}]}}', "mask.ops[1].radius"),
        ('{"a": [NaN, NaN]} trailing', ""),
    ],
)
def test_a_number_that_json_does_not_have_is_told_with_its_place(text: str, path: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(text)
    assert caught.value.field == (path or None)
    assert f"{path or 'the text'}{':' if path else ''} holds " in str(caught.value)
