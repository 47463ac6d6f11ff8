"""LoRAs and VAEs by name: against weights merged by hand, and gone without a trace afterwards."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from overpaint_shared.errors import JobError, ModelLoadError
from overpaint_worker.engine.families.lora import inspect_lora, read_lora
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.engine.models import ModelStore
from overpaint_worker.registry import LoraEntry, Registry
from tests.extra_weights import WEIGHT, build
from tests.rendering import DEVICE, house, img2img, pixels, render, request

INK = {"loras": [{"name": "ink", "weight": WEIGHT}]}


@pytest.fixture(scope="module")
def registry(tiny_registry, tmp_path_factory):
    return build(tiny_registry, tmp_path_factory.mktemp("adapters"))


def store(registry):
    return house(registry).models


def answers(model):
    """What a model makes of fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(DEVICE)
    text = model.condition("a red brick house").tensors["text"]
    denoised = model.denoise(x, torch.tensor([9.0, 0.7], device=DEVICE), {"text": text.repeat(2, 1, 1)})
    return text, denoised


@pytest.mark.parametrize("name", ["ink", "ink-peft"])
def test_a_lora_gives_what_weights_merged_by_hand_give(registry, name):
    models = store(registry)
    with torch.inference_mode():
        base = answers(models.get("tiny"))
        ours = answers(models.get("tiny").adapted([(models.lora(name), WEIGHT)]))
        by_hand = answers(models.get("merged"))
    for plain, got, expected in zip(base, ours, by_hand, strict=True):
        scale = float((expected - plain).abs().max())
        assert scale > 0.01
        assert float((got - expected).abs().max()) < 1e-4 * max(scale, 1)


def test_after_a_lora_the_model_has_its_bits_back(registry, tiny_registry):
    models = store(registry)
    model = models.get("tiny")
    unet = model._unet
    files = tiny_registry.parent / "weights/diffusers/sd15/unet"
    before = load_file(files / "diffusion_pytorch_model.safetensors")
    with torch.inference_mode():
        first = answers(model)
        inked = model.adapted([(models.lora("ink"), 1.0)])
        both = model.adapted([(models.lora("ink"), 1.0), (models.lora("wash"), -0.5)])
        told = [answers(inked), answers(both), answers(inked)]
        again = answers(model)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(told[0], told[2], strict=True))
    assert not torch.equal(told[0][1], told[1][1])
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].cpu(), before[name]) for name in before)


def test_a_lora_is_laid_over_the_models_own_weights_whatever_lies_there(registry):
    models = store(registry)
    networks, ink, wash = models.get("tiny")._networks, models.lora("ink"), models.lora("wash")
    first = networks.overlay([(wash, 1.0)])
    networks.use(networks.overlay([(ink, 1.0)]))
    second = networks.overlay([(wash, 1.0)])
    for one, two in zip(first, second, strict=True):
        assert one.own is two.own
        assert torch.equal(one.changed, two.changed)


def test_equal_loras_are_one_model_and_a_weight_of_zero_is_none(registry):
    models = store(registry)
    model, ink = models.get("tiny"), models.lora("ink")
    assert model.adapted([(ink, 0.5)]) is model.adapted([(ink, 0.5)])
    assert model.adapted([(ink, 0.5)]) is not model.adapted([(ink, 0.6)])
    assert model.adapted([(ink, 0.0)]) is model


def test_a_lora_that_was_dropped_is_laid_anew_but_one_under_way_is_found(registry):
    models = store(registry)
    model, ink = models.get("tiny"), models.lora("ink")
    held = model.adapted([(ink, 3.0)])
    for i in range(9):
        model.adapted([(ink, 4.0 + i)])
    assert model.adapted([(ink, 3.0)]) is held


@pytest.fixture(scope="module")
def pictures(registry):
    """Jobs that run together: without, with a LoRA, with another, and with a model that holds it."""
    specs = {
        "plain": img2img(), "ink": {**img2img(), **INK},
        "both": {**img2img(), "loras": [{"name": "ink", "weight": WEIGHT}, {"name": "wash", "weight": 0.5}]},
        "merged": {**img2img(), "model": "merged"},
    }  # fmt: skip
    together = render(registry, [request(name, spec) for name, spec in specs.items()])
    alone = {name: render(registry, [request(name, spec)])[name] for name, spec in specs.items()}
    for done in (*together.values(), *alone.values()):
        assert hasattr(done, "files"), done
    return [
        {name: pixels(done.files["image.png"]) for name, done in run.items()} for run in (alone, together)
    ]


def test_jobs_of_several_loras_at_once_do_not_disturb_each_other(pictures):
    alone, together = pictures
    for name in alone:
        assert np.array_equal(alone[name], together[name]), name


def test_a_job_with_a_lora_paints_what_the_merged_model_paints(pictures):
    alone, _ = pictures
    assert np.abs(alone["ink"] - alone["merged"]).max() <= 1
    assert np.abs(alone["ink"] - alone["plain"]).max() > 20
    assert np.abs(alone["both"] - alone["ink"]).max() > 10


def test_jobs_with_the_same_lora_share_passes(registry):
    jobs = [request(name, {**img2img(seed=seed), **INK}) for seed, name in enumerate("ab")]
    for done in render(registry, [*jobs, request("c", img2img())]).values():
        companies = json.loads(done.files["receipt.json"])["evaluations"]["by_company"]
        assert max(companies) == ("1" if done.job == "c" else "2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loras": [{"name": "misfit"}]}, "no layer unet.no_such_layer"),
        ({"loras": [{"name": "inc"}]}, "did you mean 'ink'"),
        ({"vae": "cold"}, "this worker has no VAE 'cold'"),
    ],
)
def test_a_job_with_the_wrong_lora_or_vae_is_refused_and_says_why(registry, changes, said):
    failed = render(registry, [request("j", {**img2img(), **changes})])["j"]
    assert said in failed.error["message"] + str(failed.error.get("fix"))


def test_a_loras_traits_tell_the_text_width_of_its_model(registry):
    traits = {(t.kind, t.name): t for t in store(registry).catalogue()}
    ink = traits["lora", "ink"]
    assert (ink.context_width, len(ink.sha256)) == (32, 64)
    assert traits["lora", "misfit"].context_width is None
    assert traits["vae", "warm"].family == "sd"


def lora_file(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return LoraEntry(name="it", base=path.parent, path=path.name)


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"lora_unet_a.hada_w1_a": torch.zeros(1)}, None, "no plain LoRA"),
        ({"lora_unet_a.dora_scale": torch.zeros(1)}, None, "no plain LoRA"),
        ({"unet.a.lora_A.weight": torch.zeros(1, 1)}, None, "only down"),
        ({"unet.a.lora_A.weight": torch.zeros(1, 1), "unet.a.lora_B.weight": torch.zeros(1, 1)},
         {"lora_adapter_metadata": '{"unet.use_dora": true}'}, "use_dora"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(tmp_path, tensors, metadata, said):
    with pytest.raises(ModelLoadError, match=said):
        read_lora(lora_file(tmp_path / "l.safetensors", tensors, metadata), HashCache())


@pytest.mark.parametrize(
    "name",
    [
        "unet.a.b.attn1.processor.to_out_lora.{down,up}.weight",
        "unet.a.b.attn1.to_out.0.lora.{down,up}.weight",
        "base_model.model.a.b.attn1.to_out.0.lora_{A,B}.weight",
        "a.b.attn1.to_out.0.lora_{A,B}.default.weight",
        "lora_unet_a_b_attn1_to_out_0.lora_{down,up}.weight",
    ],
)
def test_every_way_of_naming_a_layer_is_understood(tmp_path, name):
    start, roles, end = re.split("[{}]", name)
    names = [start + role + end for role in roles.split(",")]
    tensors = dict(zip(names, (torch.ones(2, 3), torch.ones(5, 2)), strict=True))
    found = read_lora(lora_file(tmp_path / "l.safetensors", tensors), HashCache())
    change = found.changes["unet", "a_b_attn1_to_out_0"]
    assert torch.equal(change.of(torch.zeros(5, 3)), torch.full((5, 3), 2.0))  # no alpha: the rank


def test_a_kohya_lora_with_original_block_names_finds_the_same_layers(tiny_registry, tmp_path):
    """The weights themselves say which layer is which: the tiny model is there in both layouts."""
    weights = tiny_registry.parent / "weights"
    original = load_file(weights / "original/sd15.safetensors")
    folder = load_file(weights / "diffusers/sd15/unet/diffusion_pytorch_model.safetensors")
    prefix, seen = "model.diffusion_model.", 0
    tensors, expected = {}, {}
    for name, weight in original.items():
        layer = name.removeprefix(prefix).removesuffix(".weight")
        inside = name.startswith((f"{prefix}input_blocks", f"{prefix}output_blocks", f"{prefix}middle_block"))
        if inside and name.endswith(".weight") and weight.dim() > 1 and layer != "input_blocks.0.0":
            kohya = "lora_unet_" + layer.replace(".", "_")
            seen += 1
            tensors |= {f"{kohya}.lora_down.weight": torch.full((1, 1), float(seen)),
                        f"{kohya}.lora_up.weight": torch.ones(1, 1)}  # fmt: skip
            expected[seen] = weight
    entry = lora_file(tmp_path / "l.safetensors", tensors)
    by_name = {name.removesuffix(".weight").replace(".", "_"): tensor for name, tensor in folder.items()}
    found = read_lora(entry, HashCache()).changes
    assert len(found) == seen > 150
    for (network, layer), change in found.items():
        assert network == "unet"
        assert torch.equal(by_name[layer], expected[int(change.down)]), layer


def test_a_lora_of_another_shape_is_refused(registry, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    entry = lora_file(
        tmp_path / "l.safetensors",
        {f"{layer}.lora_down.weight": torch.ones(2, 7), f"{layer}.lora_up.weight": torch.ones(128, 2)},
    )
    assert inspect_lora(entry, HashCache()).context_width is None
    with pytest.raises(JobError, match="another shape"):
        store(registry).get("tiny").adapted([(read_lora(entry, HashCache()), 1.0)])


def test_another_vae_codes_the_pictures_and_the_models_own_by_name_changes_nothing(registry):
    plain = img2img(deterministic=True)
    specs = {name: {**plain, "vae": name} for name in ("own", "own-single", "warm")} | {"none": plain}
    done = render(registry, [request(name, spec) for name, spec in specs.items()])
    for end in done.values():
        assert hasattr(end, "files"), end
    got = {name: pixels(end.files["image.png"]) for name, end in done.items()}
    assert np.array_equal(got["own"], got["none"])
    assert np.array_equal(got["own-single"], got["none"])
    warmer = (got["warm"] - got["none"]).mean((0, 1))
    assert warmer[0] > 20
    assert abs(warmer[1]) < 1


def test_a_broken_vae_is_refused(registry, tmp_path):
    weights = load_file(registry.parent / "warm" / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    (tmp_path / "v").mkdir()
    save_file(weights, tmp_path / "v" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "v" / "config.json").write_text((registry.parent / "warm" / "config.json").read_text())
    (tmp_path / "models.toml").write_text('[vaes.broken]\npath = "v"\n')
    with pytest.raises(ModelLoadError, match=r"decoder\.conv_in\.weight"):
        store(tmp_path / "models.toml").vae("broken")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vae_computes_in_what_its_entry_says(registry, tmp_path, dtype):
    (tmp_path / "models.toml").write_text(
        f'[vaes.warm]\npath = "{registry.parent}/warm"\ndtype = "{dtype}"\n'
    )
    coder = ModelStore(Registry.load(tmp_path / "models.toml"), DEVICE).vae("warm")
    assert coder._vae.dtype is getattr(torch, dtype)
