"""Inpainting models of nine channels: what they are shown (what they paint is in `test_second`)."""

from unittest.mock import patch

import torch

from overpaint_worker.engine.session import Session
from tests.rendering import house, img2img, kitchen, request

SCALING = 0.18215
ODD = {
    **img2img(image="img_odd.png", steps=5, denoise=1.0), "model": "tiny-inpaint", "composite": False,
    "mask": {"from": "image", "image": "mask_odd.png", "ops": [{"op": "blur", "radius": 5}]},
}  # fmt: skip


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
