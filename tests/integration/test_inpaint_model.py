"""Inpainting models of nine channels, against a plain loop over diffusers' own networks."""

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from overpaint_worker.engine.session import Session
from tests.rendering import INPUTS, house, img2img, kitchen, request

SCALING = 0.18215
ODD = {
    **img2img(image="img_odd.png", steps=5, denoise=1.0), "model": "tiny-inpaint", "composite": False,
    "mask": {"from": "image", "image": "mask_odd.png", "ops": [{"op": "blur", "radius": 5}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def networks(tiny_registry):
    folder = tiny_registry.parent / "weights/diffusers/sd15_inpaint9"
    return UNet2DConditionModel.from_pretrained(folder / "unet").eval(), AutoencoderKL.from_pretrained(
        folder / "vae"
    ).eval()


def rendered(tiny_registry, spec):
    """The session of one job, after its end."""
    sessions = []
    k = kitchen(tiny_registry)

    def keep(session):
        sessions.append(session)
        return original(session)

    original = Session.finish
    with patch.object(Session, "finish", keep):
        k.conductor.submit(request("j", spec))
        k.conductor.run_until_idle()
        k.conductor.close()
    assert sessions, k.ends()
    return sessions[0]


def cropped(array):
    height, width = array.shape[:2]
    top, left = height % 8 // 2, width % 8 // 2
    return array[top : top + height // 8 * 8, left : left + width // 8 * 8]


def encoded(vae, picture):
    return vae.encode(picture.permute(2, 0, 1)[None] * 2 - 1).latent_dist.mode() * SCALING


@torch.inference_mode()
@pytest.mark.parametrize("differential", [False, True])
def test_a_job_on_odd_sides_is_what_a_plain_loop_paints(tiny_registry, networks, differential):
    spec = {**ODD, "method": {"kind": "inpaint_model"}}
    spec["sampling"] = {**spec["sampling"], "differential": differential}
    session = rendered(tiny_registry, spec)
    unet, vae = networks
    opened = np.asarray(Image.open(INPUTS / "img_odd.png").convert("RGB"))
    picture = cropped(torch.from_numpy(opened.copy()).float() / 255)
    mask = cropped(session._ready.mask)
    assert float(((mask > 0) & (mask < 1)).float().mean()) > 0.05  # soft
    z0 = encoded(vae, picture)
    masked = encoded(vae, (picture - 0.5) * (1 - mask.round())[..., None] + 0.5)
    soft = F.interpolate(mask[None, None], z0.shape[-2:], mode="bilinear")
    channels = torch.cat([soft.round(), masked], 1)
    torch.testing.assert_close(session.trajectory.extra.cpu(), channels, rtol=0, atol=1e-4)
    expected = plain_loop(session, unet, z0, soft, channels, differential=differential)
    torch.testing.assert_close(
        session.latent.cpu(), expected, rtol=0, atol=2e-4 * float(expected.abs().max())
    )


def plain_loop(session, unet, z0, soft, channels, *, differential):
    """Euler's method, written out, with the positive and the negative text one after the other."""
    model, spec = session.trajectory.model, session.spec
    sigmas = session.trajectory.sigmas
    steps = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    table = ((1 - steps) / steps).sqrt().log().float()

    def time(sigma):
        return int((sigma.log() - table).abs().argmin())

    torch.manual_seed(spec.sampling.seed)
    noise = torch.randn(z0.shape)
    x = z0 + noise * (1 + sigmas[0] ** 2).sqrt()
    first, last = time(sigmas[0]), time(table[0].exp())
    texts = [model.condition(text).tensors["text"].cpu() for text in (spec.negative_prompt, spec.prompt)]
    for sigma, after in pairwise(sigmas):
        share = (time(sigma) - last) / (first - last)
        m = (soft >= share).float() if differential else soft
        seen = x * m + (z0 + noise * sigma) * (1 - m)
        shown = torch.cat([seen / (sigma**2 + 1).sqrt(), channels], 1)
        negative, positive = (
            seen - sigma * unet(shown, time(sigma), encoder_hidden_states=text).sample for text in texts
        )
        denoised = (negative + (positive - negative) * spec.sampling.cfg) * m + z0 * (1 - m)
        x = x + (x - denoised) / sigma * (after - sigma)
    return x


@torch.inference_mode()
def test_with_another_method_the_mask_on_the_noise_and_the_picture_take_their_places(tiny_registry):
    session = rendered(tiny_registry, {**ODD, "method": {"kind": "vae_encode_inpaint", "grow_mask_by": 6}})
    course = session.trajectory
    assert torch.equal(course.extra, torch.cat([course.mask.round(), course.z0], 1))
    assert 0 < float(course.extra[:, 0].mean()) < 1


@torch.inference_mode()
def test_without_a_mask_all_is_masked_and_the_picture_is_plain_grey(tiny_registry):
    extra = rendered(tiny_registry, {**ODD, "method": {"kind": "img2img"}}).trajectory.extra
    for channel, value in zip(extra[0], (1, 0.8223, -0.6876, 0.6364, 0.1380), strict=True):
        assert torch.allclose(channel.cpu(), torch.tensor(float(value)))


def test_a_model_of_four_channels_wants_no_more(tiny_registry):
    assert (
        house(tiny_registry).models.get("tiny").inpaint_channels(torch.zeros(1, 4, 8, 8), None, None) is None
    )
