"""The family `sdxl`: what it reads and computes, held against transformers' and diffusers' own models."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from overpaint_shared.errors import ModelLoadError, UnsupportedError
from overpaint_shared.spec.sampling import ModelDefaults
from overpaint_worker.engine.families import FAMILIES, family, finish
from overpaint_worker.engine.families.lora import read_lora
from overpaint_worker.engine.families.sdxl import LAYOUT, SdxlFamily, SdxlModel
from overpaint_worker.engine.families.survey import CONFIGS, config_folder
from overpaint_worker.engine.families.vocabulary import TOKENIZER_FILE, clip
from overpaint_worker.engine.families.weights import HashCache, Header, TensorInfo
from overpaint_worker.registry import LoraEntry, ModelEntry, Registry
from tests.weights_sdxl import original_names

START, END = 49406, 49407
tokenize = clip().tokenize
SCALING = 0.13025
SIGMAS = torch.tensor([14.61464, 3.0, 0.4])
TIMES = torch.tensor([999, 673, 125])
"""The integer times of these, from the schedule's formula."""
CONTEXT = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


def entry(path: Path | str, base: Path = Path("/"), **keys: Any) -> ModelEntry:
    return ModelEntry(name="it", base=base, family="sdxl", path=str(path), **keys)


@pytest.fixture(scope="module")
def load(sdxl_registry: Path) -> Callable[[str], SdxlModel]:
    registry, loaded = Registry.load(sdxl_registry), {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = SdxlFamily().load(registry.model(name), "cpu")
        return loaded[name]

    return load


@pytest.fixture
def xl(load: Callable[[str], SdxlModel]) -> SdxlModel:
    return load("xl")


@pytest.fixture
def folder(sdxl_registry: Path, tmp_path: Path) -> Path:
    """A copy of the diffusers folder, to be damaged."""
    return Path(shutil.copytree(sdxl_registry.parent / "xl", tmp_path / "xl"))


@pytest.fixture
def single(sdxl_registry: Path, tmp_path: Path) -> Path:
    """A copy of the single file, its configuration beside it."""
    shutil.copytree(sdxl_registry.parent / "config", tmp_path / "config")
    return Path(shutil.copy(sdxl_registry.parent / "xl.safetensors", tmp_path))


@pytest.fixture(scope="module")
def encoders(sdxl_registry: Path) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The text encoders by transformers' own hand."""
    root = str(sdxl_registry.parent / "xl")
    return (
        CLIPTextModel.from_pretrained(root, subfolder="text_encoder", dtype=torch.float32).eval(),
        CLIPTextModelWithProjection.from_pretrained(
            root, subfolder="text_encoder_2", dtype=torch.float32
        ).eval(),
    )


@pytest.fixture(scope="module")
def unet(sdxl_registry: Path) -> UNet2DConditionModel:
    """The UNet by diffusers' own hand."""
    return UNet2DConditionModel.from_pretrained(str(sdxl_registry.parent / "xl"), subfolder="unet").eval()


def block(ids: list[int], pad: int) -> Tensor:
    return torch.tensor([[START, *ids, END, *[pad] * (75 - len(ids))]])


@torch.no_grad()
def read(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], ids: list[int], before: int = -2
) -> tuple[Tensor, Tensor]:
    """States of one block of ids before the last layer, side by side, and the pooled text."""
    first = encoders[0](input_ids=block(ids, END), output_hidden_states=True)
    second = encoders[1](input_ids=block(ids, 0), output_hidden_states=True)
    return torch.cat([first.hidden_states[before], second.hidden_states[before]], -1), second.text_embeds


def tensors(model: SdxlModel, prompt: str, **options: Any) -> Mapping[str, Tensor]:
    return model.condition(prompt, **options).tensors


def rendered(model: SdxlModel) -> dict[str, Tensor]:
    """What a model makes of fixed inputs, part by part."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    extra = torch.randn(2, 5, 8, 8, generator=generator) if model.extra_channels else None
    told = tensors(model, "a (red:1.2) brick house")
    px = torch.rand(1, 3, 64, 48, generator=generator)
    latent = finish(model.encode(px))
    rows = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in told.items()}
    return {
        **told,
        "latent": latent,
        "picture": finish(model.decode(latent)),
        "denoised": model.denoise(x, torch.tensor([9.0, 0.7]), rows, extra=extra),
    }


# --- reading


@pytest.mark.parametrize("name", ["xl", "xl-inpaint"])
def test_a_single_file_renders_the_same_bits_as_the_folder(
    load: Callable[[str], SdxlModel], name: str
) -> None:
    folder, single = rendered(load(name)), rendered(load(f"{name}-single"))

    for part, tensor in folder.items():
        assert torch.equal(tensor, single[part]), part


def test_traits_come_from_headers_and_configurations(sdxl_registry: Path) -> None:
    registry, sdxl = Registry.load(sdxl_registry), family("sdxl")

    traits = {name: sdxl.inspect(registry.model(name)) for name in registry.models if name != "tiny"}

    assert {name: (t.family, t.channels, t.prediction, t.context_width) for name, t in traits.items()} == {
        "xl": ("sdxl", 4, "epsilon", 80),
        "xl-single": ("sdxl", 4, "epsilon", 80),
        "xl-inpaint": ("sdxl", 9, "epsilon", 80),
        "xl-inpaint-single": ("sdxl", 9, "epsilon", 80),
    }


def test_the_size_is_1024_where_the_entry_names_none(folder: Path) -> None:
    def size(**keys: Any) -> int:
        defaults = SdxlFamily().inspect(entry(folder, **keys)).defaults
        assert defaults is not None
        return defaults.size

    assert size() == 1024
    assert size(defaults=ModelDefaults(steps=4)) == 1024
    assert size(defaults=ModelDefaults(size=512)) == 512


def test_a_model_of_the_other_family_is_refused(sdxl_registry: Path, tiny_registry: Path) -> None:
    weights = tiny_registry.parent / "weights"
    sd_folder, sd_file = weights / "diffusers/sd15", weights / "original/sd15.safetensors"
    xl_folder, xl_file = sdxl_registry.parent / "xl", sdxl_registry.parent / "xl.safetensors"

    for path in (sd_folder, sd_file):
        with pytest.raises(ModelLoadError, match="Stable Diffusion XL"):
            SdxlFamily().inspect(entry(path))
    for path in (xl_folder, xl_file):
        with pytest.raises(ModelLoadError, match=r"Stable Diffusion 1\.x or 2\.x"):
            family("sd").inspect(entry(path))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet", "add_embedding.linear_1.weight"),
        ("text_encoder", "final_layer_norm.weight"),
        ("text_encoder_2", "text_projection.weight"),
    ],
)
def test_a_folder_that_lacks_a_weight_is_refused(folder: Path, part: str, tensor: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith(tensor)]
    del weights[name]
    save_file(weights, path, {"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"missing|do not fit"):
        SdxlFamily().load(entry(folder), "cpu")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.2.attn.out_proj.bias",
    ],
)
def test_a_single_file_that_lacks_a_weight_is_refused(single: Path, tensor: str) -> None:
    weights = load_file(single)
    del weights[tensor]
    save_file(weights, single)

    with pytest.raises(ModelLoadError, match=r"missing|do not fit"):
        SdxlFamily().load(entry(single, single.parent, config="config"), "cpu")


def test_a_single_file_is_told_by_the_width_of_its_text() -> None:
    def header(width: int) -> Header:
        return Header({CONTEXT: TensorInfo("F16", (640, width))}, {})

    assert config_folder(entry("a.safetensors"), LAYOUT, header(2048)).name == "sdxl"
    with pytest.raises(ModelLoadError, match="no shipped configuration"):
        config_folder(entry("a.safetensors"), LAYOUT, header(1280))  # the refiner


def test_the_shipped_configuration_has_the_published_sizes() -> None:
    config = CONFIGS / "sdxl"
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(config / "unet"))),
            AutoencoderKL.from_config(AutoencoderKL.load_config(str(config / "vae"))),
            CLIPTextModel(CLIPTextConfig.from_pretrained(str(config / "text_encoder"))),
            CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(str(config / "text_encoder_2"))),
        ]

    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    # The parameter counts of the published checkpoint.
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert networks[1].config.scaling_factor == SCALING


@pytest.mark.parametrize(("force_upcast", "expected"), [(True, torch.float32), (False, torch.float16)])
@pytest.mark.parametrize("layout", ["folder", "single"])
def test_a_vae_that_overflows_in_half_precision_stays_in_float32(
    folder: Path, single: Path, layout: str, force_upcast: bool, expected: torch.dtype
) -> None:
    config = (folder if layout == "folder" else single.parent / "config") / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": force_upcast}))
    it = entry(folder) if layout == "folder" else entry(single, single.parent, config="config")

    model = SdxlFamily().load(it, "cpu", torch.float16)

    assert (model.dtype, model._vae._vae.dtype) == (torch.float16, expected)
    assert SdxlFamily().load(it, "cpu", torch.bfloat16)._vae._vae.dtype is torch.bfloat16


def test_every_family_has_its_own_file(sdxl_registry: Path) -> None:
    assert {name: family(name).name for name in FAMILIES} == {"sd": "sd", "sdxl": "sdxl"}


def test_a_single_files_marks_tell_how_it_was_trained(single: Path) -> None:
    weights, it = load_file(single), entry(single, single.parent, config="config")

    save_file(weights | {"v_pred": torch.zeros(0)}, single)
    assert SdxlFamily().inspect(it).prediction == "v"
    save_file(weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, single)
    with pytest.raises(ModelLoadError, match="rescale_betas_zero_snr"):
        SdxlFamily().inspect(it)


# --- text


def test_a_prompt_is_both_encoders_before_their_last_layer(
    xl: SdxlModel, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
) -> None:
    text, pooled = read(encoders, tokenize("a red brick house"))

    found = tensors(xl, "a red brick house")

    assert found["text"].shape == (1, 77, 80)
    torch.testing.assert_close(found["text"], text, rtol=0, atol=0)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=0)
    assert set(found) == {"text", "pooled"}


def test_the_empty_prompt_is_read_and_not_zeros(
    xl: SdxlModel, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
) -> None:
    text, pooled = read(encoders, [])

    torch.testing.assert_close(tensors(xl, "")["text"], text, rtol=0, atol=0)
    torch.testing.assert_close(tensors(xl, "")["pooled"], pooled, rtol=0, atol=0)
    assert float(pooled.abs().max()) > 0.1


def test_a_long_prompt_is_read_in_blocks_and_pooled_from_the_first(
    xl: SdxlModel, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
) -> None:
    prompt = "a red brick house by the sea " * 20
    ids = tokenize(prompt)
    (first, pooled), (second, other) = read(encoders, ids[:75]), read(encoders, ids[75:])

    found = tensors(xl, prompt)

    torch.testing.assert_close(found["text"], torch.cat([first, second], dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-5, atol=1e-5)
    assert float((pooled - other).abs().max()) > 1e-2


def test_a_weight_moves_its_tokens_in_both_encoders_and_not_the_pooled_text(
    xl: SdxlModel, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
) -> None:
    ids = [*tokenize("a "), *tokenize("red"), *tokenize(" hat")]
    (plain, pooled), (empty, _) = read(encoders, ids), read(encoders, [])
    expected = plain.clone()
    expected[:, 2] = empty[:, 2] + 1.3 * (plain[:, 2] - empty[:, 2])

    found = tensors(xl, "a (red:1.3) hat")

    torch.testing.assert_close(found["text"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=0)


@pytest.mark.parametrize(("clip_skip", "before"), [(1, -2), (2, -3)])
def test_clip_skip_counts_the_layer_that_is_always_left_out(
    xl: SdxlModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    clip_skip: int,
    before: int,
) -> None:
    text, pooled = read(encoders, tokenize("a hat"), before)

    found = tensors(xl, "a hat", clip_skip=clip_skip)

    torch.testing.assert_close(found["text"], text, rtol=0, atol=0)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=0)


def test_more_layers_than_the_shorter_encoder_has_cannot_be_skipped(xl: SdxlModel) -> None:
    with pytest.raises(UnsupportedError, match="3 layers"):
        xl.condition("a hat", clip_skip=3)


def test_rounded_text_encoders_are_both_rounded(folder: Path, xl: SdxlModel) -> None:
    rounded = tensors(SdxlFamily().load(entry(folder, text_encoder_dtype="float16"), "cpu"), "a hat")

    exact = tensors(xl, "a hat")
    for part in (rounded["text"] - exact["text"]).split([32, 48], dim=-1):
        assert 1e-6 < float(part.abs().max()) < 0.05


# --- the denoiser


def test_a_pass_is_the_unet_told_texts_times_and_sizes(xl: SdxlModel, unet: UNet2DConditionModel) -> None:
    x = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(2)) * 5
    told = [tensors(xl, prompt) for prompt in ("a", "a red hat", "")]
    rows = {name: torch.cat([each[name] for each in told]) for name in ("text", "pooled")}
    scale = (SIGMAS**2 + 1).sqrt().view(-1, 1, 1, 1)

    with torch.no_grad():
        noise = unet(
            x / scale,
            TIMES,
            encoder_hidden_states=rows["text"],
            added_cond_kwargs={
                "text_embeds": rows["pooled"],
                "time_ids": torch.tensor([[48.0, 80.0, 0.0, 0.0, 48.0, 80.0]] * 3),
            },
        ).sample

    assert xl.space.timestep(SIGMAS).tolist() == TIMES.tolist()
    expected = x - SIGMAS.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(xl.denoise(x, SIGMAS, rows), expected, rtol=1e-4, atol=1e-4)


def test_pooled_text_and_sizes_reach_the_weights(xl: SdxlModel) -> None:
    """A wrong order of height and width, or no pooled text at all, must show in the tests above."""
    x, sigma = torch.ones(1, 4, 6, 10), torch.tensor([3.0])
    hat, none = tensors(xl, "a hat"), tensors(xl, "")

    plain = xl.denoise(x, sigma, hat)

    assert float((xl.denoise(x, sigma, {**hat, "pooled": none["pooled"]}) - plain).abs().max()) > 1e-2
    turned = xl.denoise(x.transpose(2, 3).contiguous(), sigma, hat).transpose(2, 3)
    assert float((turned - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reaches_the_whole_network(
    xl: SdxlModel, sdxl_registry: Path, dtype: torch.dtype
) -> None:
    half = SdxlFamily().load(Registry.load(sdxl_registry).model("xl"), "cpu", dtype)
    x, told = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), tensors(xl, "a hat")

    found, exact = half.denoise(x, SIGMAS[2:], told), xl.denoise(x, SIGMAS[2:], told)

    assert found.dtype is torch.float32
    assert 0 < float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_row_does_not_feel_its_company(xl: SdxlModel) -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)) * 5
    told = [tensors(xl, prompt) for prompt in ("a", "a red hat", "")]
    rows = {name: torch.cat([each[name] for each in told]) for name in ("text", "pooled")}

    together = xl.denoise(x, SIGMAS, rows)

    for i, each in enumerate(told):
        alone = xl.denoise(x[i : i + 1], SIGMAS[i : i + 1], each)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_texts_of_any_length_have_one_signature_and_another_familys_have_not(
    xl: SdxlModel, sdxl_registry: Path
) -> None:
    short, long = xl.condition("a hat"), xl.condition("a hat " * 60)
    sd = family("sd").load(Registry.load(sdxl_registry).model("tiny"), "cpu")

    assert (short.tokens, long.tokens) == (77, 154)
    assert short.signature() == long.signature() != sd.condition("a hat").signature()


def test_an_inpainting_model_takes_five_channels_after_the_latent(
    load: Callable[[str], SdxlModel], sdxl_registry: Path
) -> None:
    model, told = load("xl-inpaint"), tensors(load("xl-inpaint"), "a hat")
    nine = UNet2DConditionModel.from_pretrained(
        str(sdxl_registry.parent / "xl-inpaint"), subfolder="unet"
    ).eval()
    generator = torch.Generator().manual_seed(3)
    x, extra = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 8, 8, generator=generator)

    with torch.no_grad():
        noise = nine(
            torch.cat([x / 10**0.5, extra], dim=1),
            TIMES[1],
            encoder_hidden_states=told["text"],
            added_cond_kwargs={
                "text_embeds": told["pooled"],
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
            },
        ).sample

    assert model.extra_channels == 5
    found = model.denoise(x, SIGMAS[1:2], told, extra=extra)
    torch.testing.assert_close(found, x - 3 * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["xl", "xl-single"])
def test_a_controlnet_is_told_the_pooled_text_and_the_sizes(
    xl: SdxlModel, sdxl_registry: Path, name: str
) -> None:
    described = Registry.load(sdxl_registry).controlnet(name)
    net = family("sdxl").load_controlnet(described, "cpu")
    theirs = ControlNetModel.from_pretrained(str(sdxl_registry.parent / "xl-controlnet")).eval()
    generator = torch.Generator().manual_seed(4)
    x, hint = torch.randn(1, 4, 8, 8, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
    told = tensors(xl, "a hat")

    with torch.no_grad():
        down, mid = theirs(
            x / 10**0.5,
            TIMES[1],
            encoder_hidden_states=told["text"],
            controlnet_cond=hint,
            added_cond_kwargs={
                "text_embeds": told["pooled"],
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
            },
            return_dict=False,
        )

    found = xl.control(net, x, SIGMAS[1:2], told, hint)
    for ours, expected in zip((*found.down, found.mid), (*down, mid), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert float(mid.abs().max()) > 1e-3
    assert family("sdxl").inspect_controlnet(described).context_width == 80


def lora_files(parts: Mapping[str, Any], folder: Path) -> tuple[Path, Path, dict[str, dict[str, Tensor]]]:
    """One random LoRA as diffusers and as kohya's scripts name it, and what it adds to each weight."""
    generator = torch.Generator().manual_seed(8)
    original = original_names(list(parts["unet"].state_dict()))
    theirs, kohyas, added = {}, {}, {part: {} for part in parts}
    short = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    for part, network in parts.items():
        for name, weight in network.state_dict().items():
            if not name.endswith("weight") or not re.search(r"attn|resnets.*conv|samplers|mlp", name):
                continue
            layer = name.removesuffix(".weight")
            down = torch.randn(2, *weight.shape[1:], generator=generator) * 0.1
            up = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=generator) * 0.1
            theirs |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
            bare = layer.removeprefix("text_model.")
            spoken = short[part] + bare if part in short else f"lora_unet_{original[name]}"
            key = spoken.removesuffix(".weight").replace(".", "_")
            kohyas |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            kohyas[f"{key}.alpha"] = torch.tensor(2.0)
            added[part][name] = (up.flatten(1) @ down.flatten(1)).view_as(weight)
    save_file(theirs, folder / "theirs.safetensors")
    save_file(kohyas, folder / "kohyas.safetensors")
    return folder / "theirs.safetensors", folder / "kohyas.safetensors", added


def test_a_lora_of_either_naming_changes_the_unet_and_both_encoders(
    xl: SdxlModel, sdxl_registry: Path, tmp_path: Path
) -> None:
    root = str(sdxl_registry.parent / "xl")
    kinds = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    parts = {part: kind.from_pretrained(root, subfolder=part).eval() for part, kind in kinds.items()}
    *files, added = lora_files(parts, tmp_path)
    for part, network in parts.items():
        network.load_state_dict(
            {name: weight + 0.7 * added[part].get(name, 0) for name, weight in network.state_dict().items()}
        )
    text, pooled = read((parts["text_encoder"], parts["text_encoder_2"]), tokenize("a hat"))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        noise = parts["unet"](
            x / 10**0.5,
            TIMES[1],
            encoder_hidden_states=text,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
            },
        ).sample

    for file in files:
        lora = read_lora(LoraEntry(name="it", base=Path("/"), path=str(file)), HashCache())
        model = xl.adapted([(lora, 0.7)])
        told = model.condition("a hat").tensors
        torch.testing.assert_close(told["text"], text, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(told["pooled"], pooled, rtol=1e-4, atol=1e-4)
        found = model.denoise(x, SIGMAS[1:2], told)
        torch.testing.assert_close(found, x - 3 * noise, rtol=1e-3, atol=1e-3)
    plain = xl.denoise(x, SIGMAS[1:2], tensors(xl, "a hat"))
    assert float((plain - found).abs().max()) > 0.1


# --- the VAE, and all of it


def test_a_latent_is_scaled_by_the_vaes_own_factor(xl: SdxlModel, sdxl_registry: Path) -> None:
    vae = AutoencoderKL.from_pretrained(str(sdxl_registry.parent / "xl"), subfolder="vae").eval()
    px = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latent = vae.encode(px * 2 - 1).latent_dist.mode() * SCALING
        picture = (vae.decode(latent / SCALING).sample / 2 + 0.5).clamp(0, 1)

    torch.testing.assert_close(finish(xl.encode(px)), latent, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(finish(xl.decode(latent)), picture, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pipeline(sdxl_registry: Path, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]) -> Any:
    """diffusers' own pipeline of the same weights."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
        StableDiffusionXLImg2ImgPipeline,
    )
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    root = str(sdxl_registry.parent / "xl")
    first, second = (
        CLIPTokenizer.from_pretrained(str(TOKENIZER_FILE.parent), pad_token=pad, model_max_length=77)
        for pad in ("<|endoftext|>", "!")
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=AutoencoderKL.from_pretrained(root, subfolder="vae").eval(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel.from_pretrained(root, subfolder="unet").eval(),
        scheduler=EulerDiscreteScheduler.from_pretrained(root, subfolder="scheduler"),
        force_zeros_for_empty_prompt=False,
    )


@torch.no_grad()
def told_by(pipeline: Any, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
    """Text and pooled text of the negative and the positive row."""
    positive, other, pooled, other_pooled = pipeline.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=True, negative_prompt=negative
    )
    return torch.cat([other, positive]), torch.cat([other_pooled, pooled])


@pytest.mark.parametrize("negative", ["blurry", ""])
def test_the_pipeline_of_diffusers_reads_prompts_the_same(
    xl: SdxlModel, pipeline: Any, negative: str
) -> None:
    text, pooled = told_by(pipeline, "a red brick house", negative)

    told = [tensors(xl, prompt) for prompt in (negative, "a red brick house")]

    torch.testing.assert_close(torch.cat([each["text"] for each in told]), text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([each["pooled"] for each in told]), pooled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steps_with_the_pipelines_parts_lead_to_the_same_latent(xl: SdxlModel, pipeline: Any) -> None:
    text, pooled = told_by(pipeline, "a red brick house", "blurry")
    size = (64, 96)
    sizes, _ = pipeline._get_add_time_ids(
        size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, torch.float32, text_encoder_projection_dim=40
    )
    told = [tensors(xl, prompt) for prompt in ("blurry", "a red brick house")]
    rows = {name: torch.cat([each[name] for each in told]) for name in told[0]}
    sigmas = xl.space.sigmas("karras", 4, 1.0)
    x = y = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(6)) * sigmas[0]

    for sigma, after in pairwise(sigmas):
        noise = pipeline.unet(
            torch.cat([x, x]) / (sigma**2 + 1).sqrt(),
            xl.space.timestep(sigma),
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.repeat(2, 1)},
        ).sample
        x = x + (noise[:1] + 6 * (noise[1:] - noise[:1])) * (after - sigma)
        clean = xl.denoise(torch.cat([y, y]), sigma.repeat(2), rows)
        y = y + (y - (clean[:1] + 6 * (clean[1:] - clean[:1]))) / sigma * (after - sigma)

    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)
