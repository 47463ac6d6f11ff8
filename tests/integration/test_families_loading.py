"""The family `sd` reading real files: both layouts, what it refuses, and that it never asks a network."""

import hashlib
import json
import pickle
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from overpaint_shared.errors import ModelLoadError, UnsupportedError
from overpaint_worker.engine.families import family, finish
from overpaint_worker.engine.families.sd import LAYOUT, SdFamily, SdModel, compute_dtype
from overpaint_worker.engine.families.survey import CONFIGS, config_folder, survey
from overpaint_worker.engine.families.weights import HashCache, Header, TensorInfo, read_header
from overpaint_worker.registry import ModelEntry, Registry

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def entry(path: Path | str, base: Path = Path("/"), **keys: Any) -> ModelEntry:
    return ModelEntry(name="it", base=base, family="sd", path=str(path), **keys)


@pytest.fixture
def folder(tiny_registry: Path, tmp_path: Path) -> Path:
    """A copy of the tiny diffusers folder, to be damaged."""
    return Path(shutil.copytree(tiny_registry.parent / "weights/diffusers/sd15", tmp_path / "sd15"))


@pytest.fixture
def single(tiny_registry: Path, tmp_path: Path) -> Path:
    """A copy of the tiny single file, its configuration beside it."""
    shutil.copytree(tiny_registry.parent / "config/sd15", tmp_path / "config")
    return Path(shutil.copy(tiny_registry.parent / "weights/original/sd15.safetensors", tmp_path))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any attempt to reach or to look up a host fails, and is listed."""
    attempts: list[str] = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(repr(arguments[:2]))
        raise OSError("the network is blocked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return attempts


def rendered(model: SdModel) -> dict[str, torch.Tensor]:
    """What a model makes of fixed inputs, part by part."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = model.condition("a (red:1.2) brick house").tensors["text"]
    px = torch.rand(1, 3, 64, 48, generator=generator)
    latent = finish(model.encode(px))
    return {
        "text": text,
        "latent": latent,
        "picture": finish(model.decode(latent)),
        "denoised": model.denoise(x, torch.tensor([9.0, 0.7]), {"text": text.repeat(2, 1, 1)}),
    }


def test_a_single_file_renders_the_same_bits_as_the_folder(tiny_registry: Path) -> None:
    registry, sd = Registry.load(tiny_registry), family("sd")

    folder = rendered(sd.load(registry.model("tiny"), "cpu"))
    single = rendered(sd.load(registry.model("tiny-single"), "cpu"))

    for part, tensor in folder.items():
        assert torch.equal(tensor, single[part]), part


def test_both_layouts_load_without_any_network(
    tiny_registry: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    registry, sd = Registry.load(tiny_registry), family("sd")

    for name in ("tiny", "tiny-single"):
        sd.inspect(registry.model(name))
        sd.load(registry.model(name), "cpu").condition("a hat")

    assert no_network == []


def test_traits_come_from_headers_and_configurations(tiny_registry: Path) -> None:
    registry, sd = Registry.load(tiny_registry), family("sd")

    traits = {name: sd.inspect(model) for name, model in registry.models.items()}

    assert {name: (t.channels, t.prediction, t.context_width) for name, t in traits.items()} == {
        "tiny": (4, "epsilon", 32),
        "tiny-single": (4, "epsilon", 32),
        "tiny-v": (4, "v", 32),
        "tiny-inpaint": (9, "epsilon", 32),
        "tiny-inpaint-single": (9, "epsilon", 32),
    }
    assert all(t.family == "sd" and t.kind == "model" for t in traits.values())
    assert traits["tiny"].defaults == registry.model("tiny").defaults


def test_a_files_digest_is_its_own_and_a_folders_is_that_of_its_list(folder: Path, single: Path) -> None:
    sd = SdFamily()
    names = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
    listed = subprocess.run(
        ["sha256sum", *(f"{name}.safetensors" for name in names)], cwd=folder, check=True, capture_output=True
    ).stdout

    assert sd.inspect(entry(folder)).sha256 == hashlib.sha256(listed).hexdigest()
    assert (
        sd.inspect(entry(single, tmp := single.parent, config="config")).sha256
        == hashlib.sha256((tmp / single.name).read_bytes()).hexdigest()
    )


def test_weights_of_another_digest_are_refused_at_load(folder: Path) -> None:
    right = SdFamily().inspect(entry(folder)).sha256
    SdFamily().load(entry(folder, sha256=right), "cpu")

    for act in (SdFamily().inspect, lambda it: SdFamily().load(it, "cpu")):
        with pytest.raises(ModelLoadError, match=str(right)) as caught:
            act(entry(folder, sha256="0" * 64))
        assert caught.value.field == "models.it.sha256"


def test_a_digest_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, cache = tmp_path / "a.safetensors", tmp_path / "cache" / "hashes.json"
    weights.write_bytes(b"one")
    first = HashCache(cache).sha256(weights)

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert HashCache(cache).sha256(weights) == first == hashlib.sha256(b"one").hexdigest()
    weights.write_bytes(b"other")
    assert HashCache(cache).sha256(weights) == hashlib.sha256(b"other").hexdigest()


def test_digests_that_others_wrote_meanwhile_are_kept(tmp_path: Path) -> None:
    cache = tmp_path / "hashes.json"
    hashers = [HashCache(cache), HashCache(cache)]
    for name, hasher in zip("ab", hashers, strict=True):
        (tmp_path / name).write_bytes(name.encode())
        hasher.sha256(tmp_path / name)

    assert sorted(Path(path).name for path in json.loads(cache.read_text())) == ["a", "b"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")

    assert (
        HashCache(tmp_path / "a" / "hashes.json").sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    )


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"x": 1}', b""])
def test_a_damaged_digest_cache_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    weights, cache = tmp_path / "a.safetensors", tmp_path / "hashes.json"
    weights.write_bytes(b"one")
    cache.write_bytes(damage)

    assert HashCache(cache).sha256(weights) == hashlib.sha256(b"one").hexdigest()


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.sprung,))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("disguised", [False, True], ids=["named .bin", "named .safetensors"])
def test_a_pickle_in_a_folder_is_refused_and_never_opened(folder: Path, part: str, disguised: bool) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    pickled = weights if disguised else weights.with_suffix(".bin")
    weights.unlink()
    pickled.write_bytes(pickle.dumps(Trap(folder / "sprung")))

    for act in (SdFamily().inspect, lambda it: SdFamily().load(it, "cpu")):
        with pytest.raises(ModelLoadError, match="pickle"):
            act(entry(folder))
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["sd15.ckpt", "sd15.safetensors"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "torch's zip"])
def test_a_pickled_checkpoint_is_refused_whatever_it_is_called(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    path, trap = tmp_path / name, {"state_dict": Trap(tmp_path / "sprung")}
    if zipped:
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))

    for act in (SdFamily().inspect, lambda it: SdFamily().load(it, "cpu")):
        with pytest.raises(ModelLoadError, match="pickle"):
            act(entry(path, config="sd15"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"<!doctype html>" + b" " * 100,
        (2**60).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[1] ",
        (10).to_bytes(8, "little") + b'{"a": {}} ',
        (26).to_bytes(8, "little") + b'{"__metadata__": "text"}  ',
    ],
    ids=["empty", "lfs pointer", "error page", "absurd length", "a list", "no shapes", "wrong metadata"],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)

    with pytest.raises(ModelLoadError, match=r"no safetensors file|holds no unet") as caught:
        SdFamily().inspect(entry(path))
    assert caught.value.field == "models.it.path"


def test_a_truncated_file_is_refused(single: Path) -> None:
    with single.open("r+b") as file:
        file.truncate(single.stat().st_size - 1)

    with pytest.raises(ModelLoadError, match="truncated"):
        SdFamily().inspect(entry(single, single.parent, config="config"))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        SdFamily().inspect(entry(tmp_path / "none"))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight"),
        ("vae", "decoder.conv_out.bias"),
        ("text_encoder", "final_layer_norm.weight"),
    ],
)
@pytest.mark.parametrize("mend", ["left out", "other shape"])
def test_a_folder_that_lacks_a_weight_is_refused(folder: Path, part: str, tensor: str, mend: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith(tensor)]
    if mend == "left out":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, path, {"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"missing|do not fit"):
        SdFamily().load(entry(folder), "cpu")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_single_file_that_lacks_a_weight_is_refused(single: Path, tensor: str) -> None:
    tensors = load_file(single)
    del tensors[tensor]
    save_file(tensors, single)

    with pytest.raises(ModelLoadError, match=r"missing|do not fit"):
        SdFamily().load(entry(single, single.parent, config="config"), "cpu")


def test_weights_of_another_architecture_are_refused(single: Path) -> None:
    with pytest.raises(ModelLoadError, match="do not fit"):
        SdFamily().load(entry(single, config="sd15"), "cpu")


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_a_file_without_a_part_is_refused(single: Path, part: str) -> None:
    save_file({name: t for name, t in load_file(single).items() if not name.startswith(part)}, single)

    with pytest.raises(ModelLoadError, match="holds no"):
        SdFamily().inspect(entry(single, single.parent, config="config"))


def test_a_folder_of_another_family_is_refused(folder: Path) -> None:
    (folder / "text_encoder_2").mkdir()

    with pytest.raises(ModelLoadError, match=r"no Stable Diffusion 1\.x or 2\.x") as caught:
        SdFamily().inspect(entry(folder))
    assert caught.value.field == "models.it.family"


@pytest.mark.parametrize(
    "scheduler",
    [{"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.1]}],
    ids=lambda change: next(iter(change)),
)
def test_a_noise_schedule_that_would_render_wrong_is_refused(folder: Path, scheduler: dict[str, Any]) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))

    with pytest.raises(ModelLoadError, match="noise schedule"):
        SdFamily().inspect(entry(folder))


def test_the_noise_levels_follow_the_models_own_betas(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.prod(1 - betas)

    space = SdFamily().load(entry(folder), "cpu").space

    assert space.sigma_max == pytest.approx(float(((1 - kept) / kept).sqrt()), rel=1e-6)


@pytest.mark.parametrize(("said", "expected"), [("v_prediction", "v"), ("epsilon", "epsilon")])
def test_a_folder_tells_its_prediction(folder: Path, said: str, expected: str) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": said}))

    assert SdFamily().inspect(entry(folder)).prediction == expected
    assert SdFamily().inspect(entry(folder, prediction="epsilon")).prediction == "epsilon"


def test_a_prediction_that_is_not_known_is_refused(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))

    with pytest.raises(ModelLoadError, match="'sample'"):
        SdFamily().inspect(entry(folder))


def test_a_files_metadata_tell_its_prediction(single: Path) -> None:
    save_file(load_file(single), single, {"modelspec.prediction_type": "v"})

    assert SdFamily().inspect(entry(single, single.parent, config="config")).prediction == "v"


def header(width: int, **metadata: str) -> Header:
    return Header({CONTEXT: TensorInfo("F16", (320, width))}, metadata)


def test_a_single_file_without_config_is_told_by_its_shapes() -> None:
    assert config_folder(entry("a.safetensors"), LAYOUT, header(768)).name == "sd15"
    assert config_folder(entry("a.safetensors", prediction="v"), LAYOUT, header(1024)).name == "sd21"
    for width in (1024, 2048):
        with pytest.raises(ModelLoadError) as caught:
            config_folder(entry("a.safetensors"), LAYOUT, header(width))
        assert caught.value.field == "models.it.config"


def test_an_unknown_config_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelLoadError, match="did you mean 'sd21-v'"):
        config_folder(entry("a.safetensors", config="sd21_v"), LAYOUT, header(1024))


def test_half_precision_files_are_found_where_there_are_no_others(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))

    found = survey(entry(folder), LAYOUT)

    assert {files.variant for files in found.folders.values()} == {"fp16"}
    SdFamily().load(entry(folder), "cpu")


def test_sharded_weights_load_and_count_in_the_digest(folder: Path) -> None:
    unet = folder / "unet"
    (whole,) = unet.glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(names.values()):
        save_file(
            {name: tensors[name] for name in names if names[name] == shard}, unet / shard, {"format": "pt"}
        )
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))

    model = SdFamily().load(entry(folder), "cpu")

    assert torch.equal(model._unet.conv_in.weight, tensors["conv_in.weight"])
    assert {"unet/part-0.safetensors", "unet/part-1.safetensors"} < set(survey(entry(folder), LAYOUT).files)
    index.write_text(
        json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}})
    )
    with pytest.raises(ModelLoadError, match="its own folder"):
        SdFamily().inspect(entry(folder))


def test_a_hub_id_loads_from_the_local_cache_only(
    tiny_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / REVISION
    here = entry("owner/name", revision=REVISION)

    with pytest.raises(ModelLoadError, match=f"hf download owner/name --revision {REVISION}"):
        SdFamily().inspect(here)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_registry.parent / "weights/diffusers/sd15")

    assert SdFamily().inspect(here).channels == 4
    with pytest.raises(ModelLoadError, match="not on this machine"):
        SdFamily().inspect(entry("owner/name", revision=REVISION[::-1]))
    assert no_network == []


def test_an_unknown_family_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="sd9"):
        family("sd9")


def test_auto_computes_in_half_precision_only_off_the_cpu() -> None:
    assert compute_dtype("auto", torch.device("cpu")) is torch.float32
    assert compute_dtype("auto", torch.device("cuda:1")) is torch.float16
    assert compute_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


def test_a_models_dtype_is_the_entrys_unless_another_is_asked_for(folder: Path) -> None:
    assert SdFamily().load(entry(folder, dtype="bfloat16"), "cpu").dtype is torch.bfloat16
    assert SdFamily().load(entry(folder, dtype="bfloat16"), "cpu", torch.float32).dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "unet", "vae", "text_encoder"),
    [
        # The parameter counts of the published checkpoints.
        ("sd15", 859_520_964, 83_653_863, 123_060_480),
        ("sd21", 865_910_724, 83_653_863, 340_387_840),
        ("sd21-v", 865_910_724, 83_653_863, 340_387_840),
    ],
)
def test_shipped_configurations_have_the_published_sizes(
    name: str, unet: int, vae: int, text_encoder: int
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    config = CONFIGS / name
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(config / "unet"))),
            AutoencoderKL.from_config(AutoencoderKL.load_config(str(config / "vae"))),
            CLIPTextModel(CLIPTextConfig.from_pretrained(str(config / "text_encoder"))),
        ]

    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [unet, vae, text_encoder]


def open_clip(encoder: CLIPTextModel) -> dict[str, torch.Tensor]:
    """The encoder's weights as a Stable Diffusion 2 checkpoint names them, attention projections fused."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    prefix = "cond_stage_model.model."
    found = {
        f"{prefix}token_embedding.weight": weights["embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": weights["embeddings.position_embedding.weight"],
        f"{prefix}ln_final.weight": weights["final_layer_norm.weight"],
        f"{prefix}ln_final.bias": weights["final_layer_norm.bias"],
    }
    for i in range(encoder.config.num_hidden_layers):
        source, target = f"encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            fused = [weights[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{target}attn.in_proj_{kind}"] = torch.cat(fused)
            for theirs, ours in {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items():
                found[f"{target}{theirs}.{kind}"] = weights[f"{source}{ours}.{kind}"]
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def test_an_open_clip_text_encoder_loads_from_a_single_file(single: Path) -> None:
    config = CLIPTextConfig.from_pretrained(str(single.parent / "config" / "text_encoder"))
    config.hidden_act = "gelu"
    config.save_pretrained(single.parent / "config" / "text_encoder")
    torch.manual_seed(3)
    original = CLIPTextModel(config).eval()
    others = {name: t for name, t in load_file(single).items() if not name.startswith("cond_stage_model.")}
    save_file({**others, **open_clip(original)}, single)

    model = SdFamily().load(entry(single, single.parent, config="config"), "cpu")

    # OpenCLIP pads with zeros. 320 and 3801 are CLIP's tokens of "a" and "hat".
    ids = torch.tensor([[49406, 320, 3801, 49407, *[0] * 73]])
    with torch.no_grad():
        expected = original(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.condition("a hat").tensors["text"], expected, rtol=0, atol=0)


def test_a_header_agrees_with_the_formats_own_reader(single: Path) -> None:
    found = read_header(single, entry(single))

    with safe_open(single, "pt") as reader:
        assert set(reader.keys()) == set(found.tensors)
        for name in reader.keys():  # noqa: SIM118 (no mapping)
            assert tuple(reader.get_slice(name).get_shape()) == found.tensors[name].shape
