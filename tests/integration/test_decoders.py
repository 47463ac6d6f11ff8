"""Decoding in processes of their own: the same pixels, and a hostile file ends nothing but its own job."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from overpaint_shared.errors import InputError, PictureTooCostly
from overpaint_shared.setting_views import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine import decoding
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.decoders import Decoder, Decoders
from overpaint_worker.engine.session import House
from tests import hostile_pictures
from tests.rendering import house, img2img, request
from tests.unit.pictures import png16, saved
from tests.waiting import wait_until

RGBA = np.random.default_rng(1).integers(0, 256, (24, 33, 4), np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (9, 7, 4), np.uint16)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TURNED = Image.Exif()
TURNED[274] = 6
FILES = {
    "RGB": saved(Image.fromarray(RGBA[..., :3]), icc_profile=ICC, exif=TURNED),
    "RGBA": saved(Image.fromarray(RGBA)),
    "16 bits": png16(DEEP), "grey": saved(Image.fromarray(RGBA[..., 0])),
    "JPEG": saved(Image.fromarray(RGBA[..., :3]), "JPEG", exif=TURNED),
    "WebP": saved(Image.fromarray(RGBA), "WEBP"), "TIFF": saved(Image.fromarray(RGBA), "TIFF"),
}  # fmt: skip


@pytest.fixture
def started() -> Iterator[list[Decoder]]:
    """Every process that `decoders` starts."""
    found: list[Decoder] = []
    yield found
    for each in found:
        each.end()


@pytest.fixture
def decoders(started: list[Decoder]) -> Decoders:
    def start(wall_s: float) -> Decoder:
        started.append(Decoder(wall_s))
        return started[-1]

    return Decoders(60.0, start)


@pytest.mark.parametrize("compat", [False, True])
def test_what_comes_back_is_what_decoding_here_gives(decoders: Decoders, compat: bool) -> None:
    for name, data in FILES.items():
        here = decoding.decode(data, Limits(), "image", compat=compat)
        there = decoders(data, Limits(), "image", compat=compat)

        assert np.array_equal(there.samples, here.samples), name
        assert there.samples.dtype == here.samples.dtype
        assert (there.icc, there.notes) == (here.icc, here.notes)


def test_a_process_serves_picture_after_picture_and_each_thread_has_its_own(
    decoders: Decoders, started: list[Decoder]
) -> None:
    for _ in range(5):
        decoders(FILES["RGB"], Limits(), "image")
    assert len(started) == 1

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: decoders(FILES["RGB"], Limits(), "image"), range(8)))
    assert len(started) <= 2


def test_refusals_are_the_typed_errors_of_decoding(decoders: Decoders, started: list[Decoder]) -> None:
    for data, kind in ((b"GIF89a", InputError), (hostile_pictures.jpeg_scans(999), PictureTooCostly)):
        with pytest.raises(kind) as caught:
            decoders(data, Limits(), "mask.image")
        assert caught.value.field == "mask.image"
        assert caught.value.fix
    assert len(started) == 1


def test_one_that_hangs_is_ended_and_the_next_picture_gets_another(started: list[Decoder]) -> None:
    def start(wall_s: float) -> Decoder:
        started.append(Decoder(60.0 if started else wall_s))
        if len(started) == 1:
            started[0].process.send_signal(signal.SIGSTOP)
        return started[-1]

    decoders = Decoders(0.5, start)
    with pytest.raises(PictureTooCostly, match="took more than") as caught:
        decoders(FILES["RGB"], Limits(), "source.image")
    assert (caught.value.field, bool(caught.value.fix)) == ("source.image", True)
    assert started[0].process.poll() is not None

    assert decoders(FILES["RGB"], Limits(), "source.image").samples.shape == (33, 24, 3)


def test_one_that_dies_ends_its_own_picture_only(started: list[Decoder]) -> None:
    def start(wall_s: float) -> Decoder:
        started.append(Decoder(wall_s))
        if len(started) == 1:
            resource.prlimit(started[0].process.pid, resource.RLIMIT_CPU, (0, 0))
        return started[-1]

    decoders = Decoders(60.0, start)
    with pytest.raises(PictureTooCostly, match="ended the process"):
        decoders(FILES["RGB"], Limits(), "source.image")
    assert decoders(FILES["RGB"], Limits(), "source.image")


def test_one_that_died_idle_is_replaced_unnoticed(decoders: Decoders, started: list[Decoder]) -> None:
    decoders(FILES["RGB"], Limits(), "image")
    started[0].process.kill()
    started[0].process.wait()

    assert decoders(FILES["RGB"], Limits(), "image")
    assert len(started) == 2


def test_more_memory_than_it_may_have_is_a_typed_error(decoders: Decoders, started: list[Decoder]) -> None:
    decoders(FILES["RGB"], Limits(), "image")
    large = saved(Image.new("RGB", (7000, 7000)))
    pid = started[0].process.pid
    held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid, resource.RLIMIT_AS, (held + 2**26, held + 2**26))

    with pytest.raises(PictureTooCostly):
        decoders(large, Limits(), "source.image")
    assert decoders(FILES["RGB"], Limits(), "image")


def test_it_has_no_secrets_and_no_way_out(
    decoders: Decoders, started: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERPAINT_REDIS_URL", "redis://farm:s3cr3t@h/0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    decoders(FILES["RGB"], Limits(), "image")
    process = Path(f"/proc/{started[0].process.pid}")

    assert b"s3cr3t" not in (process / "environ").read_bytes()
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    assert "4294967296" in (process / "limits").read_text()


def test_it_ends_with_the_engine_however_that_ends() -> None:
    program = (
        "import time; from overpaint_worker.engine.decoders import Decoder; "
        "print(Decoder(9).process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    wait_until(
        lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2:3]
    )


def test_a_hostile_picture_fails_its_job_and_the_one_beside_it_is_rendered(tiny_registry: Path) -> None:
    def decode(data: bytes, limits: Limits, field: str, **how: bool) -> decoding.Decoded:
        if data == b"hostile":
            raise PictureTooCostly(
                "decoding the picture took more than 30 s", field=field, fix="save it again"
            )
        return decoding.decode(data, limits, field, **how)

    own, said = house(tiny_registry), list[p.ToWorker]()
    shared = House(
        models=own.models, segmenters=own.segmenters, limits=own.limits, device=own.device, decode=decode
    )
    conductor = Conductor(shared, said.append)
    hostile = {**img2img(), "controls": [{"controlnet": "tiny", "image": "h.png"}]}
    good = (Path(__file__).parents[1] / "data" / "parity" / "inputs" / "img64.png").read_bytes()
    conductor.submit(request("bad", hostile, {"img64.png": good, "h.png": b"hostile"}))
    conductor.submit(request("good", img2img(steps=1), {"img64.png": good}))
    conductor.run_until_idle()
    conductor.close()
    ends = {m.job: m for m in said if isinstance(m, p.Done | p.Failed)}

    assert isinstance(ends["good"], p.Done)
    failed = ends["bad"]
    assert isinstance(failed, p.Failed)
    assert (failed.kind, failed.error["code"], failed.error["field"]) == (
        "job", "picture_too_costly", "controls[0].image",
    )  # fmt: skip
