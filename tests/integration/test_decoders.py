"""Decoding in processes of their own: the same pixels, and a hostile file ends nothing but its own job."""

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from overpaint_shared.errors import InputError, OutOfMemory, PictureTooCostly
from overpaint_shared.setting_views import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine import decoding
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.decoder_child import SEALS, receive
from overpaint_worker.engine.decoders import Decoder, Decoders
from overpaint_worker.engine.faults import judge
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
        if len(started) <= 2:
            resource.prlimit(started[-1].process.pid, resource.RLIMIT_CPU, (0, 0))
        return started[-1]

    decoders = Decoders(60.0, start)
    with pytest.raises(PictureTooCostly, match="ended the process"):
        decoders(FILES["RGB"], Limits(), "source.image")
    assert len(started) == 2, "the kernel kills so, too, where memory is short: one more try"
    assert decoders(FILES["RGB"], Limits(), "source.image")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_picture_whose_process_was_killed_from_outside_is_read_in_another(
    started: list[Decoder], number: signal.Signals
) -> None:
    class Killed(Decoder):
        def ask(self, *asked: Any) -> Any:
            self.process.send_signal(number)
            self.process.wait()
            return super().ask(*asked)

    def start(wall_s: float) -> Decoder:
        started.append(Decoder(wall_s) if started else Killed(wall_s))
        return started[-1]

    assert Decoders(60.0, start)(FILES["RGB"], Limits(), "source.image").samples.shape == (33, 24, 3)
    assert len(started) == 2


def test_a_machine_without_room_for_one_more_process_is_not_the_pictures_fault() -> None:
    def start(wall_s: float) -> Decoder:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with pytest.raises(OutOfMemory, match="no process for decoding") as caught:
        Decoders(60.0, start)(FILES["RGB"], Limits(), "source.image")
    assert judge(caught.value)[0] == "unable"


@contextmanager
def hostile(said: bytes, seals: int, count: int) -> Iterator[Decoders]:
    """Its process was taken over by a file: it says what it likes, with `count` descriptors of its memory."""
    memory = os.memfd_create("picture", os.MFD_ALLOW_SEALING)
    os.write(memory, bytes(12))
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    with ExitStack() as over:
        over.callback(os.close, memory)

        def start(wall_s: float) -> Decoder:
            made = Decoder(wall_s)
            made.end()
            made.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            made._pipe, theirs = socket.socketpair()
            over.enter_context(theirs)
            socket.send_fds(theirs, [said], [memory] * count)
            theirs.shutdown(socket.SHUT_WR)
            return made

        yield Decoders(60.0, start)


def message(head: dict[str, Any], body: bytes = b"", lengths: tuple[int, int] | None = None) -> bytes:
    packed = json.dumps(head).encode()
    return struct.pack(">II", *(lengths or (len(packed), len(body)))) + packed + body


PICTURE = {"shape": [2, 2, 3], "dtype": "uint8", "notes": [], "icc": False}


@pytest.mark.parametrize(
    ("said", "seals", "count"),
    [
        (message({}, lengths=(2**32 - 1, 0)), SEALS, 1),
        (message(PICTURE, lengths=(9, 2**32 - 1)), SEALS, 1),
        (message(PICTURE), 0, 1),
        (message(PICTURE), fcntl.F_SEAL_GROW, 1),
        (message(PICTURE), SEALS, 0),
        (message(PICTURE | {"shape": [2, 3, 3]}), SEALS, 1),
        (message(PICTURE | {"shape": [-2, -2, 3]}), SEALS, 1),
        (message(PICTURE | {"shape": [100_000, 100_000, 3]}), SEALS, 1),
        (message(PICTURE | {"shape": [2, 1, 6]}), SEALS, 1),
        (message(PICTURE | {"dtype": "object"}), SEALS, 1),
        (message({"error": {"code": "engine", "message": "it was the device"}}), SEALS, 1),
        (message({"error": 7}), SEALS, 1),
        (b"\0\0\0\2\0\0\0\0]]", SEALS, 1),
    ],
)
def test_an_answer_that_is_none_is_refused_and_takes_nothing(said: bytes, seals: int, count: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    try:
        with hostile(said, seals, count) as decoders, pytest.raises(PictureTooCostly, match="no picture"):
            decoders(FILES["RGB"], Limits(), "source.image")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_that_answers_byte_by_byte_has_no_more_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as drips:
        ours.settimeout(60.0)
        over = threading.Event()

        def drip() -> None:
            for byte in message(PICTURE, lengths=(1000, 0)):
                theirs.send(bytes([byte]))
                over.wait(0.05)

        drips.submit(drip)
        try:
            with pytest.raises(TimeoutError):
                receive(ours, (1000, 1000), until=time.monotonic() + 0.5)
        finally:
            over.set()


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


ATTEMPTS = """
import ctypes, errno, json, mmap, os, resource, signal, socket, sys
from overpaint_worker.engine.confinement import confine
parent, folder = int(sys.argv[1]), sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def call(*numbers_and_arguments):
    def made():
        (here, there), *arguments = numbers_and_arguments
        if libc.syscall(here if x86 else there, *arguments) < 0:
            raise OSError(ctypes.get_errno(), "refused")
    return made
ring = ctypes.create_string_buffer(120)
attempts = {
    "kill": lambda: os.kill(parent, 0),
    "tkill": call((200, 130), parent, 0),
    "tgkill": call((234, 131), parent, parent, 0),
    "rt_sigqueueinfo": call((129, 138), parent, 0, ring),
    "rt_tgsigqueueinfo": call((297, 240), parent, parent, 0, ring),
    "pidfd_open": lambda: os.pidfd_open(parent),
    "pidfd_send_signal": call((424, 424), 0, 0, None, 0),
    "pidfd_getfd": call((438, 438), 0, 0, 0),
    "io_uring_setup": call((425, 425), 1, ring),
    "io_uring_enter": call((426, 426), 0, 0, 0, 0, None, 0),
    "io_uring_register": call((427, 427), 0, 0, None, 0),
    "socket": lambda: socket.socket(),
    "socketpair": lambda: socket.socketpair(),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "ptrace": call((101, 117), 16, parent, 0, 0),
    "another number for getpid": call((0x40000000 + 39, 0x40000000 + 172)),
    "limits": lambda: resource.prlimit(parent, resource.RLIMIT_CORE),
    "affinity": lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
    "memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDWR),
    "memory to read": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
    "environment": lambda: open(f"/proc/{parent}/environ", "rb").read(),
    "open files": lambda: os.readlink(f"/proc/{parent}/fd/0"),
    "open a file of its": lambda: os.open(f"/proc/{parent}/fd/0", os.O_RDONLY),
    "write": lambda: open(f"{folder}/there", "ab"),
    "truncate": lambda: os.truncate(f"{folder}/there", 0),
    "create": lambda: open(f"{folder}/new", "x"),
    "remove": lambda: os.unlink(f"{folder}/there"),
    "its own limits": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    "its own memory": lambda: os.close(os.memfd_create("x")),
    "its own files": lambda: open("/proc/self/environ", "rb").read(),
    "read": lambda: open(f"{folder}/there", "rb").read(),
}
assert confine()
def met(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
print(json.dumps({name: met(attempt) for name, attempt in attempts.items()}))
"""


def test_each_way_to_another_process_a_network_or_a_file_to_write_is_shut(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    program = [sys.executable, "-c", ATTEMPTS, str(os.getpid()), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    met = json.loads(done.stdout)

    free = {name for name, how in met.items() if how == "done"}
    assert free == {"its own limits", "its own memory", "its own files", "read"}
    assert {how for name, how in met.items() if name not in free} <= {"EPERM", "EACCES"}
    assert (tmp_path / "there").read_bytes() == b"x"


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
