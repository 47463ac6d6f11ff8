"""The engine against the reference's way written a second time: what the recorded cases do not hold.

Soft masks, odd sizes, transparency, every method, the other samplers and schedulers, under `compat`.
"""

import json

import numpy as np
import pytest
import torch

from overpaint_worker.engine.session import Session
from tests.rendering import DEVICE, PARITY, kitchen, pixels, request
from tests.second import WEIGHED, load_image
from tests.second_jobs import again, files, job

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="written for a CPU's arithmetic")
RECORDED = [path.parent.name for path in sorted(PARITY.glob("cases/*/job.json"))]
LONG = "a red brick house by the sea, " * 14
"""More tokens than a block holds."""


NET = {"controlnet": "tiny"}
OVER = {**NET, "latent": "latent_noise_mask"}
HINT = {**NET, "image": "img64.png"}
CASES = {
    "soft latent mask": job("latent_noise_mask", denoise=0.7, scheduler="karras"),
    "soft latent mask, large": job("latent_noise_mask", "img_odd.png", "mask_odd.png", sampler="dpmpp_2m"),
    "differential": job("latent_noise_mask", differential=True, steps=5, denoise=0.8),
    "differential, ancestral": job("latent_noise_mask", differential=True, sampler="euler_ancestral"),
    "grey under a soft mask": job("vae_encode_inpaint", method={"grow_mask_by": 0}),
    "grown by an even number": job("vae_encode_inpaint", method={"grow_mask_by": 10}, scheduler="simple"),
    "grown by 33": job("vae_encode_inpaint", method={"grow_mask_by": 33}),
    "from alpha": job("vae_encode_inpaint", "rgba.png", {"from": "alpha"}, denoise=0.6),
    "from alpha, kept soft": job("latent_noise_mask", "rgba.png", {"from": "alpha"}, denoise=0.9),
    "a turned photograph": job("latent_noise_mask", "turned.png", "turned-mask.png", denoise=0.9),
    "a turned photograph's alpha": job("latent_noise_mask", "turned.png", {"from": "alpha"}, denoise=0.9),
    "a palette's alpha": job("latent_noise_mask", "palette.png", {"from": "alpha"}, denoise=0.9),
    "no alpha": job("latent_noise_mask", "small.png", {"from": "alpha"}, denoise=0.9),
    "sixteen bits of grey": job("img2img", "deep.png", None, denoise=0.5),
    "rgba without a mask": job("img2img", "rgba.png", None, denoise=0.5),
    **{
        f"channel {name}": job(
            "latent_noise_mask", mask={"from": "image", "image": "channels.png", "channel": name},
            steps=1, denoise=0.8,
        )
        for name in ("red", "green", "blue", "alpha")
    },
    "controlnet": job("controlnet_inpaint", method={**NET, "strength": 1.7, "end": 0.75}, steps=4),
    "controlnet over the latent": job(
        "controlnet_inpaint", method={**OVER, "strength": 0.6, "start": 0.3}, steps=4, denoise=0.7,
        sampler="heun", scheduler="beta",
    ),
    "controlnet that never acts": job("controlnet_inpaint", method={**NET, "strength": 0.0}),
    "controlnets": job(
        "controlnet_inpaint", method=NET,
        controls=[{**HINT, "strength": 0.4, "end": 0.7}, {**NET, "image": "soft.png", "start": 0.2}],
    ),
    "hint of another size": job("img2img", "small.png", None, controls=[HINT], denoise=0.8),
    "nine channels": job("inpaint_model", model="tiny-inpaint", denoise=0.9),
    "nine channels, differential": job("inpaint_model", model="tiny-inpaint", differential=True),
    "nine channels without a mask": job("img2img", "small.png", None, model="tiny-inpaint", denoise=0.8),
    "nine channels over grey": job("vae_encode_inpaint", model="tiny-inpaint"),
    "nine channels over the latent": job("latent_noise_mask", model="tiny-inpaint", denoise=0.8),
    "nine channels and a controlnet": job("controlnet_inpaint", model="tiny-inpaint", method=OVER),
    "extended": job(
        "vae_encode_inpaint", "small.png", {"from": "pad"},
        prepare=[{"op": "pad", "left": 5, "bottom": 24, "feathering": 20}],
    ),
    "extended, kept soft": job(
        "latent_noise_mask", "small.png", {"from": "pad"},
        prepare=[{"op": "pad", "top": 16, "right": 8, "feathering": 30}],
    ),
    "scaled by a half more": job(
        "latent_noise_mask", "small.png", {"from": "image", "image": "large.png", "at": "canvas"},
        prepare=[{"op": "scale_by", "factor": 1.5, "filter": "bicubic"}], denoise=0.8,
    ),
    "a long prompt beside a short one": job("img2img", mask=None, prompt=LONG, denoise=0.8),
    "weights": job("img2img", mask=None, prompt=next(iter(WEIGHED)), denoise=0.8),
    "fewer layers": job("img2img", mask=None, clip_skip=1, denoise=0.8),
    "no guidance": job("latent_noise_mask", cfg=1.0, denoise=0.8),
    "half a guidance": job("latent_noise_mask", cfg=0.5, denoise=0.8),
    "one step": job("vae_encode_inpaint", steps=1),
    "seven steps of ninety-nine": job("img2img", mask=None, steps=7, denoise=0.07),
    "a seed of 64 bits": job("latent_noise_mask", seed=2**64 - 1, sampler="ddim", scheduler="ddim_uniform"),
}  # fmt: skip
SAMPLED = [
    ("euler", "exponential"), ("euler_ancestral", "ddim_uniform"), ("heun", "normal"), ("dpm_2", "karras"),
    ("dpm_2_ancestral", "simple"), ("dpmpp_2s_ancestral", "sgm_uniform"), ("dpmpp_sde", "exponential"),
    ("dpmpp_2m", "beta"), ("dpmpp_2m_sde", "karras"), ("ddim", "normal"), ("lcm", "sgm_uniform"),
]  # fmt: skip
CASES |= {
    f"{sampler}, {scheduler}, {denoise}": job(
        "latent_noise_mask", sampler=sampler, scheduler=scheduler, denoise=denoise, steps=4, seed=2**32 + 5
    )
    for sampler, scheduler in SAMPLED
    for denoise in (1.0, 0.55)
}


@pytest.fixture(scope="module")
def engine(tiny_registry):
    """All cases in one engine: the session and the files of each."""
    sessions, original = {}, Session.finish

    def keep(session):
        sessions[session.request.job] = session
        return original(session)

    k = kitchen(tiny_registry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finish", keep)
        for name, spec in CASES.items():
            k.conductor.submit(request(name, spec, files()))
        k.conductor.run_until_idle()
        k.conductor.close()
    return sessions, k.ends()


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_written_twice_paints_what_was_recorded(name, tiny_registry):
    folder = PARITY / "cases" / name
    painted = again(tiny_registry, json.loads((folder / "job.json").read_text()))
    off = painted.levels.astype(int) - load_levels(folder / "expected.png")
    assert np.abs(off).max() <= 1
    recorded = np.load(folder / "latent_out.npy")
    np.testing.assert_allclose(
        painted.end.numpy() / 0.18215, recorded, rtol=0, atol=2e-5 * np.abs(recorded).max()
    )


def load_levels(path):
    return np.rint(load_image(path.read_bytes())[0] * 255).astype(int)


@pytest.mark.parametrize("name", CASES)
def test_a_job_is_what_the_second_writing_paints(name, engine, tiny_registry):
    sessions, ends = engine
    assert hasattr(ends[name], "files"), ends[name]
    session, painted = sessions[name], again(tiny_registry, CASES[name])
    course = session.trajectory
    torch.testing.assert_close(course.sigmas, painted.sigmas, rtol=1e-5, atol=0)
    assert close(course.z0, painted.start, 1e-5)
    assert (course.mask is None) == (painted.mask is None)
    if painted.mask is not None:
        assert torch.equal(course.mask, painted.mask)
    off = np.abs(pixels(ends[name].files["image.png"]) - painted.levels)
    print(
        f"{name}: {(off > 0).mean():.4%} of levels differ, latents by {far(session.latent, painted.end):.1e}"
    )
    assert close(session.latent, painted.end, 5e-4)
    assert off.max() <= 1


def far(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def close(ours, theirs, share):
    return far(ours, theirs) <= share
