"""What only a GPU can show: its memory told and run out of, TF32, and where a job's tensors are."""

import gc
import io
import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_worker import protocol as p
from overpaint_worker.engine import conductor
from overpaint_worker.engine.assemble import build, ready, set_up_torch
from overpaint_worker.engine.limits import RowLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.options import EngineOptions
from tests.rendering import DEVICE, Kitchen, house, img2img, kitchen, pixels, render, request

pytestmark = pytest.mark.gpu

MIB = 2**20
JOBS = 8
SIDE = 768
STEPS = 40
"""Enough that the first job still steps when the last one joins."""


def picture(side: int) -> dict[str, bytes]:
    out = io.BytesIO()
    levels = np.random.default_rng(1).integers(0, 256, (side // 16, side // 16, 3), np.uint8)
    Image.fromarray(levels.repeat(16, 0).repeat(16, 1)).save(out, "PNG")
    return {"p.png": out.getvalue()}


def jobs() -> list[p.Render]:
    """Guided jobs that share passes of sixteen rows."""
    return [
        request(name, img2img(image="p.png", seed=i, steps=STEPS), picture(SIDE))
        for i, name in enumerate("abcdefgh"[:JOBS])
    ]


def filled(left: int) -> list[torch.Tensor]:
    """Take the device's memory but for `left` bytes; with 0, what the allocator keeps for itself too."""
    gc.collect()
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    blocks: list[torch.Tensor] = []
    for size in (256 * MIB, 20 * MIB, 2 * MIB):
        with suppress(torch.OutOfMemoryError):
            while left == 0 or torch.cuda.mem_get_info(DEVICE)[0] - left > size:
                blocks.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
    return blocks


class Squeeze:
    """While all jobs step, leaves the device `share` of the memory that their pass takes; until a decode."""

    def __init__(self, kitchen: Kitchen, share: float) -> None:
        self._share, self._passes = share, 0
        self._heard = kitchen.conductor._emit
        self.ballast: list[torch.Tensor] = []
        self.taken = 0
        """Bytes that one pass of all jobs allocates beyond what lies there anyway."""
        kitchen.conductor._emit = self._hear

    def _hear(self, message: p.ToWorker) -> None:
        self._heard(message)
        if not isinstance(message, p.Progress):
            return
        if message.stage == "decode":
            self.release()
        elif message.stage == "denoise" and message.job == "a" and message.company == JOBS:
            self._passes += 1
            if self._passes == 2:
                torch.cuda.reset_peak_memory_stats(DEVICE)
            elif self._passes == 3:
                self.taken = torch.cuda.max_memory_allocated(DEVICE) - torch.cuda.memory_allocated(DEVICE)
                self.ballast = filled(int(self.taken * self._share))

    def release(self) -> None:
        self.ballast = []
        torch.cuda.empty_cache()


@pytest.fixture
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductor, "REPEAT_S", 0.0)


def squeezed(registry: Path, share: float) -> tuple[Kitchen, Squeeze]:
    k = kitchen(registry)
    squeeze = Squeeze(k, share)
    for job in jobs():
        k.conductor.submit(job)
    k.conductor.run_until_idle()
    squeeze.release()
    k.conductor.close()
    return k, squeeze


@pytest.mark.usefixtures("every_step_is_told")
def test_a_pass_that_does_not_fit_the_devices_memory_is_halved_and_every_picture_comes_out(tiny_registry):
    unhindered = render(tiny_registry, jobs())
    k, squeeze = squeezed(tiny_registry, share=0.5)
    print(f"a pass of {2 * JOBS} rows took {squeeze.taken / MIB:.0f} MiB")
    assert squeeze.taken > 50 * MIB
    ends = k.ends()
    for name, done in ends.items():
        assert isinstance(done, p.Done), done
        told = json.loads(done.files["receipt.json"])["adjustments"]
        assert f"memory ran out in a pass of {2 * JOBS} rows: it was split" in told
        off = pixels(done.files["image.png"]) - pixels(unhindered[name].files["image.png"])
        assert np.abs(off).max() <= 1


@pytest.mark.usefixtures("every_step_is_told")
def test_jobs_too_large_for_the_device_go_back_to_the_farm_and_the_engine_renders_on(tiny_registry):
    k, _ = squeezed(tiny_registry, share=0.0)
    ends = k.ends()
    assert {type(end) for end in ends.values()} == {p.Failed}
    for failed in ends.values():
        assert (failed.kind, failed.error["code"]) == ("unable", "out_of_memory")
    small = render(tiny_registry, [request("after", img2img())])["after"]
    assert isinstance(small, p.Done)


def test_the_engine_says_which_device_it_has_and_how_much_of_its_memory_it_uses(tiny_registry, monkeypatch):
    monkeypatch.setattr(conductor, "BEAT_S", 0.0)
    k = kitchen(tiny_registry)
    k.conductor.submit(request("j", img2img()))
    k.conductor.run_until_idle()
    k.conductor.close()
    told = [m.memory_used for m in k.said if isinstance(m, p.Stats)]
    weights = k.conductor.house.models.get("tiny")._unet.get_memory_footprint()
    assert max(told) >= weights
    assert max(told) < torch.cuda.get_device_properties(DEVICE).total_memory
    options = EngineOptions(fd=-1, registry=tiny_registry, device=str(DEVICE))
    own = build(options, lambda _: None)
    said = ready(own, options)
    own.close()
    assert said.device_name == torch.cuda.get_device_name(DEVICE)
    assert said.memory_total == torch.cuda.get_device_properties(DEVICE).total_memory
    receipt = json.loads(k.ends()["j"].files["receipt.json"])
    assert receipt["device"].pop("threads") >= 1
    assert receipt["device"] == {"device": str(DEVICE), "name": said.device_name, "dtype": "float32"}


def test_without_a_word_on_precision_a_gpu_computes_in_half(tiny_registry):
    done = render(tiny_registry, [request("j", img2img())], dtype="auto")["j"]
    assert json.loads(done.files["receipt.json"])["device"]["dtype"] == "float16"


def test_tf32_is_off_and_would_cost_digits(tiny_registry):
    """Its products keep ten bits of a factor: without the flag every float32 tolerance would be gone."""
    model = house(tiny_registry).models.get("tiny")
    exact, rounded = (denoised(model, tf32=tf32) for tf32 in (False, True))
    off = float((exact - rounded).norm() / exact.norm())
    print(f"TF32 moves a denoised latent by {off:.1e} of its length")
    assert 1e-6 < off < 1e-1
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.equal(denoised(model, tf32=False), exact)


def denoised(model, *, tf32: bool) -> torch.Tensor:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        x = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        text = model.condition("a red hat").tensors["text"].repeat(2, 1, 1)
        with torch.inference_mode():
            return model.denoise(x, torch.tensor([3.0, 1.0], device=DEVICE), {"text": text})
    finally:
        set_up_torch(threads=1)


def test_a_step_is_timed_until_the_device_is_done(tiny_registry):
    """A pass returns before the device has finished it: the speed curve must not learn from that."""
    model, slow = house(tiny_registry).models.get("tiny"), 0.2
    told: list[float] = []

    class Spy(RowLimits):
        def record(self, curve, bucket, seconds, *, more_waiting):
            told.append(seconds)

    loop, original = Loop(Spy()), type(model).denoise

    def dawdling(self, *inputs):
        out = original(self, *inputs)
        torch.cuda._sleep(int(slow * 1.7e9))  # cycles of about 0.6 ns
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "denoise", dawdling)
        k = Kitchen(conductor.Conductor(house(tiny_registry), lambda _: None, loop=loop))
        k.conductor.submit(request("j", img2img(steps=1)))
        began = time.perf_counter()
        k.conductor.run_until_idle()
        k.conductor.close()
    assert time.perf_counter() - began > slow / 2
    assert told
    assert min(told) > slow / 2
