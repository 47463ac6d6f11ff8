"""The engine as a process: spoken to over its pipe, as its worker does."""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from overpaint_worker import protocol as p
from overpaint_worker.engine.options import EngineOptions, parse
from overpaint_worker.evidence import AtWork, EvidenceMemory
from tests.rendering import DEVICE, img2img, request
from tests.waiting import wait_until

PATIENCE_S = 240.0
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""} if DEVICE.type == "cpu" else {}
LEAST_MEMORY = 2**26 if DEVICE.type == "cpu" else 2**24
"""A process with torch in it; on a GPU the weights alone, in half precision."""


class Engine:
    def __init__(self, registry, spare=False):
        ours, theirs = socket.socketpair()
        self.evidence = EvidenceMemory()
        options = EngineOptions(fd=-1, registry=registry, device=str(DEVICE), spare=spare)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "overpaint_worker.engine",
                    *options.argv(),
                    "--fd",
                    str(theirs.fileno()),
                    "--evidence",
                    str(self.evidence.descriptor),
                ],
                pass_fds=[theirs.fileno(), self.evidence.descriptor],
                stderr=subprocess.PIPE,
                env={**os.environ, **HIDDEN},
            )
        self.pipe = Connection(ours.detach())
        self.heard = []

    def say(self, message):
        self.pipe.send_bytes(p.encode(message))

    def until(self, condition):
        """Read until a message satisfies `condition`; that message."""
        while True:
            if not self.pipe.poll(PATIENCE_S):
                raise AssertionError(f"nothing came after {self.heard[-1:]}")
            message = p.decode(self.pipe.recv_bytes())
            self.heard.append(message)
            if condition(message):
                return message

    def end(self, job):
        return self.until(lambda m: isinstance(m, p.Done | p.Failed | p.Cancelled) and m.job == job)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.pipe.close()
        self.evidence.close()


@pytest.fixture(scope="module")
def engine(tiny_registry):
    engine = Engine(tiny_registry)
    engine.ready = engine.until(lambda m: isinstance(m, p.Ready))
    yield engine
    engine.close()


def test_it_says_what_it_is_before_anything_else(engine):
    assert isinstance(engine.heard[0], p.Ready)
    ready = engine.ready
    assert ready.pid == engine.process.pid
    assert ready.device == str(DEVICE)
    assert ready.memory_total > 2**28
    assert {"method:img2img", "sampler:euler", "scheduler:karras", "mask:image"} <= set(ready.features)
    offered = {(traits["kind"], traits["name"]): traits for traits in ready.catalogue}
    models = {name for kind, name in offered if kind == "model"}
    assert {"tiny", "tiny-single", "tiny-v"} <= models
    assert len(offered["model", "tiny"]["sha256"]) == 64
    assert offered["model", "tiny"]["channels"] == 4
    assert ("controlnet", "tiny") in offered


def test_every_announced_feature_is_one_of_the_specs(engine):
    from overpaint_shared.job import FEATURES

    assert set(engine.ready.features) <= FEATURES


def test_jobs_come_back_rendered_and_the_model_is_loaded_once(engine):
    engine.say(request("one", img2img(steps=3)))
    engine.say(request("two", img2img(steps=5, seed=2)))
    ends = {}
    while len(ends) < 2:
        done = engine.until(lambda m: isinstance(m, p.Done | p.Failed))
        ends[done.job] = done
    assert all(isinstance(end, p.Done) for end in ends.values()), ends
    assert set(ends["one"].files) == {"image.png", "receipt.json"}
    assert len([m for m in engine.heard if isinstance(m, p.Loaded)]) == 1
    assert next(m for m in engine.heard if isinstance(m, p.Credits)).slots == 3


def test_a_wrong_job_leaves_the_engine_warm(engine):
    engine.say(p.Render(job="bad", token=1, spec_json='{"version": 1, "model": NaN}', inputs={}))
    assert engine.end("bad").kind == "job"
    engine.say(request("unable", {**img2img(), "model": "nowhere"}))
    assert engine.end("unable").kind == "unable"
    loads = len([m for m in engine.heard if isinstance(m, p.Loading)])
    engine.say(request("good", img2img(steps=1)))
    assert isinstance(engine.end("good"), p.Done)
    assert len([m for m in engine.heard if isinstance(m, p.Loading)]) == loads


def test_signals_to_the_whole_group_do_not_end_it(engine):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        engine.process.send_signal(number)
    engine.say(request("after", img2img(steps=1)))
    assert isinstance(engine.end("after"), p.Done)


def test_a_running_job_is_cancelled_between_steps(engine):
    engine.say(request("long", img2img(steps=900)))
    engine.until(
        lambda m: isinstance(m, p.Progress) and (m.job, m.stage) == ("long", "denoise") and m.step > 0
    )
    engine.say(p.Cancel(job="long", token=1))
    assert isinstance(engine.end("long"), p.Cancelled)
    engine.until(lambda m: isinstance(m, p.Unit) and m.stage == "idle")
    beat = engine.until(lambda m: isinstance(m, p.Stats))
    assert (beat.live, beat.held) == (0, 0)
    assert beat.models == ["tiny"]
    assert beat.memory_used > LEAST_MEMORY
    assert beat.row_limit >= 1


def test_its_evidence_names_each_job_while_it_works_on_it_and_none_when_it_rests(engine):
    names = [("shown-a", 1), ("shown-b", 1)]
    for job, _ in names:
        engine.say(request(job, img2img(steps=900)))
    wait_until(lambda: engine.evidence.read().attempts == set(names), within_s=60)
    for job, token in names:
        engine.say(p.Cancel(job=job, token=token))
        engine.end(job)
    wait_until(lambda: engine.evidence.read() == AtWork(rests=True), within_s=60)


def test_a_model_can_be_loaded_before_its_first_job(engine):
    engine.say(p.Load(model="tiny-v"))
    assert engine.until(lambda m: isinstance(m, p.Loaded)).model == "tiny-v"
    engine.say(p.Load(model="nowhere"))
    refused = engine.until(lambda m: isinstance(m, p.NotLoaded))
    assert refused.model == "nowhere"
    assert "nowhere" in refused.error["message"]
    engine.say(request("still", img2img(steps=1)))
    assert isinstance(engine.end("still"), p.Done)


def test_the_engine_process_knows_nothing_of_the_farm():
    code = (
        "import sys, overpaint_worker.engine.__main__, overpaint_worker.engine.assemble;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'celery', 'kombu', 'redis', 'boto3'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_options_are_parsed_without_torch():
    code = "import sys, overpaint_worker.engine.__main__; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_options_survive_the_way_through_a_command_line(tmp_path):
    from overpaint_shared.settings import Limits

    options = EngineOptions(
        fd=7, registry=tmp_path / "m.toml", device="cuda:0", threads=3, cpu_threads=4, max_rows=8,
        kept_models=1, hashes=tmp_path / "h.json", limits=Limits(max_steps=7), json_logs=True, spare=True,
    )  # fmt: skip
    assert parse([*options.argv(), "--fd", "7"]) == options


def test_the_end_of_the_pipe_ends_it_at_once_even_in_the_middle_of_work(tiny_registry):
    engine = Engine(tiny_registry)
    try:
        engine.until(lambda m: isinstance(m, p.Ready))
        engine.say(request("long", img2img(steps=900)))
        engine.until(lambda m: isinstance(m, p.Unit) and m.stage == "load")
        engine.pipe.close()
        assert engine.process.wait(timeout=10) == 0
    finally:
        engine.close()


def test_what_is_no_message_ends_it_with_a_status_of_its_own(tiny_registry):
    engine = Engine(tiny_registry)
    try:
        engine.until(lambda m: isinstance(m, p.Ready))
        engine.pipe.send_bytes(b"\x80\x04K\x01.")
        assert engine.process.wait(timeout=10) == 4
        assert b"protocol_error" in engine.process.stderr.read()
    finally:
        engine.close()


def test_a_wrong_registry_is_said_in_words(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text("[models.x]\nfamily = 'sd'\n")
    engine = Engine(path)
    try:
        assert engine.process.wait(timeout=60) == 2
        assert b"models.x.path" in engine.process.stderr.read()
    finally:
        engine.close()


# The spare


def test_a_spare_opens_no_device_until_it_is_told_to_and_reads_the_registry_again(tmp_path, tiny_registry):
    path = tmp_path / "models.toml"
    path.write_text("")
    engine = Engine(path, spare=True)
    try:
        assert engine.until(lambda _: True) == p.Warm(pid=engine.process.pid)
        nvidia = [
            name for name in Path(f"/proc/{engine.process.pid}/maps").read_text().split() if "/dev/nv" in name
        ]
        assert nvidia == []
        named = tiny_registry.read_text().replace('path = "', f'path = "{tiny_registry.parent}/')
        path.write_text(named)
        began = time.monotonic()
        engine.say(p.Begin())
        ready = engine.until(lambda m: isinstance(m, p.Ready))
        assert time.monotonic() - began < 5, "what takes long was done before"
        assert "tiny" in {traits["name"] for traits in ready.catalogue}
        engine.say(request("one", img2img(steps=1)))
        assert isinstance(engine.end("one"), p.Done)
    finally:
        engine.close()


def test_a_spare_ends_with_the_pipe_while_it_warms_up_and_while_it_waits(tiny_registry):
    for waits in (False, True):
        engine = Engine(tiny_registry, spare=True)
        try:
            if waits:
                engine.until(lambda m: isinstance(m, p.Warm))
            engine.pipe.close()
            assert engine.process.wait(timeout=30) == 0
        finally:
            engine.close()


def test_what_a_spare_does_in_advance_opens_no_device(tiny_registry):
    code = (
        "import sys; from pathlib import Path; from overpaint_worker.engine.warming import Warming;"
        "from overpaint_worker.engine.options import EngineOptions;"
        f"w = Warming(EngineOptions(fd=-1, registry=Path({str(tiny_registry)!r}))); w.run();"
        "import torch; before = set(sys.modules);"
        "from overpaint_worker.engine.families.loading import _kinds; _kinds();"
        "print(torch.cuda.is_initialized(), len(w.hashes._known) > 3, len(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True", "0"]
