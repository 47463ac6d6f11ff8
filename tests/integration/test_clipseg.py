"""Masks from words, through transformers' own model, in whole jobs."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPSegForImageSegmentation

from overpaint_shared.errors import MaskError, ModelLoadError
from overpaint_worker import protocol as p
from overpaint_worker.engine.clipseg import maps, model
from overpaint_worker.engine.clipseg.store import SegmenterStore
from overpaint_worker.engine.families.vocabulary import clip
from overpaint_worker.engine.families.weights import HashCache
from overpaint_worker.engine.session import Session
from overpaint_worker.registry import Registry
from tests import segmenters
from tests.rendering import DEVICE, INPUTS, house, img2img, kitchen, pixels, render, request
from tests.unit.pictures import WIDE, gamma_curve, matrix_icc

WORDS = {"from": "clipseg", "text": "the hat", "threshold": 0.97, "blur": 0.8, "dilation_factor": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return segmenters.build(tmp_path_factory.mktemp("segmenter") / "clipseg")


@pytest.fixture(scope="module")
def registry(tmp_path_factory, folder, tiny_registry):
    return segmenters.registry(tmp_path_factory.mktemp("registry"), folder, tiny_registry)


def store(tmp_path, folder):
    return SegmenterStore(Registry.load(segmenters.registry(tmp_path, folder)), DEVICE)


def test_the_networks_answer_is_transformers_own(tmp_path, folder):
    """The second way: ids, pixels and network put together by hand from the formulas."""
    picture = torch.rand(50, 70, 3, generator=torch.Generator().manual_seed(1))
    got = store(tmp_path, folder).get("clipseg").logits(picture, "the hat")
    seen = Image.fromarray((picture.numpy() * np.float32(255)).astype(np.uint8))
    small = np.asarray(seen.resize((64, 64), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    normal = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    ids = [49406, *clip().tokenize("the hat"), 49407]
    network = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    with torch.inference_mode():
        want = network(  # what follows the end, and the mask that hides it, must not matter
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            pixel_values=torch.from_numpy(normal.transpose(2, 0, 1)[None].astype(np.float32)),
        ).logits  # fmt: skip
    assert got.shape == (64, 64)
    assert torch.allclose(got, want.reshape(64, 64), atol=1e-3)
    other = store(tmp_path, folder).get("clipseg").logits(picture, "the cat")
    assert (other - got).abs().max() > 1e-2


def test_a_text_that_is_too_long_is_refused_not_cut(tmp_path, folder):
    with pytest.raises(MaskError, match="77 tokens") as caught:
        store(tmp_path, folder).get("clipseg").logits(torch.zeros(8, 8, 3), "a " * 77, "mask.masks[1]")
    assert caught.value.field == "mask.masks[1].text"


def test_it_is_loaded_once_and_known_by_its_weights(tmp_path, folder):
    segmenters_ = store(tmp_path, folder)
    assert segmenters_.get("clipseg") is segmenters_.get("clipseg")
    (traits,) = segmenters_.catalogue()
    assert (traits.name, traits.kind, traits.family) == ("clipseg", "segmenter", "clipseg")
    assert traits.sha256 == HashCache().digest({"model.safetensors": folder / "model.safetensors"})


def _pickle(at):
    (at / "model.safetensors").rename(at / "pytorch_model.bin")


def _truncated(at):
    data = (at / "model.safetensors").read_bytes()
    (at / "model.safetensors").write_bytes(data[:-100])


def _other(at):
    (at / "config.json").write_text('{"model_type": "sam"}')


def _unshown(at):
    (at / "preprocessor_config.json").unlink()


def _small_vocabulary(at):
    config = json.loads((at / "config.json").read_text())
    config["text_config"]["vocab_size"] = 700
    (at / "config.json").write_text(json.dumps(config))


def _no_weights_of_its_own(at):
    save_file({"a": torch.zeros(1)}, at / "model.safetensors")


BROKEN = {
    "a pickle": (_pickle, "safetensors"),
    "a truncated file": (_truncated, "truncated"),
    "another kind of model": (_other, "kind 'sam'"),
    "nothing says how pictures are shown to it": (_unshown, "preprocessor_config"),
    "a vocabulary without its tokenizer": (_small_vocabulary, "tokenizer.json"),
    "weights of something else": (_no_weights_of_its_own, "decoder"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_folder_is_said_when_it_is_looked_at(what, tmp_path, folder):
    spoil, words = BROKEN[what]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    entry = Registry.load(segmenters.registry(tmp_path, copy)).segmenter("clipseg")
    with pytest.raises(ModelLoadError, match=words):
        model.inspect(entry, HashCache())
    assert store(tmp_path, copy).catalogue() == []


def test_a_weight_that_is_missing_is_refused_when_it_is_loaded(tmp_path, folder):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    from safetensors.torch import load_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["decoder.film_mul.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="film_mul"):
        store(tmp_path, copy).get("clipseg")


def job(mask=None, *, method="latent_noise_mask", **more):
    return {
        **img2img(steps=2), "mask": mask or WORDS, "method": {"kind": method}, **more,
    }  # fmt: skip


def one(registry, spec, **more):
    return render(registry, [request("it", spec, **more)])["it"]


def by_hand(folder, tmp_path, picture):
    logits = store(tmp_path, folder).get("clipseg").logits(picture, "the hat")
    where = maps.indices(logits, threshold=0.97, blur=0.8, dilation=1)
    return where, maps.mask(where, picture.shape[1], picture.shape[0])


@pytest.mark.parametrize("method", ["img2img", "vae_encode_inpaint", "latent_noise_mask"])
def test_every_method_repaints_what_words_find(method, registry, folder, tmp_path):
    done = one(registry, job(method=method))
    assert isinstance(done, p.Done), done
    assert set(done.files) == {"image.png", "mask.png", "heatmap.png", "receipt.json"}
    before = pixels((INPUTS / "img64.png").read_bytes())
    picture = torch.from_numpy(before.astype(np.float32) / 255)
    where, mask = by_hand(folder, tmp_path, picture)
    assert 0.05 < mask.mean() < 0.95
    assert np.array_equal(pixels(done.files["mask.png"])[..., 0], np.rint(mask.numpy() * 255))
    heat = np.rint(maps.heat_map(where, picture).numpy() * 255)
    assert np.array_equal(pixels(done.files["heatmap.png"]), heat)
    out, spared = pixels(done.files["image.png"]), mask.numpy() == 0
    assert spared.any()
    assert np.array_equal(out[spared], before[spared])
    assert not np.array_equal(out[~spared], before[~spared])
    receipt = json.loads(done.files["receipt.json"])
    assert receipt["segmenters"][0]["name"] == "clipseg"
    assert receipt["certificate"]["coverage"] == pytest.approx(mask.mean().item(), abs=1e-6)


def test_nothing_found_fails_by_default_and_says_so(registry):
    failed = one(registry, job({**WORDS, "threshold": 1.0}))
    assert (failed.kind, failed.error["code"], failed.error["field"]) == ("job", "mask", "mask.text")
    assert "on_empty" in failed.error["fix"]


def test_nothing_found_and_skipped_returns_the_source_bit_for_bit_unmarked(registry):
    mask = {**WORDS, "threshold": 1.0, "on_empty": "skip", "min_coverage": 0.5, "ops": [{"op": "invert"}]}
    done = one(registry, job(mask, composite=False, compat="none"))
    assert isinstance(done, p.Done), done
    assert np.array_equal(pixels(done.files["image.png"]), pixels((INPUTS / "img64.png").read_bytes()))
    assert not pixels(done.files["mask.png"]).any()
    receipt = json.loads(done.files["receipt.json"])
    assert receipt["skipped"] is True
    assert receipt["evaluations"] is None
    assert b"digitalsourcetype" not in done.files["image.png"]


def test_what_is_skipped_keeps_colours_that_the_models_space_has_not(registry):
    """Through sRGB and back these would be clipped, so the file's own samples must be what is written."""
    levels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", icc_profile=matrix_icc(WIDE, gamma_curve(2.2)))
    mask = {**WORDS, "threshold": 1.0, "on_empty": "skip"}
    spec = job(mask, composite=False, compat="none")
    done = one(registry, spec, inputs={"img64.png": out.getvalue()})
    assert isinstance(done, p.Done), done
    assert np.array_equal(pixels(done.files["image.png"]), levels)


def test_nothing_found_and_full_repaints_everything(registry):
    done = one(registry, job({**WORDS, "threshold": 1.0, "on_empty": "full"}))
    assert (pixels(done.files["mask.png"]) == 255).all()
    before = pixels((INPUTS / "img64.png").read_bytes())
    assert (pixels(done.files["image.png"]) != before).any(-1).mean() > 0.5


def test_nothing_found_under_compat_is_an_empty_mask_as_in_the_reference(registry):
    done = one(registry, job({**WORDS, "threshold": 1.0}, compat="comfyui"))
    assert isinstance(done, p.Done), done
    assert not pixels(done.files["mask.png"]).any()
    assert json.loads(done.files["receipt.json"])["skipped"] is False


NOTHING = {**WORDS, "threshold": 1.0, "on_empty": "skip"}
SQUARE = {"from": "image", "image": "mask64.png"}
COMBINED = {
    "a union goes on with the other": ("union", [NOTHING, SQUARE], False),
    "a union of nothing is skipped": ("union", [NOTHING, NOTHING], True),
    "an intersection is skipped": ("intersect", [SQUARE, NOTHING], True),
    "nothing less something is skipped": ("subtract", [NOTHING, SQUARE], True),
    "something less nothing stays": ("subtract", [SQUARE, NOTHING], False),
}


@pytest.mark.parametrize("what", COMBINED)
def test_in_a_combination_what_is_skipped_is_empty(what, registry):
    how, parts, skipped = COMBINED[what]
    done = one(registry, job({"from": "combine", "how": how, "masks": parts}))
    assert isinstance(done, p.Done), done
    assert json.loads(done.files["receipt.json"])["skipped"] is skipped
    square = pixels((INPUTS / "mask64.png").read_bytes())
    square = square[..., 0] if square.ndim == 3 else square
    assert np.array_equal(pixels(done.files["mask.png"])[..., 0], square * (not skipped))
    count = sum(part is NOTHING for part in parts)
    heat = {f"heatmap{number}.png" for number in ("", "-2")[:count]}
    assert heat == {name for name in done.files if name.startswith("heatmap")}


def test_several_words_are_combined(registry):
    words = [{**WORDS, "text": text} for text in ("the hat", "a red scarf")]
    alone = [pixels(one(registry, job(mask)).files["mask.png"]) for mask in words]
    both = one(registry, job({"from": "combine", "how": "union", "masks": words}))
    assert np.array_equal(pixels(both.files["mask.png"]), np.maximum(*alone))
    assert not np.array_equal(*alone)


def test_coverage_bounds_fail_before_anything_is_rendered(registry):
    k = kitchen(registry)
    k.conductor.submit(request("it", job({**WORDS, "max_coverage": 0.01})))
    k.conductor.run_until_idle()
    k.conductor.close()
    assert k.ends()["it"].error["field"] == "mask.max_coverage"
    assert not [said for said in k.said if isinstance(said, p.Progress) and said.stage == "encode"]


def test_a_segmenter_that_is_not_here_is_for_another_worker(registry):
    failed = one(registry, job({**WORDS, "segmenter": "sam"}))
    assert (failed.kind, failed.error["field"]) == ("unable", "mask.segmenter")


def test_searching_takes_turns_with_other_jobs_steps(registry):
    k = kitchen(registry)
    k.conductor.submit(request("steps", img2img(steps=30)))
    k.conductor.submit(request("words", job()))
    k.conductor.run_until_idle()
    k.conductor.close()
    assert {name: type(end) for name, end in k.ends().items()} == {"steps": p.Done, "words": p.Done}


def test_a_search_has_a_deadline_of_its_own_and_not_a_loads(registry):
    house.cache_clear()
    k = kitchen(registry)
    k.conductor.submit(request("it", job({"from": "combine", "how": "union", "masks": [WORDS, WORDS]})))
    k.conductor.run_until_idle()
    k.conductor.close()
    assert isinstance(k.ends()["it"], p.Done)
    stages = [said.stage for said in k.said if isinstance(said, p.Progress)]
    assert stages.index("load") < stages.index("mask") < stages.index("condition")
    budgets = {said.stage: said.budget_s for said in k.said if isinstance(said, p.Unit)}
    assert budgets["mask"] == budgets["condition"] < budgets["load"]


def test_a_segmenter_given_up_while_its_job_is_stored_is_not_loaded_for_the_receipt(registry, monkeypatch):
    finish, kept = Session.finish, []

    def relieved(session):
        store = session._house.segmenters
        kept.append(store)
        assert store.relieve(())
        return finish(session)

    monkeypatch.setattr(Session, "finish", relieved)
    done = one(registry, job())
    assert isinstance(done, p.Done), done
    assert not kept[0].has("clipseg")
    (told,) = json.loads(done.files["receipt.json"])["segmenters"]
    assert (told["name"], told["sha256"]) == ("clipseg", kept[0].catalogue()[0].sha256)


def test_a_cancelled_search_ends_cancelled(registry):
    k = kitchen(registry)
    k.conductor.submit(request("it", job()))
    k.conductor.cancel("it", 1)
    k.conductor.run_until_idle()
    k.conductor.close()
    assert isinstance(k.ends()["it"], p.Cancelled)


def test_the_engine_announces_its_segmenters(registry):
    from overpaint_worker.engine.assemble import build, ready
    from overpaint_worker.engine.options import EngineOptions

    options = EngineOptions(fd=-1, registry=registry, device=str(DEVICE))
    conductor = build(options, lambda _: None)
    said = ready(conductor, options)
    conductor.close()
    assert "mask:clipseg" in said.features
    assert [each["name"] for each in said.catalogue if each["kind"] == "segmenter"] == ["clipseg"]
