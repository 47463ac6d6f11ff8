"""Only masked, the certificate and the receipt, in whole jobs on the tiny weights."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine import certificate, picture
from overpaint_worker.engine.provenance import RECEIPT_KEY, pixel_digest
from tests.rendering import img2img, pixels, render, request


def png(levels, **options):
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG", **options)
    return out.getvalue()


def soft_square(height, width, *, top, left, side, edge):
    ramp = np.minimum(np.arange(side) + 1, np.arange(side)[::-1] + 1) / edge
    mask = np.zeros((height, width))
    mask[top : top + side, left : left + side] = np.minimum(np.minimum.outer(ramp, ramp), 1)
    return np.rint(mask * 255).astype(np.uint8)


SOURCE = (
    np.random.default_rng(3).integers(0, 256, (12, 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)[:190, :251]
)
MASK = soft_square(190, 251, top=60, left=90, side=40, edge=6)
FILES = {"s.png": png(SOURCE), "m.png": png(MASK)}


def job(**more):
    return {
        **img2img(image="s.png", steps=2), "mask": {"from": "image", "image": "m.png"},
        "method": {"kind": "latent_noise_mask"}, **more,
    }  # fmt: skip


def region(**more):
    return {"kind": "only_masked", "padding": 12, "size": 64, **more}


def one(registry, spec, inputs=None):
    done = render(registry, [request("it", spec, inputs or FILES)])["it"]
    assert isinstance(done, p.Done), done
    return done, json.loads(done.files["receipt.json"])


@pytest.mark.parametrize("method", ["img2img", "vae_encode_inpaint", "latent_noise_mask"])
def test_only_the_mask_is_repainted_and_the_model_sees_only_its_surroundings(method, tiny_registry):
    done, receipt = one(tiny_registry, job(region=region(), method={"kind": method}))
    out = pixels(done.files["image.png"])
    assert np.array_equal(out[MASK == 0], SOURCE[MASK == 0])
    assert (out[MASK == 255] != SOURCE[MASK == 255]).any(-1).mean() > 0.5
    assert np.array_equal(pixels(done.files["mask.png"])[..., 0], MASK)
    assert receipt["size"] == {"width": 251, "height": 190, "model_width": 64, "model_height": 64}
    box = receipt["region"]
    inner = np.argwhere(MASK > 127)
    assert (box["x"], box["y"]) == (inner[0, 1] - 12, inner[0, 0] - 12)
    assert (box["width"], box["height"]) == tuple(np.ptp(inner, axis=0)[::-1] + 25)


def test_what_lies_outside_the_rectangle_does_not_matter(tiny_registry):
    """The picture inside the mask is the same whatever is elsewhere: so the model never saw it."""
    done, receipt = one(tiny_registry, job(region=region()))
    x, y, w, h = (receipt["region"][name] for name in ("x", "y", "width", "height"))
    other = np.random.default_rng(9).integers(0, 256, SOURCE.shape, np.uint8)
    other[y : y + h, x : x + w] = SOURCE[y : y + h, x : x + w]
    again, _ = one(tiny_registry, job(region=region()), {**FILES, "s.png": png(other)})
    inside = np.s_[y : y + h, x : x + w]
    assert np.array_equal(pixels(again.files["image.png"])[inside], pixels(done.files["image.png"])[inside])


def test_without_a_size_the_models_own_is_worked_at(tiny_registry):
    _, receipt = one(tiny_registry, job(region={"kind": "only_masked"}))
    assert receipt["spec"]["region"]["size"] == 64  # the tiny model's
    assert receipt["size"]["model_width"] == 64


def test_full_depth_samples_are_put_back_around_the_region(tiny_registry):
    deep = (SOURCE.astype(np.uint16) << 8) | 0x5A
    from PIL import PngImagePlugin

    from overpaint_worker.engine.deep_png import read
    from overpaint_worker.engine.png import write

    source = write(deep, PngImagePlugin.PngInfo(), None)
    done, receipt = one(tiny_registry, job(region=region()), {**FILES, "s.png": source})
    out = read(done.files["image.png"])
    assert np.array_equal(out[MASK == 0], deep[MASK == 0])
    assert receipt["certificate"]["outside"] == {"largest_change": 0, "changed_share": 0.0}


def test_a_mask_below_the_regions_threshold_is_refused(tiny_registry):
    weak = {**FILES, "m.png": png(MASK // 3)}
    failed = render(tiny_registry, [request("it", job(region=region()), weak)])["it"]
    assert (failed.kind, failed.error["field"]) == ("job", "region.threshold")


def test_controls_are_cut_like_the_canvas(tiny_registry):
    """A hint that differs outside the rectangle only changes nothing, one that differs inside does."""
    hint = np.zeros((190, 251, 3), np.uint8)
    elsewhere, inside = hint.copy(), hint.copy()
    elsewhere[:40] = 255
    inside[60:100, 90:130] = 255
    control = {"controlnet": "tiny", "image": "h.png"}
    made = [
        pixels(
            one(tiny_registry, job(region=region(), controls=[control]), {**FILES, "h.png": png(h)})[0]
            .files["image.png"]
        )
        for h in (hint, elsewhere, inside)
    ]  # fmt: skip
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_the_certificate_is_what_anyone_measures_on_the_files(tiny_registry):
    done, receipt = one(tiny_registry, job(composite=False, compat="none"))
    out, mask = pixels(done.files["image.png"]), MASK
    change = np.abs(out - SOURCE).max(-1)[mask == 0]
    told = receipt["certificate"]
    assert told["outside"] == {
        "largest_change": change.max(), "changed_share": pytest.approx((change > 0).mean(), abs=1e-6)
    }  # fmt: skip
    assert told["coverage"] == pytest.approx(mask.mean() / 255, abs=1e-6)
    under = mask > 0
    ring = np.zeros_like(under)
    for y, x in np.argwhere(under):
        ring[max(y - 8, 0) : y + 9, max(x - 8, 0) : x + 9] = True
    ring &= ~under
    after, before = (certificate.lab(each[ring].astype(np.float32) / 255) for each in (out, SOURCE))
    shift = told["ring"]["shift"]
    assert [shift[name] for name in "Lab"] == pytest.approx((after - before).mean(0), abs=1e-3)
    assert shift["delta_e"] == pytest.approx(np.linalg.norm(after - before, axis=-1).mean(), abs=1e-3)
    assert told["seam_contrast"]["result"] > 0


def test_with_composite_the_ring_is_untouched_and_what_was_rendered_is_told_beside_it(tiny_registry):
    _, kept = one(tiny_registry, job())
    _, let_go = one(tiny_registry, job(composite=False, compat="none"))
    assert kept["certificate"]["ring"]["shift"]["delta_e"] == 0
    rendered = kept["certificate"]["ring"]["rendered_shift"]
    assert rendered["delta_e"] == pytest.approx(let_go["certificate"]["ring"]["shift"]["delta_e"], abs=0.3)
    assert rendered["delta_e"] > 1


FINISH = {
    "a crop keeps the file's own pixels": (
        [{"op": "crop", "x": 40, "y": 30, "width": 150, "height": 120}],
        0,
    ),
    "scaling mixes what was repainted into its neighbours": (
        [{"op": "scale_by", "factor": 0.5, "filter": "lanczos"}],
        1,
    ),
}


@pytest.mark.parametrize("what", FINISH)
def test_finishing_operations_are_measured_too(what, tiny_registry):
    finish, least = FINISH[what]
    done = render(tiny_registry, [request("it", job(finish=finish, preserve={"max_outside": 0}), FILES)])[
        "it"
    ]
    if least == 0:
        assert isinstance(done, p.Done), done
        assert json.loads(done.files["receipt.json"])["certificate"]["outside"]["largest_change"] == 0
    else:
        assert isinstance(done, p.Failed)
        assert (done.kind, done.error["field"]) == ("job", "preserve.max_outside")


def test_lossy_output_is_certified_as_it_is(tiny_registry):
    done, receipt = one(tiny_registry, job(output={"format": "jpeg", "quality": 60}))
    out = pixels(done.files["image.jpeg"])
    change = np.abs(out - SOURCE).max(-1)[MASK == 0]
    assert receipt["certificate"]["outside"]["largest_change"] == change.max() > 0


def test_the_receipt_is_in_the_pngs_text_and_knows_the_pixels(tiny_registry):
    done, receipt = one(tiny_registry, job())
    with Image.open(io.BytesIO(done.files["image.png"])) as image:
        assert json.loads(image.info[RECEIPT_KEY]) == receipt
        assert "compositeWithTrainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
    assert receipt["picture"] == {"name": "image.png", "pixels_sha256": pixel_digest(done.files["image.png"])}
    mask = picture.load_mask(FILES["m.png"], Limits(), "mask", "red")
    import hashlib

    assert receipt["mask"]["sha256"] == hashlib.sha256(mask.numpy().astype("<f4").tobytes()).hexdigest()
    assert torch.equal(mask * 255, torch.from_numpy(MASK.astype(np.float32)))
