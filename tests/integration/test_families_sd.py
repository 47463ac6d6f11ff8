"""What a loaded Stable Diffusion model computes: the reference's outputs, and second derivations."""

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from overpaint_shared.errors import JobError, UnsupportedError
from overpaint_worker.engine.families import Residuals, finish
from overpaint_worker.engine.families.clip import ClipEncoder, ClipText
from overpaint_worker.engine.families.conditioning import Conditioning, ConditioningCache
from overpaint_worker.engine.families.sd import SdFamily, SdModel
from overpaint_worker.engine.families.vocabulary import clip, vocabulary_of
from overpaint_worker.registry import ModelEntry, Registry

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASE = PARITY / "cases" / "img2img"
START, END = 49406, 49407
tokenize = clip().tokenize
ENTRY = ModelEntry(name="it", base=Path("/"), family="sd", path="it")


@pytest.fixture(scope="module")
def load(tiny_registry: Path) -> Callable[[str], SdModel]:
    registry, loaded = Registry.load(tiny_registry), {}

    def load(name: str) -> SdModel:
        if name not in loaded:
            loaded[name] = SdFamily().load(registry.model(name), "cpu")
        return loaded[name]

    return load


@pytest.fixture
def tiny(load: Callable[[str], SdModel]) -> SdModel:
    return load("tiny")


@pytest.fixture(scope="module")
def encoder(tiny_registry: Path) -> CLIPTextModel:
    """The tiny text encoder by transformers' own hand, its weights rounded to half as the registry asks."""
    folder = tiny_registry.parent / "weights/diffusers/sd15/text_encoder"
    loaded = CLIPTextModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.copy_(parameter.to(torch.float16).to(torch.float32))
    return loaded


def read(encoder: CLIPTextModel, *ids: int) -> Tensor:
    """States of one block: start, `ids`, end, and the end as padding."""
    block = [START, *ids, *[END] * (76 - len(ids))]
    with torch.no_grad():
        states: Tensor = encoder(input_ids=torch.tensor([block])).last_hidden_state
    return states


def text(model: SdModel, prompt: str, **options: Any) -> Tensor:
    return model.condition(prompt, **options).tensors["text"]


def picture(name: str) -> Tensor:
    pixels = np.asarray(Image.open(PARITY / "inputs" / name).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


# --- the reference's outputs


def references_picture(tiny: SdModel, z0: Tensor) -> tuple[Tensor, Any]:
    """The case's Euler steps, written out on the seed's noise: the last latent, and its picture's error."""
    job = json.loads((CASE / "job.json").read_text())
    sigmas = torch.from_numpy(np.load(CASE / "sigmas.npy"))
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(job["sampling"]["seed"]))
    texts = torch.cat([text(tiny, job["negative_prompt"]), text(tiny, job["prompt"])])
    x = z0 + noise * sigmas[0]
    for sigma, after in pairwise(sigmas):
        negative, positive = tiny.denoise(x.repeat(2, 1, 1, 1), sigma.repeat(2), {"text": texts})
        denoised = negative + (positive - negative) * job["sampling"]["cfg"]
        x = x + (x - denoised) / sigma * (after - sigma)
    pixels = (finish(tiny.decode(x))[0].permute(1, 2, 0) * 255).numpy().astype(np.uint8).astype(int)
    return x, np.abs(pixels - np.asarray(Image.open(CASE / "expected.png").convert("RGB")).astype(int))


def test_an_encoded_picture_agrees_with_float64(tiny: SdModel) -> None:
    px = picture("img256.png")
    exact = deepcopy(tiny._vae._vae).double().encode(px.double() * 2 - 1).latent_dist.mode() * 0.18215

    latent = finish(tiny.encode(px)).double()

    torch.testing.assert_close(latent, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_an_encoded_picture_laid_out_as_the_references_is_its_latent(tiny: SdModel) -> None:
    # Torch's group norm on a CPU rounds coarsely there, and these random weights amplify that 300 times: the
    # recorded latent lies 7e-4 of its range from float64's.
    expected = torch.from_numpy(np.load(CASE / "latent.npy")) * 0.18215
    px = picture("img256.png").contiguous().contiguous(memory_format=torch.channels_last)

    latent = finish(tiny.encode(px))

    assert latent.is_contiguous()
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_references_trajectory_is_reproduced_from_its_latent(tiny: SdModel) -> None:
    """Text, timesteps, input scale, prediction and decoder at once."""
    x, difference = references_picture(tiny, torch.from_numpy(np.load(CASE / "latent.npy")) * 0.18215)

    expected = torch.from_numpy(np.load(CASE / "latent_out.npy")) * 0.18215
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert difference.max() <= 1


def test_the_references_picture_is_reproduced_from_the_source(tiny: SdModel) -> None:
    _, difference = references_picture(tiny, finish(tiny.encode(picture("img256.png"))))

    assert difference.max() <= 1


# --- text


def test_a_prompt_is_the_last_layer_through_its_norm(tiny: SdModel, encoder: CLIPTextModel) -> None:
    torch.testing.assert_close(
        text(tiny, "a red brick house"), read(encoder, *tokenize("a red brick house")), rtol=0, atol=0
    )


def test_only_an_entry_that_asks_for_it_rounds_the_text_encoder(tiny: SdModel, tiny_registry: Path) -> None:
    asked = Registry.load(tiny_registry).model("tiny").model_copy(update={"text_encoder_dtype": "auto"})

    difference = (text(SdFamily().load(asked, "cpu"), "a hat") - text(tiny, "a hat")).abs().max()

    assert 1e-5 < float(difference) < 0.02
    assert text(tiny, "a hat").dtype is torch.float32


def test_the_empty_prompt_is_one_block(tiny: SdModel, encoder: CLIPTextModel) -> None:
    torch.testing.assert_close(text(tiny, ""), read(encoder), rtol=0, atol=0)


def test_a_long_prompt_is_read_in_blocks_laid_end_to_end(tiny: SdModel, encoder: CLIPTextModel) -> None:
    prompt = "a red brick house by the sea " * 20
    ids = tokenize(prompt)
    assert len(ids) == 140

    found = text(tiny, prompt)

    assert found.shape == (1, 154, 32)
    expected = torch.cat([read(encoder, *ids[:75]), read(encoder, *ids[75:])], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_weight_moves_its_tokens_alone_away_from_the_empty_prompt(
    tiny: SdModel, encoder: CLIPTextModel
) -> None:
    ids = [*tokenize("a "), *tokenize("red"), *tokenize(" hat")]
    plain, empty = read(encoder, *ids), read(encoder)
    expected = plain.clone()
    expected[:, 2] = empty[:, 2] + 1.3 * (plain[:, 2] - empty[:, 2])

    found = text(tiny, "a (red:1.3) hat")

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[:, 2], plain[:, 2])


def test_a_weight_of_nothing_leaves_the_empty_prompts_state(tiny: SdModel, encoder: CLIPTextModel) -> None:
    torch.testing.assert_close(text(tiny, "(red:0)")[:, 1], read(encoder)[:, 1], rtol=0, atol=0)


def test_clip_skip_is_an_encoder_with_fewer_layers(
    tiny: SdModel, encoder: CLIPTextModel, tiny_registry: Path
) -> None:
    config = CLIPTextConfig.from_pretrained(
        str(tiny_registry.parent / "weights/diffusers/sd15/text_encoder"), num_hidden_layers=1
    )
    shorter = CLIPTextModel(config).eval()
    shorter.load_state_dict(encoder.state_dict(), strict=False)

    skipped = text(tiny, "a red hat", clip_skip=1)

    torch.testing.assert_close(skipped, read(shorter, *tokenize("a red hat")), rtol=1e-5, atol=1e-6)
    assert not torch.equal(skipped, text(tiny, "a red hat"))


@pytest.mark.parametrize("clip_skip", [2, 12, -1])
def test_more_layers_than_there_are_cannot_be_skipped(tiny: SdModel, clip_skip: int) -> None:
    with pytest.raises(UnsupportedError, match="2 layers") as caught:
        tiny.condition("a hat", clip_skip=clip_skip)
    assert caught.value.field == "clip_skip"


def test_a_prompt_that_cannot_be_read_leaves_the_model_usable(tiny: SdModel) -> None:
    with pytest.raises(JobError):
        tiny.condition("(" * 200 + "a" + ")" * 200)

    assert tiny.condition("a hat").tokens == 77


def test_a_prompt_is_remembered(tiny: SdModel) -> None:
    assert tiny.condition("a blue hat") is tiny.condition("a blue hat")
    assert tiny.condition("a blue hat") is not tiny.condition("a blue hat", clip_skip=1)


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache, made = ConditioningCache(limit_bytes=2 * 77 * 8 * 4), []

    def get(key: str) -> None:
        cache.get(key, lambda: made.append(key) or Conditioning({"text": torch.zeros(1, 77, 8)}))  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)

    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_what_exceeds_the_cache_alone_is_still_made() -> None:
    cache = ConditioningCache(limit_bytes=1)

    assert cache.get("a", lambda: Conditioning({"text": torch.ones(1, 77, 8)})).tokens == 77
    assert len(cache) == 1


def test_texts_of_any_length_have_one_signature(tiny: SdModel) -> None:
    short, long = tiny.condition("a hat"), tiny.condition("a hat " * 60)

    assert (short.tokens, long.tokens) == (77, 154)
    assert short.signature() == long.signature()
    wider = Conditioning({"text": torch.zeros(1, 77, 33)})
    pooled = Conditioning({**short.tensors, "pooled": torch.zeros(1, 5)})
    assert len({short.signature(), wider.signature(), pooled.signature()}) == 3


def test_an_open_clip_encoder_is_padded_with_zeros(encoder: CLIPTextModel) -> None:
    seen: list[Tensor] = []

    def fake(input_ids: Tensor, **_: object) -> SimpleNamespace:
        seen.append(input_ids)
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 4))

    fake.config = SimpleNamespace(num_hidden_layers=1)  # type: ignore[attr-defined]
    vocabulary = vocabulary_of(ENTRY, Path("none"), {"hidden_act": "gelu"})
    ClipText(ClipEncoder(fake, vocabulary, torch.device("cpu"))).condition("a hat")  # type: ignore[arg-type]

    assert seen[0].tolist() == [[START, *tokenize("a hat"), END, *[0] * 73]]


# --- the denoiser


class Recorder:
    """Stands in for a UNet: records what it is told and answers with a function of it."""

    def __init__(self, unet: Any, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype
        self.answer = answer
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def __call__(self, x: Tensor, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        self.calls.append((x, timestep, options))
        return (self.answer(x, timestep),)


SIGMAS = torch.tensor([14.61464, 6.5, 1.0, 0.4, 0.0291675])


def truth(rows: int) -> tuple[Tensor, Tensor]:
    """A clean latent and its noise, for each row."""
    generator = torch.Generator().manual_seed(11)
    clean, noise = torch.randn(2, rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    return clean, noise


def test_a_perfect_epsilon_model_finds_the_clean_latent(
    load: Callable[[str], SdModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the forward process in float64: x = z0 + sigma e; a model that answers e must lead back to z0."""
    model, (clean, noise) = load("tiny"), truth(5)
    unet = Recorder(model._unet, lambda *_: noise.float())
    monkeypatch.setattr(model, "_unet", unet)
    x = (clean + SIGMAS.double().view(-1, 1, 1, 1) * noise).float()

    found = model.denoise(x, SIGMAS, {"text": torch.zeros(5, 77, 32)})

    torch.testing.assert_close(found.double(), clean, rtol=0, atol=2e-5)
    # Variance-preserving: the model sees sqrt(a) z0 + sqrt(1 - a) e, where a = 1 / (1 + sigma^2).
    kept = (1 / (1 + SIGMAS.double() ** 2)).view(-1, 1, 1, 1)
    expected = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    torch.testing.assert_close(unet.calls[0][0].double(), expected, rtol=0, atol=2e-6)


def test_a_perfect_v_model_finds_the_clean_latent(
    load: Callable[[str], SdModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """v = sqrt(a) e - sqrt(1 - a) z0 (Salimans & Ho 2022), in float64 and in the variance-preserving view."""
    model, (clean, noise) = load("tiny-v"), truth(5)
    kept = (1 / (1 + SIGMAS.double() ** 2)).view(-1, 1, 1, 1)
    v = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    monkeypatch.setattr(model, "_unet", Recorder(model._unet, lambda *_: v.float()))
    x = (clean + SIGMAS.double().view(-1, 1, 1, 1) * noise).float()

    found = model.denoise(x, SIGMAS, {"text": torch.zeros(5, 77, 32)})

    torch.testing.assert_close(found.double(), clean, rtol=0, atol=2e-5)


def test_each_row_is_told_the_nearest_integer_time_of_its_own_sigma(
    load: Callable[[str], SdModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("tiny")
    unet = Recorder(model._unet, lambda x, _: x)
    monkeypatch.setattr(model, "_unet", unet)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    logs = np.log(np.sqrt((1 - kept) / kept))
    expected = [int(np.abs(np.log(float(sigma)) - logs).argmin()) for sigma in SIGMAS]

    model.denoise(torch.zeros(5, 4, 8, 8), SIGMAS, {"text": torch.zeros(5, 77, 32)})

    timesteps = unet.calls[0][1]
    assert timesteps.tolist() == expected
    assert not timesteps.dtype.is_floating_point


def test_a_row_does_not_feel_its_company(tiny: SdModel) -> None:
    x = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(2)) * 5
    texts = torch.cat([text(tiny, prompt) for prompt in ("a", "a red hat", "(house:1.4)", "", "by the sea")])

    together = tiny.denoise(x, SIGMAS, {"text": texts})

    for i in range(5):
        alone = tiny.denoise(x[i : i + 1], SIGMAS[i : i + 1], {"text": texts[i : i + 1]})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_text_repeated_whole_means_the_same_as_once(tiny: SdModel) -> None:
    x, once = torch.ones(1, 4, 16, 16), text(tiny, "a red hat")
    sigma = torch.tensor([3.0])

    single = tiny.denoise(x, sigma, {"text": once})

    twice = tiny.denoise(x, sigma, {"text": once.repeat(1, 2, 1)})
    padded = tiny.denoise(x, sigma, {"text": torch.cat([once, torch.zeros_like(once)], dim=1)})
    torch.testing.assert_close(twice, single, rtol=1e-4, atol=1e-4)
    assert float((padded - single).abs().max()) > 1e-3


def test_zero_residuals_change_no_bit_and_others_do(tiny: SdModel) -> None:
    x, sigma = torch.ones(2, 4, 16, 16), torch.tensor([3.0, 1.0])
    conditioning = {"text": text(tiny, "a hat").repeat(2, 1, 1)}
    widths = [32, 32, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128]
    sides = [16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    zeros = Residuals(
        tuple(torch.zeros(2, width, side, side) for width, side in zip(widths, sides, strict=True)),
        torch.zeros(2, 128, 2, 2),
    )

    plain = tiny.denoise(x, sigma, conditioning)

    assert torch.equal(tiny.denoise(x, sigma, conditioning, zeros), plain)
    second = zeros.mid.clone()
    second[1] += 5
    changed = tiny.denoise(x, sigma, conditioning, Residuals(zeros.down, second))
    assert torch.equal(changed[0], plain[0])
    assert not torch.equal(changed[1], plain[1])
    zeros.down[0].add_(5)
    assert not torch.equal(tiny.denoise(x, sigma, conditioning, zeros), plain)


@pytest.mark.parametrize("name", ["tiny-inpaint", "tiny-inpaint-single"])
def test_an_inpainting_model_takes_five_channels_after_the_latent(
    load: Callable[[str], SdModel], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(name)
    unet = Recorder(model._unet, lambda x, _: x[:, :4])
    monkeypatch.setattr(model, "_unet", unet)
    x, extra = torch.full((1, 4, 8, 8), 2.0), torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 8, 8)

    model.denoise(x, torch.tensor([1.0]), {"text": torch.zeros(1, 77, 32)}, extra=extra)

    assert model.extra_channels == 5
    seen = unet.calls[0][0][0, :, 0, 0].tolist()
    assert seen == pytest.approx([2**0.5] * 4 + [0, 1, 2, 3, 4])
    assert unet.calls[0][0].is_contiguous()


def test_inpainting_channels_reach_the_weights(load: Callable[[str], SdModel]) -> None:
    model, x, sigma = load("tiny-inpaint"), torch.ones(1, 4, 16, 16), torch.tensor([2.0])
    conditioning = {"text": text(model, "a hat")}

    nothing = model.denoise(x, sigma, conditioning, extra=torch.zeros(1, 5, 16, 16))
    masked = model.denoise(x, sigma, conditioning, extra=torch.ones(1, 5, 16, 16))

    assert float((nothing - masked).abs().max()) > 1e-2


@pytest.mark.parametrize(("name", "channels"), [("tiny", 5), ("tiny-inpaint", 0), ("tiny-inpaint", 4)])
def test_the_wrong_number_of_channels_is_refused(
    load: Callable[[str], SdModel], name: str, channels: int
) -> None:
    extra = torch.zeros(1, channels, 8, 8) if channels else None

    with pytest.raises(ValueError, match="extra channels"):
        load(name).denoise(
            torch.zeros(1, 4, 8, 8), torch.ones(1), {"text": torch.zeros(1, 77, 32)}, extra=extra
        )


def test_a_half_precision_model_still_speaks_float32(tiny_registry: Path, tiny: SdModel) -> None:
    entry = Registry.load(tiny_registry).model("tiny")
    half = SdFamily().load(entry, "cpu", torch.bfloat16)
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1.5])

    found = half.denoise(x, sigma, {"text": text(half, "a hat")})

    exact = tiny.denoise(x, sigma, {"text": text(tiny, "a hat")})
    assert found.dtype is torch.float32
    assert 0 < float((found - exact).abs().max()) < 0.2
    assert finish(half.decode(finish(half.encode(torch.rand(1, 3, 64, 64))))).dtype is torch.float32


def test_a_models_shapes_are_the_latents(tiny: SdModel) -> None:
    assert tiny.latent_shape(320, 192) == (4, 24, 40)
    assert tuple(finish(tiny.encode(torch.rand(1, 3, 192, 320))).shape[1:]) == (4, 24, 40)
    assert (tiny.scale_factor, tiny.latent_channels, tiny.extra_channels) == (8, 4, 0)


def test_no_gradient_is_recorded(tiny: SdModel, tiny_registry: Path) -> None:
    found = tiny.denoise(torch.ones(1, 4, 8, 8), torch.ones(1), {"text": text(tiny, "a hat")})

    assert not found.requires_grad
    assert not finish(tiny.decode(torch.ones(1, 4, 8, 8))).requires_grad
    weights = load_file(
        tiny_registry.parent / "weights/diffusers/sd15/unet/diffusion_pytorch_model.safetensors"
    )
    assert torch.equal(tiny._unet.state_dict()["conv_out.weight"], weights["conv_out.weight"])
