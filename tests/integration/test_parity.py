"""The reference's own pictures, noise levels and latents, with the tiny weights that they were made with."""

import json
import math

import numpy as np
import pytest
import torch

from overpaint_worker.engine.limits import FixedLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.sampler import SAMPLERS
from overpaint_worker.engine.session import FEATURES, Session
from overpaint_worker.engine.trajectory import Noise, Trajectory
from tests.rendering import DEVICE, PARITY, kitchen, pixels
from tests.rendering import request as render_request

SCALING = 0.18215
CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(PARITY.glob("cases/*/job.json"))}
RENDERED = [name for name, job in CASES.items() if f"method:{job['method']['kind']}" in FEATURES]


@pytest.fixture(scope="module", params=RENDERED)
def rendered(request, tiny_registry):
    """One case, rendered: its name, its session, its files."""
    name, sessions = request.param, []
    k = kitchen(tiny_registry)
    original = Session.finish

    def keep(session):
        sessions.append(session)
        return original(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finish", keep)
        k.conductor.submit(_job(name))
        k.conductor.run_until_idle()
        k.conductor.close()
    done = k.ends()[name]
    assert hasattr(done, "files"), done
    return name, sessions[0], done.files


def _job(name):
    return render_request(name, CASES[name])


def reference(name, part):
    return np.load(PARITY / "cases" / name / f"{part}.npy")


def test_img2img_is_among_the_cases():
    assert "img2img" in RENDERED


def test_the_picture_is_the_references_within_two_levels(rendered, record_property):
    name, _, files = rendered
    expected = pixels((PARITY / "cases" / name / "expected.png").read_bytes())[..., :3]
    ours = pixels(files["image.png"])
    assert ours.shape == expected.shape
    off = np.abs(ours - expected)
    mse = float((off.astype(np.float64) ** 2).mean())
    psnr = math.inf if mse == 0 else 10 * math.log10(255**2 / mse)
    within = float((off.max(-1) <= 2).mean())
    record_property("psnr", psnr)
    print(f"{name}: PSNR {psnr:.1f} dB, largest difference {off.max()}, {within:.4%} within two levels")
    assert psnr >= 45
    assert within >= 0.999
    assert off.max() <= 1


def test_the_noise_levels_are_the_references(rendered):
    name, session, _ = rendered
    np.testing.assert_allclose(session.trajectory.sigmas.numpy(), reference(name, "sigmas"), rtol=1e-6)


def test_the_start_latent_is_the_references(rendered):
    """The reference's is one of a CPU, whose group norm rounds coarsely; a GPU's is nearer to float64's."""
    name, session, _ = rendered
    expected = reference(name, "latent")
    near = 1e-5 if DEVICE.type == "cpu" else 1e-3
    ours = session.z0.cpu().numpy() / SCALING
    np.testing.assert_allclose(ours, expected, rtol=0, atol=near * np.abs(expected).max())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the reference's start latent is a CPU's")
def test_the_final_latent_is_the_references(rendered):
    name, session, _ = rendered
    expected = reference(name, "latent_out")
    np.testing.assert_allclose(
        session.latent.cpu().numpy() / SCALING, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


def test_from_the_references_start_latent_the_loop_reaches_its_final_latent(rendered):
    name, session, _ = rendered
    sampling, done = session.spec.sampling, session.trajectory
    again = Trajectory(
        job=name, model=done.model, sampler=SAMPLERS[sampling.sampler], sigmas=done.sigmas,
        z0=torch.from_numpy(reference(name, "latent")).to(DEVICE) * SCALING, seed=sampling.seed,
        positive=done.conditionings[1], negative=done.conditionings[0], cfg=sampling.cfg, mask=done.mask,
        differential=done.differential, extra=done.extra, controls=done.controls,
    )  # fmt: skip
    loop = Loop(FixedLimits(2))
    loop.add(again)
    with torch.inference_mode():
        while loop.live:
            assert not loop.turn().failed
    expected = reference(name, "latent_out")
    np.testing.assert_allclose(
        again.result.cpu().numpy() / SCALING, expected, atol=2e-5 * np.abs(expected).max()
    )


def test_the_noise_mask_is_the_references(rendered):
    name, session, _ = rendered
    if not (PARITY / "cases" / name / "noise_mask.npy").exists():
        assert session.trajectory.mask is None
        return
    expected = reference(name, "noise_mask")
    np.testing.assert_array_equal(
        np.broadcast_to(session.trajectory.mask.cpu().numpy(), expected.shape), expected
    )


def test_the_noise_is_one_draw_of_torchs_cpu_generator(rendered):
    _, session, _ = rendered
    torch.manual_seed(42)
    assert torch.equal(session.trajectory.noise.cpu(), torch.randn(session.z0.shape))
    assert torch.equal(Noise(42)(session.z0), session.trajectory.noise)


def test_a_single_file_checkpoint_gives_the_same_picture(tiny_registry):
    spec = {**CASES["img2img"], "model": "tiny-single"}
    k = kitchen(tiny_registry)
    k.conductor.submit(render_request("single", spec))
    k.conductor.submit(render_request("folder", CASES["img2img"]))
    k.conductor.run_until_idle()
    ends = k.ends()
    off = pixels(ends["single"].files["image.png"]) - pixels(ends["folder"].files["image.png"])
    assert np.abs(off).max() <= 1
