"""ComfyUI workflows become jobs, node by node, or are refused by node and reason."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_producer.workflow import Names, convert
from overpaint_shared.errors import SpecError
from overpaint_shared.offers import Catalogue
from tests.unit.test_catalogue import entry, model, worker
from tests.unit.workflows import Graph, changed, graph, grey, node, noise, problem, problems, spec

# ------------------------------------------------------------------------------------------- methods


def test_a_plain_graph_is_image_to_image_with_all_of_its_settings() -> None:
    assert spec(graph()) == {
        "version": 1,
        "model": "v1-5-pruned",
        "source": {"image": "photo.png"},
        "method": {"kind": "img2img"},
        "prompt": "a red hat",
        "negative_prompt": "blurry",
        "sampling": {
            "seed": 7,
            "steps": 20,
            "cfg": 7.5,
            "sampler": "euler",
            "scheduler": "karras",
            "denoise": 0.6,
        },
        "composite": False,
        "compat": "comfyui",
    }


def test_vae_encode_for_inpainting_takes_its_mask_from_the_pictures_transparency() -> None:
    job = spec(graph(grey()))
    assert job["method"] == {"kind": "vae_encode_inpaint", "grow_mask_by": 6}
    assert job["mask"] == {"from": "alpha"}


def test_set_latent_noise_mask_takes_any_channel_of_a_file() -> None:
    mask = node("LoadImageMask", image="mask.png", channel="green")
    job = spec(graph(**noise(["11", 0]), n11=mask))
    assert job["method"] == {"kind": "latent_noise_mask"}
    assert job["mask"] == {"from": "image", "image": "mask.png", "channel": "green", "at": "source"}


def inpaint_model(**more: Any) -> Graph:
    made = graph(
        node(
            "InpaintModelConditioning",
            positive=["6", 0], negative=["7", 0], vae=["4", 2],
            pixels=["10", 0], mask=["10", 1], noise_mask=True,
        )
    )  # fmt: skip
    return changed(
        changed(made, "3", positive=["5", 0], negative=["5", 1], latent_image=["5", 2]), "5", **more
    )


def test_inpaint_model_conditioning_is_the_method_of_nine_channel_models() -> None:
    assert spec(inpaint_model())["method"] == {"kind": "inpaint_model"}
    assert spec(inpaint_model(noise_mask=None))["method"] == {"kind": "inpaint_model"}


def test_inpaint_model_conditioning_is_refused_without_noise_mask_or_in_parts() -> None:
    assert problem(inpaint_model(noise_mask=False)).path == "node 5 (InpaintModelConditioning).noise_mask"
    assert problem(changed(inpaint_model(), "3", positive=["6", 0])).path == "node 3 (KSampler).positive"
    other = inpaint_model() | {"50": node("VAEEncode", pixels=["10", 0], vae=["4", 2])}
    assert problem(changed(other, "3", latent_image=["50", 0])).path == "node 3 (KSampler).latent_image"


def test_texts_and_latent_of_two_inpaint_model_conditionings_are_refused() -> None:
    made = inpaint_model()
    other = changed(made, "5", mask=["51", 0])["5"]
    mixed = changed(
        made | {"50": other, "51": node("InvertMask", mask=["10", 1])}, "3", latent_image=["50", 2]
    )
    assert problem(mixed).path == "node 3 (KSampler).positive"


def test_no_latent_has_two_noise_masks() -> None:
    made = changed(graph(**noise()), "5", samples=["51", 0]) | {"51": grey()}
    assert problem(made).path == "node 5 (SetLatentNoiseMask).samples"


def controlled(latent: Graph, hint_mask: list[Any] | None = None, **more: Any) -> Graph:
    """ControlNet Inpaint."""
    made = latent | {
        "20": node("ControlNetLoader", control_net_name="control_v11p_sd15_inpaint.pth"),
        "21": node("InpaintPreprocessor", image=["10", 0], mask=hint_mask or ["10", 1]),
        "22": node(
            "ControlNetApplyAdvanced",
            positive=["6", 0], negative=["7", 0], control_net=["20", 0], image=["21", 0],
            strength=0.8, start_percent=0.1, end_percent=0.6,
        ),
    }  # fmt: skip
    return changed(changed(made, "3", positive=["22", 0], negative=["22", 1]), "22", **more)


@pytest.mark.parametrize(
    ("latent", "told"),
    [
        (graph(grey()), {"latent": "vae_encode_inpaint", "grow_mask_by": 6}),
        (graph(**noise()), {"latent": "latent_noise_mask"}),
    ],
    ids=["grey", "noise mask"],
)
def test_an_inpainting_hint_makes_controlnet_inpaint_over_either_latent(latent: Graph, told: Any) -> None:
    assert spec(controlled(latent))["method"] == {
        "kind": "controlnet_inpaint",
        "controlnet": "control_v11p_sd15_inpaint",
        "strength": 0.8,
        "start": 0.1,
        "end": 0.6,
        **told,
    }


def test_a_hint_of_another_mask_than_the_latents_is_refused() -> None:
    made = controlled(graph(grey()), ["23", 0]) | {"23": node("InvertMask", mask=["10", 1])}
    assert problem(made).path == "node 21 (InpaintPreprocessor).mask"


def test_a_hint_for_repainting_needs_a_mask_on_the_noise() -> None:
    found = problem(controlled(graph()))
    assert (found.path, "sets no mask" in found.message) == ("node 22 (ControlNetApplyAdvanced).image", True)


def test_a_second_hint_for_repainting_is_refused() -> None:
    made = controlled(graph(grey()))
    again = changed(made, "22", positive=["22", 0], negative=["22", 1])["22"]
    found = problem(changed(made | {"24": again}, "3", positive=["24", 0], negative=["24", 1]))
    assert (found.path, "second" in found.message) == ("node 24 (ControlNetApplyAdvanced).image", True)


def test_a_black_hint_is_refused() -> None:
    made = changed(controlled(graph(grey())), "21", black_pixel_for_xinsir_cn=True)
    assert problem(made).path == "node 21 (InpaintPreprocessor).black_pixel_for_xinsir_cn"


def hinted(**more: Any) -> Graph:
    made = controlled(graph()) | {"21": node("LoadImage", image="depth.png")}
    return changed(made, "22", **more)


def test_any_other_hint_is_one_of_the_controls() -> None:
    job = spec(hinted())
    (control,) = job["controls"]
    assert (control["image"], control["strength"], job["method"]["kind"]) == ("depth.png", 0.8, "img2img")


def test_a_controlnet_of_strength_0_is_none() -> None:
    assert "controls" not in spec(hinted(strength=0))


def test_a_hint_that_the_graph_changes_is_refused() -> None:
    scaled = node("ImageScaleBy", image=["21", 0], upscale_method="area", scale_by=2.0)
    made = changed(hinted(), "22", image=["23", 0]) | {"23": scaled}
    assert problem(made).path == "node 22 (ControlNetApplyAdvanced).image"


def test_the_old_apply_node_acts_on_both_texts_and_the_new_one_on_those_it_is_given() -> None:
    made = hinted()
    old = node("ControlNetApply", conditioning=["6", 0], control_net=["20", 0], image=["21", 0], strength=0.5)
    assert spec(changed(made | {"22": old}, "3", negative=["7", 0]))["controls"][0]["end"] == 1.0
    assert problem(changed(made, "3", negative=["7", 0])).path == "node 22 (ControlNetApplyAdvanced)"


def test_a_shuffle_controlnet_is_refused_since_the_reference_averages_it() -> None:
    made = changed(hinted(), "20", control_net_name="control_v11e_sd15_shuffle.pth")
    assert problem(made).path == "node 20 (ControlNetLoader).control_net_name"


# ------------------------------------------------------------------------------------------- models


def test_loras_give_their_weight_to_model_and_text_alike() -> None:
    lora = node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="ink.safetensors",
                strength_model=0.8, strength_clip=0.8)  # fmt: skip
    made = graph(n12=lora)
    for name, inputs in {
        "3": {"model": ["12", 0]},
        "6": {"clip": ["12", 1]},
        "7": {"clip": ["12", 1]},
    }.items():
        made = changed(made, name, **inputs)
    assert spec(made)["loras"] == [{"name": "ink", "weight": 0.8}]
    assert "loras" not in spec(changed(made, "12", strength_model=0, strength_clip=0))
    assert {each.path for each in problems(changed(made, "12", strength_clip=0.5))} == {
        "node 3 (KSampler).positive"
    }
    assert problem(changed(made, "7", clip=["4", 1])).path == "node 3 (KSampler).negative"


def test_clip_set_last_layer_counts_from_the_last() -> None:
    made = graph(n12=node("CLIPSetLastLayer", clip=["4", 1], stop_at_clip_layer=-2))
    made = changed(changed(made, "6", clip=["12", 0]), "7", clip=["12", 0])
    assert spec(made)["clip_skip"] == 1
    assert spec(changed(made, "12", stop_at_clip_layer=-1))["clip_skip"] == 0
    assert (
        problem(changed(made, "12", stop_at_clip_layer=-20)).path
        == "node 12 (CLIPSetLastLayer).stop_at_clip_layer"
    )
    assert problem(changed(made, "7", clip=["4", 1])).path == "node 3 (KSampler).negative"


def test_clip_set_last_layer_of_other_families_is_taken_where_it_means_the_same() -> None:
    made = graph(n12=node("CLIPSetLastLayer", clip=["4", 1], stop_at_clip_layer=-2))
    made = changed(changed(made, "6", clip=["12", 0]), "7", clip=["12", 0])
    sdxl = Names(Catalogue.merge([worker(model("v1-5-pruned", family="sdxl"))]))
    for stop, skipped in ((-2, 1), (-3, 2), (-12, 11)):
        assert spec(changed(made, "12", stop_at_clip_layer=stop), names=sdxl)["clip_skip"] == skipped
    very_last = problem(changed(made, "12", stop_at_clip_layer=-1), names=sdxl)
    assert (very_last.given, very_last.path) == ("-1", "node 12 (CLIPSetLastLayer).stop_at_clip_layer")
    assert "family sdxl" in very_last.message
    second = Names(Catalogue.merge([worker(model("v1-5-pruned", family="sd", context_width=1024))]))
    assert "does not begin there" in problem(made, names=second).message


def test_differential_diffusion_needs_a_mask_and_its_full_strength() -> None:
    extra = {"n12": node("DifferentialDiffusion", model=["4", 0])}
    assert spec(changed(graph(grey(), **extra), "3", model=["12", 0]))["sampling"]["differential"] is True
    unmasked = changed(graph(**extra), "3", model=["12", 0])
    assert "differential" not in spec(unmasked)["sampling"]
    assert problem(changed(unmasked, "12", strength=0.5)).path == "node 12 (DifferentialDiffusion).strength"


def test_another_vae_is_named_and_must_encode_and_decode() -> None:
    made = changed(graph(n12=node("VAELoader", vae_name="ft-mse.safetensors")), "8", vae=["12", 0])
    assert problem(made).path == "node 8 (VAEDecode).vae"
    assert spec(changed(made, "5", vae=["12", 0]))["vae"] == "ft-mse"


def test_parts_of_another_checkpoint_are_refused() -> None:
    made = graph(n12=node("CheckpointLoaderSimple", ckpt_name="other.safetensors"))
    assert problem(changed(made, "7", clip=["12", 1])).path == "node 3 (KSampler).negative"
    texts = changed(changed(made, "7", clip=["12", 1]), "6", clip=["12", 1])
    assert problem(texts).path == "node 3 (KSampler).positive"
    both = changed(changed(made, "5", vae=["12", 2]), "8", vae=["12", 2])
    assert problem(both).path == "node 8 (VAEDecode).vae"


def test_an_embedding_in_a_prompt_is_refused() -> None:
    assert (
        problem(changed(graph(), "7", text="ugly, embedding:EasyNegative")).path
        == "node 7 (CLIPTextEncode).text"
    )


# ------------------------------------------------------------------------------------------- names


def test_names_come_from_the_map_then_from_the_workers() -> None:
    catalogue = Catalogue.merge([worker(model("v1.5-pruned"), model("other"), entry("vae", "mse"))])
    assert spec(graph(), names=Names(catalogue))["model"] == "v1.5-pruned"
    for key in ("v1-5-pruned.safetensors", "v1-5-pruned"):
        assert spec(graph(), names=Names(catalogue, {key: "other"}))["model"] == "other"
    foldered = changed(graph(), "4", ckpt_name="SD15\\v1-5-pruned.safetensors")
    assert spec(foldered, names=Names(catalogue, {"v1-5-pruned.safetensors": "other"}))["model"] == "other"


def test_a_file_that_is_only_like_a_name_is_not_taken_for_it() -> None:
    found = problem(graph(), names=Names(Catalogue.merge([worker(model("v1-5"), model("flux"))])))
    assert found.path == "node 4 (CheckpointLoaderSimple).ckpt_name"
    assert (found.suggestion, "--model-map" in str(found.allowed)) == ("v1-5", True)


def test_a_file_that_two_names_fit_is_not_guessed() -> None:
    two = Names(Catalogue.merge([worker(model("v1-5-pruned"), model("v1.5.pruned"))]))
    assert "2 entries" in problem(graph(), names=two).message


def test_without_workers_a_name_is_made_up_with_a_note_or_refused() -> None:
    (job,) = convert(graph()).jobs
    assert (job.spec["model"], "--model-map" in job.notes[0]) == ("v1-5-pruned", True)
    assert "no worker is alive" in problem(graph(), names=Names(may_guess=False)).message
    assert problem(changed(graph(), "4", ckpt_name="模型.ckpt")).path.endswith("ckpt_name")


# ------------------------------------------------------------------------------------------- samplers


def advanced(**more: Any) -> Graph:
    made = graph()
    inputs = {name: value for name, value in made["3"]["inputs"].items() if name not in {"seed", "denoise"}}
    inputs |= {"noise_seed": 9, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
    inputs |= {"return_with_leftover_noise": "disable"} | more
    return made | {"3": node("KSamplerAdvanced", **inputs)}


def test_an_advanced_sampler_that_runs_all_steps_is_a_plain_one() -> None:
    sampling = spec(advanced())["sampling"]
    assert (sampling["seed"], sampling["steps"], sampling["denoise"]) == (9, 20, 1.0)


@given(st.integers(2, 2000), st.data())
@settings(deadline=None, max_examples=60)
def test_a_late_start_is_the_denoise_whose_schedule_is_as_long(total: int, data: Any) -> None:
    start = data.draw(st.integers(1, total - max(1, total // 50)))
    sampling = spec(advanced(steps=total, start_at_step=start))["sampling"]
    assert sampling["steps"] == total - start
    assert int(sampling["steps"] / sampling["denoise"]) == total
    assert sampling["denoise"] < 0.9999


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"add_noise": "disable"}, "add_noise"),
        ({"end_at_step": 19}, "end_at_step"),
        ({"end_at_step": 20, "scheduler": "ddim_uniform"}, "end_at_step"),
        ({"start_at_step": 5, "scheduler": "beta"}, "start_at_step"),
        ({"start_at_step": 20}, "start_at_step"),
        ({"steps": 2000, "start_at_step": 1999}, "start_at_step"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_an_advanced_sampler_that_is_no_plain_one_is_refused(inputs: Any, name: str) -> None:
    assert problem(advanced(**inputs)).path == f"node 3 (KSamplerAdvanced).{name}"


def test_two_passes_are_refused() -> None:
    again = changed(graph(), "3", latent_image=["31", 0])
    first = {"31": graph()["3"]}
    assert problem(again | first).path == "node 3 (KSampler).latent_image"
    pixels = changed(graph(), "5", pixels=["32", 0]) | {
        "32": node("VAEDecode", samples=["33", 0], vae=["4", 2]),
        "33": changed(graph(), "3", latent_image=["34", 0])["3"],
        "34": node("VAEEncode", pixels=["10", 0], vae=["4", 2]),
    }
    assert problem(pixels).path == "node 5 (VAEEncode).pixels"


# ------------------------------------------------------------------------------------------- outputs


def test_two_nodes_that_show_one_picture_are_one_job_and_two_pictures_two() -> None:
    preview = node("PreviewImage", images=["8", 0])
    (job,) = convert(graph(n12=preview)).jobs
    assert job.nodes == ("9", "12")
    other = graph(
        n12=changed({"1": preview}, "1", images=["13", 0])["1"],
        n13=node("VAEDecode", samples=["14", 0], vae=["4", 2]),
        n14=changed(graph(), "3", seed=8)["3"],
    )
    assert [job.spec["sampling"]["seed"] for job in convert(other).jobs] == [7, 8]


def test_a_preview_of_what_no_sampler_made_is_left_out_with_all_that_feeds_only_it() -> None:
    found = convert(
        graph(n12=node("PreviewImage", images=["13", 0]), n13=node("MaskToImage", mask=["10", 1]))
    )
    assert (len(found.jobs), "node 12 (PreviewImage)" in found.notes[0]) == (1, True)


def test_saving_what_no_sampler_made_is_refused() -> None:
    assert problem(graph(n12=node("SaveImage", images=["10", 0], filename_prefix="x"))).path.startswith(
        "node 12"
    )


def test_a_graph_without_an_output_is_refused() -> None:
    made = graph()
    del made["9"]
    with pytest.raises(SpecError, match="no SaveImage or PreviewImage"):
        convert(made)


def test_what_became_of_each_node_is_told() -> None:
    (job,) = convert(graph(grey())).jobs
    told = {row["node"]: row["becomes"] for row in job.mapped}
    assert (told["4"], told["10"], told["5"]) == (["model"], ["source", "mask"], ["method"])
    assert set(told) == set(graph())
