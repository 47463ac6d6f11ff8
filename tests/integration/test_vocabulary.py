"""Models with a vocabulary of their own: the prompt's tokens, what is refused, digests; and `unet`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPSegForImageSegmentation, CLIPTextModel

from overpaint_shared.errors import ModelLoadError
from overpaint_worker import protocol as p
from overpaint_worker.engine.clipseg import model as clipseg
from overpaint_worker.engine.families import finish
from overpaint_worker.engine.families.sd import SdFamily, SdModel
from overpaint_worker.engine.families.vocabulary import LARGEST_BYTES, TOKENIZER_FILE, clip, vocabulary_of
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.registry import ModelEntry, Registry, SegmenterEntry
from tests import miniatures
from tests.miniatures import END, START
from tests.rendering import img2img, pixels, render, request

CPU = torch.device("cpu")
MASK = {"from": "image", "image": "mask64.png", "channel": "red"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.build(tmp_path_factory.mktemp("miniatures"))


@pytest.fixture
def copy(registry: Path, tmp_path: Path) -> Path:
    """A copy of the models' folder, to be spoilt."""
    return Path(shutil.copytree(registry.parent, tmp_path / "copy"))


@pytest.fixture(scope="module")
def mini(registry: Path) -> SdModel:
    return SdFamily().load(Registry.load(registry).model("mini"), "cpu")


@pytest.fixture(scope="module")
def encoder(registry: Path) -> Any:
    return CLIPTextModel.from_pretrained(registry.parent / "mini/text_encoder", dtype=torch.float32).eval()


def entry(folder: Path, **keys: Any) -> ModelEntry:
    return ModelEntry(name="it", base=folder, family="sd", path="mini", **keys)


def ids(text: str) -> list[int]:
    found: list[int] = miniatures.tokenizer().encode(text, add_special_tokens=False).ids
    return found


def states(encoder: Any, words: list[int]) -> Tensor:
    """What the encoder says of one block: start, the words, the end, and the end to fill it."""
    block = [START, *words, *[END] * (76 - len(words))]
    with torch.no_grad():
        said: Tensor = encoder(input_ids=torch.tensor([block])).last_hidden_state
    return said


def text(model: SdModel, prompt: str, **options: Any) -> Tensor:
    return model.condition(prompt, **options).tensors["text"]


# --- prompts


def test_a_prompt_is_read_with_the_folders_own_vocabulary(mini: SdModel, encoder: Any) -> None:
    assert len(ids("a red hat")) == 3
    torch.testing.assert_close(text(mini, "a red hat"), states(encoder, ids("a red hat")), rtol=0, atol=0)
    torch.testing.assert_close(text(mini, ""), states(encoder, []), rtol=0, atol=0)


def test_a_word_that_it_was_not_taught_is_spelt(mini: SdModel, encoder: Any) -> None:
    assert len(ids("zebu")) == 4
    assert END not in ids("zebu")
    torch.testing.assert_close(text(mini, "Zebu"), states(encoder, ids("zebu")), rtol=0, atol=0)


def test_a_long_prompt_is_read_in_blocks(mini: SdModel, encoder: Any) -> None:
    words = ids("a red cat " * 40)
    assert len(words) == 120
    expected = torch.cat([states(encoder, words[:75]), states(encoder, words[75:])], dim=1)
    torch.testing.assert_close(text(mini, "a red cat " * 40), expected, rtol=1e-5, atol=1e-6)


def test_weights_act_on_its_tokens(mini: SdModel, encoder: Any) -> None:
    plain, empty = states(encoder, ids("a red hat")), states(encoder, [])
    weights = torch.tensor([1, 1, 1.5, 1, *[1] * 73]).view(1, 77, 1)
    torch.testing.assert_close(text(mini, "a (red:1.5) hat"), empty + weights * (plain - empty))


# --- which vocabulary


def test_clips_own_is_taken_where_a_folder_brings_it(tiny_registry: Path, tmp_path: Path) -> None:
    """And the digest, which is known to others, stays as it was."""
    folder = shutil.copytree(tiny_registry.parent / "weights/diffusers/sd15", tmp_path / "mini")
    before = SdFamily().inspect(entry(tmp_path)).sha256
    (folder / "tokenizer").mkdir(exist_ok=True)
    brought = json.loads(TOKENIZER_FILE.read_text())
    brought["added_tokens"].append({**brought["added_tokens"][-1], "id": 49408, "content": "<mine>"})
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(brought))
    assert SdFamily().inspect(entry(tmp_path)).sha256 == before
    found = vocabulary_of(entry(tmp_path), folder / "tokenizer/tokenizer.json", {"vocab_size": 49408})
    assert found.tokenizer is clip().tokenizer
    assert (found.marks.start, found.marks.end, found.marks.pad) == (49406, 49407, 49407)


def test_another_tokenizer_is_another_model(copy: Path) -> None:
    before = SdFamily().inspect(entry(copy)).sha256
    names = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
    files = sorted([f"{name}.safetensors" for name in names] + ["tokenizer/tokenizer.json"])
    listed = "".join(
        f"{hashlib.sha256((copy / 'mini' / name).read_bytes()).hexdigest()}  {name}\n" for name in files
    )
    assert before == hashlib.sha256(listed.encode()).hexdigest()
    changed = Tokenizer.from_file(str(copy / "mini/tokenizer/tokenizer.json"))
    changed.normalizer = None
    changed.save(str(copy / "mini/tokenizer/tokenizer.json"))
    assert SdFamily().inspect(entry(copy)).sha256 != before


def _gone(file: Path) -> None:
    file.unlink()


def _clips(file: Path) -> None:
    shutil.copy(TOKENIZER_FILE, file)


def _larger(file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["zebu"])
    tokenizer.save(str(file))


def _with_a_gap(file: Path) -> None:
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary["red</w>"] = 4000
    file.write_text(json.dumps(found))


def _otherwise_framed(file: Path) -> None:
    file.write_text(file.read_text().replace("<|startoftext|>", "<s>"))


def _torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def _huge(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" " * LARGEST_BYTES)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (_gone, "knows 291 tokens, not CLIP's 49408, and .*tokenizer.json is not there"),
    "CLIP's": (_clips, "knows 291 tokens, not CLIP's 49408, and .*is that of CLIP"),
    "one of more tokens": (_larger, "has 292 tokens, and the text encoder knows 291"),
    "one with a gap": (_with_a_gap, "has 291 tokens"),
    "one without a start": (_otherwise_framed, r"has no token <\|startoftext\|>"),
    "a torn one": (_torn, "cannot be read"),
    "a huge one": (_huge, "more than 8388608 bytes"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_tokenizer_that_does_not_fit_is_refused(what: str, copy: Path) -> None:
    spoil, words = SPOILT[what]
    spoil(copy / "mini/tokenizer/tokenizer.json")
    spoil(copy / "mini-clipseg/tokenizer.json")
    with pytest.raises(ModelLoadError, match=words) as caught:
        SdFamily().inspect(entry(copy))
    assert caught.value.field == "models.it.path"
    assert caught.value.fix
    with pytest.raises(ModelLoadError, match=words):
        clipseg.inspect(SegmenterEntry(name="it", base=copy, path="mini-clipseg"), HashCache())


@pytest.mark.parametrize("said", [2, 0, 49407])
def test_an_encoder_that_ends_a_text_elsewhere_is_refused(said: int, copy: Path) -> None:
    change_json(
        copy / "mini-clipseg/config.json", lambda config: config["text_config"].update(eos_token_id=said)
    )
    with pytest.raises(ModelLoadError, match="eos_token_id = 1"):
        clipseg.inspect(SegmenterEntry(name="it", base=copy, path="mini-clipseg"), HashCache())


@pytest.mark.parametrize("size", ["many", 0, None])
def test_a_vocabulary_of_no_size_is_refused(size: object, copy: Path) -> None:
    change_json(copy / "mini/text_encoder/config.json", lambda config: config.update(vocab_size=size))
    with pytest.raises(ModelLoadError, match="vocab_size"):
        SdFamily().inspect(entry(copy))


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_a_segmenter_whose_text_encoder_is_nothing_is_refused(copy: Path) -> None:
    change_json(copy / "mini-clipseg/config.json", lambda config: config.update(text_config=[1]))
    with pytest.raises(ModelLoadError, match="text_config"):
        clipseg.inspect(SegmenterEntry(name="it", base=copy, path="mini-clipseg"), HashCache())


# --- a VAE without attention and with its own scale, in half precision on disk


def test_its_vae_is_diffusers_own_times_its_own_factor(mini: SdModel, registry: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(registry.parent / "mini/vae", torch_dtype=torch.float32)
    picture = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latent = vae.encode(picture * 2 - 1).latent_dist.mode() * miniatures.SCALING
        back = (vae.decode(latent / miniatures.SCALING).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(finish(mini.encode(picture)), latent, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(finish(mini.decode(latent)), back, rtol=1e-4, atol=1e-5)


def test_halves_on_disk_are_computed_with_in_float32_on_a_cpu(mini: SdModel, registry: Path) -> None:
    stored = load_file(registry.parent / "mini/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(mini._unet.state_dict()["conv_in.weight"], stored.float())
    assert {each.dtype for each in (*mini._vae._vae.parameters(), *mini._unet.parameters())} == {
        torch.float32
    }


def test_all_masked_is_what_its_own_vae_makes_of_grey(registry: Path) -> None:
    model = SdFamily().load(Registry.load(registry).model("mini-inpaint"), "cpu")
    found = model.inpaint_channels(torch.zeros(1, 4, 6, 8), None, None)
    assert found is not None
    grey = finish(model.encode(torch.full((1, 3, 48, 64), 0.5)))
    torch.testing.assert_close(found, torch.cat([torch.ones(1, 1, 6, 8), grey], dim=1))


# --- another UNet


def test_unet_puts_another_in_the_models_place(registry: Path, mini: SdModel) -> None:
    read = Registry.load(registry)
    traits, model = (
        SdFamily().inspect(read.model("mini-inpaint")),
        SdFamily().load(read.model("mini-inpaint"), "cpu"),
    )
    assert (traits.channels, model.extra_channels) == (9, 5)
    own: Any = UNet2DConditionModel.from_pretrained(
        registry.parent / "mini-inpaint/unet", torch_dtype=torch.float32
    )
    assert torch.equal(model._unet.state_dict()["conv_in.weight"], own.state_dict()["conv_in.weight"])
    assert torch.equal(text(model, "a hat"), text(mini, "a hat"))


def test_a_model_is_known_by_the_unet_that_it_has(copy: Path) -> None:
    replaced = SdFamily().inspect(entry(copy, unet="mini-inpaint/unet")).sha256
    shutil.rmtree(copy / "mini/unet")
    assert SdFamily().inspect(entry(copy, unet="mini-inpaint/unet")).sha256 == replaced
    shutil.move(copy / "mini-inpaint/unet", copy / "mini/unet")
    assert SdFamily().inspect(entry(copy)).sha256 == replaced


def test_unet_goes_with_a_single_file_too(tiny_registry: Path) -> None:
    weights = tiny_registry.parent / "weights"
    single = ModelEntry(
        name="it", base=weights, family="sd", path="original/sd15.safetensors",
        unet="diffusers/sd15_inpaint9/unet", config="../config/sd15",
    )  # fmt: skip
    model, traits = SdFamily().load(single, "cpu"), SdFamily().inspect(single)
    assert (traits.channels, model.extra_channels) == (9, 5)
    alone = SdFamily().inspect(single.model_copy(update={"unet": None}))
    assert (alone.channels, alone.sha256 == traits.sha256) == (4, False)


def _no_config(unet: Path) -> None:
    (unet / "config.json").unlink()


def _no_weights(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").unlink()


def _pickle(unet: Path) -> None:
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("spoil", "words"), [(_no_config, "unet/config.json"), (_no_weights, "unet has no"), (_pickle, "pickle")]
)
def test_an_unet_that_cannot_be_read_is_refused_by_its_own_key(
    spoil: Callable[[Path], None], words: str, copy: Path
) -> None:
    spoil(copy / "mini-inpaint/unet")
    with pytest.raises(ModelLoadError, match=words) as caught:
        SdFamily().inspect(entry(copy, unet="mini-inpaint/unet"))
    assert (caught.value.field, caught.value.value) == ("models.it.unet", "mini-inpaint/unet")


def test_an_unet_for_another_text_is_refused(tiny_registry: Path, copy: Path) -> None:
    other = tiny_registry.parent / "weights/diffusers/sd15/unet"
    with pytest.raises(ModelLoadError, match="text of width 32, and the model's is 16 wide") as caught:
        SdFamily().inspect(entry(copy, unet=str(other)))
    assert caught.value.field == "models.it.unet"
    change_json(copy / "mini/text_encoder/config.json", lambda config: config.update(hidden_size="wide"))
    with pytest.raises(ModelLoadError, match="the model's is 0 wide"):
        SdFamily().inspect(entry(copy, unet="mini-inpaint/unet"))


# --- the segmenter


def test_a_segmenters_words_are_of_its_own_vocabulary(registry: Path) -> None:
    segmenter = clipseg.load(Registry.load(registry).segmenter("mini"), CPU, HashCache())
    picture = torch.rand(50, 70, 3, generator=torch.Generator().manual_seed(1))
    network: Any = CLIPSegForImageSegmentation.from_pretrained(
        registry.parent / "mini-clipseg", dtype=torch.float32
    ).eval()
    seen = segmenter._processor(np.asarray(picture.numpy() * 255, dtype=np.uint8), return_tensors="pt")
    with torch.no_grad():
        expected = network(
            input_ids=torch.tensor([[START, *ids("red hat"), END]]),
            attention_mask=torch.ones(1, 4, dtype=torch.int64), pixel_values=seen["pixel_values"],
        ).logits.reshape(miniatures.SIDE, miniatures.SIDE)  # fmt: skip
    found = segmenter.logits(picture, "red hat")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (segmenter.logits(picture, "a cat") - found).abs().max() > 1e-3


def test_another_tokenizer_is_another_segmenter(copy: Path) -> None:
    at = SegmenterEntry(name="it", base=copy, path="mini-clipseg")
    before = clipseg.inspect(at, HashCache()).sha256
    files = {name: copy / "mini-clipseg" / name for name in ("model.safetensors", "tokenizer.json")}
    assert before == HashCache().digest(files)


def test_half_precision_files_of_a_segmenter_are_found(copy: Path) -> None:
    folder = copy / "mini-clipseg"
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    found = clipseg.load(SegmenterEntry(name="it", base=copy, path="mini-clipseg"), CPU, HashCache())
    assert found.logits(torch.zeros(8, 8, 3), "hat").dtype == torch.float32


# --- whole jobs

JOBS: dict[str, dict[str, Any]] = {
    "img2img": {},
    "vae_encode_inpaint": {"mask": MASK},
    "latent_noise_mask": {"mask": MASK},
    "controlnet_inpaint": {"mask": MASK, "controlnet": "mini-inpaint"},
    "inpaint_model": {"mask": MASK, "model": "mini-inpaint"},
}


def test_every_method_renders_with_such_models(registry: Path) -> None:
    specs = {}
    for kind, more in JOBS.items():
        method = {"kind": kind} | ({"controlnet": more["controlnet"]} if "controlnet" in more else {})
        changes = {key: value for key, value in more.items() if key != "controlnet"}
        specs[kind] = {**img2img(steps=3), "model": "mini", "method": method, **changes}
    done = render(registry, [request(name, spec) for name, spec in specs.items()])
    for name, end in done.items():
        assert isinstance(end, p.Done), (name, end)
    pictures = {name: pixels(end.files["image.png"]) for name, end in done.items()}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(JOBS)


def test_words_find_a_mask_with_such_a_segmenter(registry: Path) -> None:
    mask = {"from": "clipseg", "segmenter": "mini", "text": "red hat", "threshold": 0.0}
    spec = {**img2img(steps=2), "model": "mini", "mask": mask, "method": {"kind": "latent_noise_mask"}}
    done = render(registry, [request("it", spec)])["it"]
    assert isinstance(done, p.Done), done
    assert json.loads(done.files["receipt.json"])["segmenters"][0]["name"] == "mini"
