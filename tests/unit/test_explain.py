"""What a wrong spec's author reads."""

from typing import Any

import pytest

from overpaint_shared.errors import OverpaintError, Problem, SpecError
from overpaint_shared.job import parse_job
from tests.unit.test_job import MASKED, MINIMAL


def problems(changes: dict[str, Any]) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse_job(MINIMAL | changes, where="hat.json")
    return caught.value.problems


def only(changes: dict[str, Any]) -> Problem:
    (problem,) = problems(changes)
    return problem


def test_the_text_names_the_file_the_place_the_value_what_is_allowed_and_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(MINIMAL | {"sampling": {"scheduler": "karas", "steps": 0}}, where="hat.json")
    assert str(caught.value) == (
        "hat.json is wrong:\n"
        "  sampling.steps: 0 is too small. Allowed: 1 to 10000.\n"
        '  sampling.scheduler: "karas" is not known here. Did you mean karras? Allowed: normal, karras, '
        "exponential, sgm_uniform, simple, ddim_uniform, beta, linear_quadratic, kl_optimal."
    )


def test_programs_get_the_same_as_json_and_back() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(MINIMAL | {"sampling": {"sampler": "eular"}})
    data = caught.value.to_json()
    assert data["code"] == "spec"
    assert data["field"] == "sampling.sampler"
    assert data["problems"][0]["given"] == '"eular"'
    assert data["problems"][0]["suggestion"] == "euler"
    again = OverpaintError.from_json(data)
    assert isinstance(again, SpecError)
    assert again.problems == caught.value.problems
    assert str(again) == str(caught.value)


def test_an_unknown_key_names_the_nearest_key_of_its_own_object() -> None:
    problem = only({"sampling": {"cgf": 3}})
    assert (problem.path, problem.suggestion) == ("sampling.cgf", "cfg")
    assert problem.allowed
    assert "denoise" in problem.allowed
    assert "model" not in problem.allowed
    assert only({"Prompt": "x"}).suggestion == "prompt"
    assert only({"prepare": [{"op": "scale", "width": 1, "hight": 2, "height": 2}]}).suggestion == "height"


def test_a_key_that_belongs_one_level_down_is_told_with_its_path() -> None:
    problem = only({"denoise": 0.5})
    assert (problem.path, problem.suggestion) == ("denoise", "sampling.denoise")
    assert only({"cgf": 3}).suggestion != "sampling.cgf"


def test_an_unknown_tag_lists_the_tags_with_the_nearest_and_nothing_else() -> None:
    problem = only({"prepare": [{"op": "crop", "width": 1, "height": 1}, {"op": "scaleby", "factor": "x"}]})
    assert problem.path == "prepare[1].op"
    assert problem.suggestion == "scale_by"
    assert problem.allowed == "crop, scale, scale_by, pad"
    assert only({"method": {"kind": "img2imp"}}).suggestion == "img2img"
    assert only({"mask": {"from": "imag"}}).path == "mask.from"


def test_a_bare_word_for_an_object_is_told_how_the_object_begins() -> None:
    (problem,) = problems({"method": "inpaint"})
    assert problem.path == "method"
    assert problem.suggestion == '{"kind": "inpaint_model"}'
    assert '{"kind": "latent_noise_mask"}' in (problem.allowed or "")


def test_a_missing_tag_is_named() -> None:
    problem = only({"mask": {"image": "mask.png"}})
    assert problem.path == "mask.from"
    assert "missing" in problem.message


def test_a_union_reports_only_the_faults_of_the_shape_that_was_chosen() -> None:
    found = problems(
        {"mask": {"from": "image", "image": 3, "channel": "rde"}, "method": {"kind": "latent_noise_mask"}}
    )
    assert [problem.path for problem in found] == ["mask.image", "mask.channel"]


def test_a_key_with_the_name_of_its_tag_keeps_its_path() -> None:
    assert only({"mask": {"from": "image", "image": ""}}).path == "mask.image"


def test_paths_into_nested_masks_are_as_written() -> None:
    mask = {
        "from": "combine",
        "how": "union",
        "masks": [{"from": "alpha"}, {"from": "image", "image": "a", "ops": [{"op": "grow", "by": 1.5}]}],
    }
    problem = only({"mask": mask})
    assert problem.path == "mask.masks[1].ops[0].by"
    assert problem.given == "1.5"
    assert problem.allowed == "-16384 to 16384"


def test_a_wrong_member_of_a_list_is_not_also_a_list_that_is_too_short() -> None:
    mask = {"from": "combine", "how": "union", "masks": [{"from": "alpha"}, {"from": "alpha", "x": 1}]}
    assert only({"mask": mask}).path == "mask.masks[1].x"


def test_a_fault_elsewhere_does_not_blame_fields_that_follow_from_others() -> None:
    assert [problem.path for problem in problems({"model": "?"})] == ["model"]
    assert [problem.path for problem in problems({"output": {"format": "gif"}})] == ["output.format"]


def test_long_values_are_shortened() -> None:
    problem = only({"model": "x" * 5000})
    assert problem.given is not None
    assert len(problem.given) <= 80
    assert len(str(problem)) < 400


def test_at_most_twenty_problems_are_told_and_the_rest_counted() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(MINIMAL | {f"key{i}": 1 for i in range(25)})
    assert len(caught.value.problems) == 20
    assert "and 5 more" in str(caught.value)


def test_all_broken_rules_are_told_at_once() -> None:
    found = problems(
        {
            "method": {"kind": "inpaint_model"},
            "region": {"kind": "only_masked"},
            "composite": False,
            "preserve": {},
            "sampling": {"differential": True},
            "output": {"format": "jpeg"},
        }
    )
    assert sorted(problem.path for problem in found) == [
        "method.kind",
        "preserve",
        "preserve",
        "region.kind",
        "region.kind",
        "sampling.differential",
    ]


@pytest.mark.parametrize("kind", ["vae_encode_inpaint", "latent_noise_mask", "inpaint_model"])
def test_a_method_that_needs_a_mask_is_refused_without_one(kind: str) -> None:
    assert only({"method": {"kind": kind}}).path == "method.kind"
    assert parse_job(MASKED | {"method": {"kind": kind}})


def test_controlnet_inpaint_needs_a_mask() -> None:
    method = {"kind": "controlnet_inpaint", "controlnet": "c"}
    assert only({"method": method}).path == "method.kind"
    assert parse_job(MASKED | {"method": method})


def test_a_pad_mask_needs_a_pad_that_adds_something() -> None:
    mask = {"from": "pad"}
    for prepare in ([], [{"op": "pad"}], [{"op": "scale_by", "factor": 2}]):
        assert only({"mask": mask, "prepare": prepare}).path == "mask.from"
    nested = {"from": "combine", "how": "union", "masks": [{"from": "alpha"}, mask]}
    assert only({"mask": nested}).path == "mask.masks[1].from"
    assert parse_job(MINIMAL | {"mask": mask, "prepare": [{"op": "pad", "right": 1}]})


def test_working_on_the_mask_only_needs_a_mask_and_composite() -> None:
    region = {"kind": "only_masked"}
    assert "mask" in only({"region": region}).message
    assert "composite" in only({"mask": MASKED["mask"], "region": region, "composite": False}).message
    assert parse_job(MASKED | {"region": region})


@pytest.mark.parametrize("output", [{"format": "jpeg"}, {"format": "webp", "lossless": False}])
def test_preserve_is_refused_for_a_lossy_output(output: dict[str, Any]) -> None:
    preserve = {"max_outside": 0}
    problem = only({"mask": MASKED["mask"], "preserve": preserve, "output": output})
    assert problem.path == "preserve"
    assert output["format"] in problem.message
    assert parse_job(MASKED | {"preserve": preserve, "output": {"format": "webp"}})


def test_differential_needs_a_method_that_masks_the_noise() -> None:
    sampling = {"differential": True}
    assert only({"sampling": sampling}).path == "sampling.differential"
    assert only({"mask": MASKED["mask"], "sampling": sampling}).path == "sampling.differential"
    assert parse_job(MASKED | {"sampling": sampling})


def test_coverage_limits_must_leave_something() -> None:
    mask = MASKED["mask"]
    assert only({"mask": mask | {"min_coverage": 0.5, "max_coverage": 0.4}}).path == "mask.min_coverage"
    assert parse_job(MASKED | {"mask": mask | {"min_coverage": 0.4, "max_coverage": 0.4}})


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x9b2J", "a\u202eb", "a\u2028b", "\r", "\x7f"])
def test_a_strangers_text_cannot_move_the_terminal_of_who_reads_the_message(hostile: str) -> None:
    for changes in ({hostile: 1}, {"labels": {hostile: 1}}, {"model": hostile}):
        problem = problems(changes)[0]
        assert hostile not in str(problem)
        assert f"\\u{ord(next(c for c in hostile if c != 'a')):04x}" in str(problem) or "\\r" in str(problem)


def test_a_key_as_long_as_a_page_is_shortened_in_its_path() -> None:
    problem = only({"k" * 3000: 1})
    assert len(problem.path) <= 80
    assert problem.path.startswith("kkk")
