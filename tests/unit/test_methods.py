"""What each method makes of a canvas and a mask, by node-by-node derivations of its own."""

import time

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from overpaint_shared.errors import UnsupportedError
from overpaint_shared.job import ControlnetInpaint, Img2Img, InpaintModel, LatentNoiseMask, VaeEncodeInpaint
from overpaint_worker.engine.geometry import Size
from overpaint_worker.engine.methods import Scene, begin, fit_hint, vae_encode_inpaint
from overpaint_worker.engine.sizing import centre_crop, pad_to_multiple

WIDTH, HEIGHT = 45, 38
CROP = (slice(3, 35), slice(2, 42))
"""The centre of 38 x 45 whose sides are multiples of 8: offsets (38 % 8) // 2 and (45 % 8) // 2."""


def scene(method, *, compat, soft=True):
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(HEIGHT, WIDTH, 3, generator=generator)
    mask = torch.rand(HEIGHT, WIDTH, generator=generator)
    mask = mask if soft else mask.round()
    size = Size(WIDTH, HEIGHT)
    fit = centre_crop(size) if compat else pad_to_multiple(size)
    return Scene(picture=picture, mask=mask, method=method, fit=fit, compat=compat)


def grey_filled(picture, mask):
    return (picture - 0.5) * (1 - mask.round())[..., None] + 0.5


def test_img2img_has_no_noise_mask_and_nothing_else():
    start = begin("img2img", scene(Img2Img(), compat=True))
    assert (start.noise_mask, start.hints, start.masked) == (None, (), None)


def test_the_inpaint_model_gets_the_picture_twice_and_the_soft_mask_cropped_alike():
    given = scene(InpaintModel(), compat=True)
    start = begin("inpaint_model", given)
    picture, mask = given.picture[CROP], given.mask[CROP]
    assert torch.equal(start.picture, picture)
    assert torch.equal(start.noise_mask, mask)
    assert torch.equal(start.masked, grey_filled(picture, mask))


@pytest.mark.parametrize("latent", ["vae_encode_inpaint", "latent_noise_mask"])
@pytest.mark.parametrize("compat", [True, False])
def test_controlnet_inpaint_starts_as_the_method_it_goes_over(latent, compat):
    method = ControlnetInpaint(controlnet="c", latent=latent, grow_mask_by=5)
    start = begin("controlnet_inpaint", scene(method, compat=compat))
    over = {"vae_encode_inpaint": VaeEncodeInpaint(grow_mask_by=5), "latent_noise_mask": LatentNoiseMask()}
    plain = begin(latent, scene(over[latent], compat=compat))
    assert torch.equal(start.picture, plain.picture)
    assert torch.equal(start.noise_mask, plain.noise_mask)
    assert start.masked is None


def test_the_reference_scales_an_odd_hint_to_the_size_it_crops_the_picture_to():
    method = ControlnetInpaint(controlnet="c", strength=0.8, start=0.1, end=0.6)
    given = scene(method, compat=True)
    (hint,) = begin("controlnet_inpaint", given).hints
    image = given.picture.clone()
    image[given.mask > 0.5] = -1.0
    # 45 / 38 is narrower than 40 / 32: rows go, round((38 - 38 * (45 / 38) / (40 / 32)) / 2) on either side
    cut = image[1:37]
    expected = F.interpolate(cut.permute(2, 0, 1)[None], (32, 40), mode="nearest-exact")[0].permute(1, 2, 0)
    assert torch.equal(hint.picture, expected)
    assert (hint.controlnet, hint.strength, hint.start, hint.end) == ("c", 0.8, 0.1, 0.6)


def test_elsewhere_an_odd_hint_lies_on_the_picture_pixel_by_pixel():
    given = scene(ControlnetInpaint(controlnet="c"), compat=False)
    start = begin("controlnet_inpaint", given)
    hint = start.hints[0].picture
    assert hint.shape == start.picture.shape
    spared = given.fit.to_model(given.mask) <= 0.5
    assert torch.equal(hint[spared], start.picture[spared])
    assert bool((hint[~spared] == -1).all())


def test_exactly_one_half_is_no_hole():
    given = scene(ControlnetInpaint(controlnet="c"), compat=False)
    given.mask.fill_(0.5)
    hint = begin("controlnet_inpaint", given).hints[0].picture
    assert torch.equal(hint, given.fit.to_model(given.picture))


@pytest.mark.parametrize("compat", [True, False])
def test_a_hint_of_the_models_own_size_keeps_its_values(compat):
    size = Size(48, 40)
    fit = centre_crop(size) if compat else pad_to_multiple(size)
    hint = torch.rand(40, 48, 3) * 3 - 1
    assert torch.equal(fit_hint(hint, fit, compat=compat), hint)


def test_an_unknown_method_is_unsupported():
    with pytest.raises(UnsupportedError, match="smudge"):
        begin("smudge", scene(Img2Img(), compat=False))


def test_growing_costs_about_the_same_for_any_window() -> None:
    mask, spent = torch.rand(512, 512, generator=torch.Generator().manual_seed(5)), {}
    for by in (8, 64):
        began = time.thread_time()
        vae_encode_inpaint.grown(mask, by)
        spent[by] = time.thread_time() - began
    assert spent[64] < 24 * spent[8] + 0.05  # a square window costs 64 times as much
