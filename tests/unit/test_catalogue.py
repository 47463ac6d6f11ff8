"""Checking a spec against what live workers offer and what the operator allows."""

import re
from typing import Any

import pytest

from overpaint_shared.catalogue import Catalogue, SpecWarning, check
from overpaint_shared.errors import Problem, SpecError
from overpaint_shared.job import FEATURES, ModelDefaults, parse_job
from overpaint_shared.ledger.records import WorkerRecord
from overpaint_shared.offers import ModelTraits
from overpaint_shared.settings import Limits
from tests.unit.test_job import MASKED, MINIMAL

DEFAULTS = ModelDefaults(steps=20, cfg=7.0, sampler="euler", scheduler="normal", size=512)


def model(name: str = "sd15", **more: Any) -> dict[str, Any]:
    traits: dict[str, Any] = {"family": "sd", "sha256": "a" * 64, "channels": 4, "defaults": DEFAULTS}
    return ModelTraits(name=name, kind="model", **(traits | more)).to_json()


def entry(kind: Any, name: str, **more: Any) -> dict[str, Any]:
    return ModelTraits(name=name, kind=kind, **({"family": "sd"} | more)).to_json()


def worker(*catalogue: dict[str, Any], name: str = "w1", **more: Any) -> WorkerRecord:
    record: dict[str, Any] = {"features": FEATURES, "models": ()}
    return WorkerRecord(
        id=name,
        name=name,
        host="h",
        device="cpu",
        slots=1,
        version="1",
        catalogue=catalogue,
        **(record | more),
    )


def checked(
    changes: dict[str, Any], *workers: WorkerRecord, limits: Limits | None = None
) -> tuple[SpecWarning, ...]:
    return check(parse_job(MINIMAL | changes), Catalogue.merge(workers), limits or Limits())


def refused(changes: dict[str, Any], *workers: WorkerRecord, limits: Limits | None = None) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        checked(changes, *workers, limits=limits)
    return caught.value.problems


def test_a_spec_that_a_live_worker_can_render_passes_without_a_word() -> None:
    assert checked({}, worker(model())) == ()


def test_with_no_worker_alive_nothing_of_theirs_is_refused_but_a_warning_says_so() -> None:
    (warning,) = checked({"model": "whatever"})
    assert "no worker is alive" in str(warning)
    assert warning.fix


def test_the_operators_limits_hold_with_and_without_workers() -> None:
    limits = Limits(max_steps=30)
    for workers in ((), (worker(model()),)):
        (problem,) = refused({"sampling": {"steps": 31}}, *workers, limits=limits)
        assert (problem.path, problem.given, problem.allowed) == ("sampling.steps", "31", "1 to 30")
        assert "31" in str(problem)
        checked({"sampling": {"steps": 30}}, *workers, limits=limits)


def test_default_steps_over_the_limit_are_refused_too() -> None:
    (problem,) = refused({}, worker(model()), limits=Limits(max_steps=19))
    assert problem.path == "sampling.steps"


def test_a_scale_to_more_pixels_than_allowed_is_refused() -> None:
    scale = [{"op": "scale", "width": 100, "height": 101}]
    limits = Limits(max_output_pixels=10_000)
    for part in ("prepare", "finish"):
        (problem,) = refused({part: scale}, limits=limits)
        assert problem.path == f"{part}[0]"
        checked({part: [{"op": "scale", "width": 100, "height": 100}]}, limits=limits)


def test_an_unknown_model_names_the_nearest() -> None:
    (problem,) = refused({"model": "sd51"}, worker(model(), model("sdxl")))
    assert problem.path == "model"
    assert problem.suggestion == "sd15"
    assert problem.allowed == "sd15, sdxl"


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"vae": "x"}, "vae"),
        ({"loras": [{"name": "ink"}, {"name": "x"}]}, "loras[1].name"),
        ({"controls": [{"controlnet": "x", "image": "a"}]}, "controls[0].controlnet"),
        (MASKED | {"method": {"kind": "controlnet_inpaint", "controlnet": "x"}}, "method.controlnet"),
        ({"mask": {"from": "clipseg", "text": "hat", "segmenter": "x"}}, "mask.segmenter"),
    ],
)
def test_every_other_unknown_name_is_refused_at_its_path(changes: dict[str, Any], path: str) -> None:
    (problem,) = refused(changes, worker(model(), entry("lora", "ink")))
    assert problem.path == path
    kind = {"vae": "vae", "loras": "lora", "mask": "segmenter"}.get(re.split(r"[.\[]", path)[0], "controlnet")
    checked(changes, worker(model(), entry("lora", "ink"), entry(kind, "x")))


def test_a_name_with_two_hashes_is_refused_and_the_workers_are_named() -> None:
    two = (worker(model(), name="w1"), worker(model(sha256="b" * 64), name="w2"))
    (problem,) = refused({}, *two)
    assert problem.path == "model"
    assert "w1" in problem.message
    assert "w2" in problem.message
    checked({}, worker(model(), name="w1"), worker(model(), name="w2"), worker(model(sha256=None), name="w3"))


@pytest.mark.parametrize("kind", ["controlnet", "lora", "vae"])
def test_an_entry_of_another_family_is_refused_with_those_that_fit(kind: str) -> None:
    changes = {
        "controlnet": {"controls": [{"controlnet": "x", "image": "a"}]},
        "lora": {"loras": [{"name": "x"}]},
        "vae": {"vae": "x"},
    }[kind]
    there = worker(model(), entry(kind, "x", family="sdxl"), entry(kind, "fits"))
    (problem,) = refused(changes, there)
    assert "sdxl" in problem.message
    assert problem.allowed == "fits"
    checked(changes, worker(model(), entry(kind, "x", family=None)))


def test_an_entry_for_another_text_encoder_is_refused() -> None:
    loras = {"loras": [{"name": "x"}]}
    (problem,) = refused(loras, worker(model(context_width=768), entry("lora", "x", context_width=1024)))
    assert "1024" in problem.message
    checked(loras, worker(model(context_width=768), entry("lora", "x", context_width=768)))


def test_the_inpaint_model_method_needs_nine_channels() -> None:
    changes = MASKED | {"method": {"kind": "inpaint_model"}}
    (problem,) = refused(changes, worker(model(), model("sd15-inpaint", channels=9)))
    assert problem.path == "method.kind"
    assert "sd15-inpaint" in str(problem.allowed)
    checked(changes | {"model": "sd15-inpaint"}, worker(model("sd15-inpaint", channels=9)))


@pytest.mark.parametrize(
    ("changes", "feature", "path"),
    [
        ({"sampling": {"sampler": "heun"}}, "sampler:heun", "sampling.sampler"),
        ({"sampling": {"scheduler": "beta"}}, "scheduler:beta", "sampling.scheduler"),
        (MASKED, "method:latent_noise_mask", "method.kind"),
        (MASKED, "mask:image", "mask.from"),
        ({"finish": [{"op": "scale_by", "factor": 2}]}, "finish", "finish"),
        ({"prompt": "a (red:1.2) hat"}, "prompt:weights", "prompt"),
        ({}, "sampler:euler", "sampling.sampler"),
    ],
)
def test_what_no_live_worker_can_do_is_refused_and_named(
    changes: dict[str, Any], feature: str, path: str
) -> None:
    (problem,) = refused(changes, worker(model(), features=FEATURES - {feature}))
    assert problem.path == path
    assert feature in problem.message
    checked(changes, worker(model(), features=FEATURES - {feature}), worker(model(), name="w2"))


def test_a_feature_counts_only_on_a_worker_that_has_the_model() -> None:
    changes = {"sampling": {"sampler": "heun"}}
    other = worker(model("sdxl"), name="w2")
    assert refused(changes, worker(model(), features=FEATURES - {"sampler:heun"}), other)


def test_entries_that_no_one_worker_has_together_are_refused() -> None:
    changes = {"loras": [{"name": "ink"}]}
    (problem,) = refused(changes, worker(model()), worker(entry("lora", "ink"), name="w2"))
    assert "LoRA 'ink'" in problem.message
    assert "model 'sd15'" in problem.message


def test_a_worker_serves_only_the_models_whose_queues_it_reads() -> None:
    both = (model(), model("sdxl"))
    assert refused({}, worker(*both, models=("sdxl",)))
    checked({"model": "sdxl"}, worker(*both, models=("sdxl",)))


def test_workers_with_different_defaults_bring_a_warning_unless_all_is_written() -> None:
    other = ModelDefaults(steps=20, cfg=7.0, sampler="euler", scheduler="karras", size=512)
    two = (worker(model()), worker(model(defaults=other), name="w2"))
    (warning,) = checked({}, *two)
    assert warning.path == "sampling"
    assert "scheduler" in str(warning)
    assert checked({"sampling": {"scheduler": "simple"}}, *two) == ()


def test_what_a_newer_worker_says_does_not_stop_an_older_producer() -> None:
    newer = model() | {"colour": "red"}
    newer["defaults"] = newer["defaults"] | {"sampler": "from_the_future", "shift": 3}
    strange = [{"name": "x", "kind": "upscaler"}, {"kind": "model"}, {}]
    catalogue = Catalogue.merge([worker(newer, *strange)])
    assert catalogue.names("model") == ["sd15"]
    assert catalogue.defaults("sd15") is None
    assert [traits.name for traits in catalogue.entries()] == ["sd15"]
    assert check(parse_job(MINIMAL), catalogue, Limits()) == ()


def test_traits_come_back_from_their_json() -> None:
    traits = ModelTraits.from_json(model(prediction="v", context_width=1024))
    assert ModelTraits.from_json(traits.to_json()) == traits
    assert traits.defaults == DEFAULTS
