"""An engine without torch, for tests of the worker around it: it speaks the protocol, and misbehaves if told.

A job's prompt is its script, JSON: `{"step_s": 0.01, "do": "kill", "at": 2}`. `do` is one of ACTIONS, at step
`at` (0: before the first word about the job). A job with a `mark` gets a picture that its spec and its inputs
decide, and no other job's do: `marked`. All that it does goes to the journal, a file of JSON lines.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from overpaint_worker import protocol
from overpaint_worker.evidence import Evidence
from overpaint_worker.parent import end_with_parent

ACTIONS = ("kill", "between", "stop", "decode", "fail", "unable", "oom")
"""`kill` at 0 comes before any message about the job; `between` is a death when the step is over.
`stop` hangs in a step, `decode` in a decoder beside the loop, which goes on."""
JOURNAL = "FAKE_ENGINE_JOURNAL"
START_S = "FAKE_ENGINE_START_S"
CREDITS = "FAKE_ENGINE_CREDITS"
BUDGET_S = "FAKE_ENGINE_BUDGET_S"
LOAD_S = "FAKE_ENGINE_LOAD_S"
UNLOADABLE = "FAKE_ENGINE_UNLOADABLE"
DEADLY = "FAKE_ENGINE_DEADLY"
"""The model whose load ends it."""
DEVICE_DIES = "FAKE_ENGINE_DEVICE_DIES"
"""Whatever it is given ends it."""
SPARE_DIES = "FAKE_ENGINE_SPARE_DIES"
DIE_AT_START = "FAKE_ENGINE_DIES"


TRAITS = {"name": "tiny", "kind": "model", "family": "sd", "channels": 4, "prediction": "epsilon"}


def marked(model: str, seed: int, prompt: str, inputs: Iterable[bytes]) -> bytes:
    """The picture of a job with a mark."""
    digest = hashlib.sha256(json.dumps([model, seed, prompt]).encode())
    for data in inputs:
        digest.update(hashlib.sha256(data).digest())
    return b"marked picture " + digest.hexdigest().encode()


class Job:
    def __init__(self, render: protocol.Render) -> None:
        spec = json.loads(render.spec_json)
        self.render = render
        self.model = spec["model"]
        self.steps = spec["sampling"]["steps"]
        self.step = 0
        self.prompt = spec.get("prompt") or "{}"
        self.seed = spec["sampling"].get("seed", 0)
        self.script: dict[str, Any] = json.loads(self.prompt)

    @property
    def attempt(self) -> tuple[str, int]:
        return self.render.job, self.render.token

    @property
    def dies_between(self) -> bool:
        return self.script.get("do") == "between" and self.step == self.script.get("at", 1)

    def picture(self) -> bytes:
        if "mark" not in self.script:
            return b"picture of " + self.render.job.encode()
        return marked(self.model, self.seed, self.prompt, self.render.inputs.values())


class Engine:
    def __init__(self, pipe: Connection, evidence: Evidence, names: Iterable[str] = ("tiny",)) -> None:
        self.pipe, self.evidence = pipe, evidence
        self.names = tuple(names)
        self.waiting: list[Job] = []
        self.live: list[Job] = []
        self.stuck: list[Job] = []
        self.loaded: list[str] = []
        self.turns = self.rows = 0
        self.lock = threading.Lock()
        self.work = threading.Event()
        self.budget_s = float(os.environ.get(BUDGET_S, "60"))

    def send(self, message: protocol.ToWorker) -> None:
        self.pipe.send_bytes(protocol.encode(message))

    def run(self) -> None:
        time.sleep(float(os.environ.get(START_S, "0")))
        if os.environ.get(DIE_AT_START):
            os._exit(3)
        self.send(
            protocol.Ready(
                pid=os.getpid(),
                device="cpu",
                device_name="fake",
                memory_total=1,
                features=["method:img2img", "sampler:euler", "scheduler:normal"],
                catalogue=[TRAITS | {"name": name} for name in self.names],
                versions={"secrets": ",".join(k for k in os.environ if "SECRET" in k or "REDIS" in k)},
            )
        )
        self.send(protocol.Credits(slots=int(os.environ.get(CREDITS, "6"))))
        journal("ready")
        threading.Thread(target=self.read, daemon=True).start()
        while True:
            self.turn()

    def read(self) -> None:
        while True:
            message = received(self.pipe, self.evidence)
            with self.lock:
                if isinstance(message, protocol.Render):
                    self.waiting.append(Job(message))
                elif isinstance(message, protocol.Cancel):
                    self.cancel(message)
                elif isinstance(message, protocol.Load):
                    self.load(message.model)
                elif isinstance(message, protocol.Stop):
                    os._exit(0)
            self.work.set()

    def load(self, model: str) -> None:
        if model == os.environ.get(UNLOADABLE):
            error = {
                "code": "model_load",
                "message": "told to fail",
                "field": None,
                "value": None,
                "fix": None,
            }
            self.send(protocol.NotLoaded(model=model, error=error))
        elif model not in self.loaded:
            self.send(protocol.Unit(stage="load", budget_s=self.budget_s))
            with self.evidence.working("load"):
                self.send(protocol.Loading(model=model))
                die_of(model)
                time.sleep(float(os.environ.get(LOAD_S, "0")))
            self.loaded.append(model)
            self.send(protocol.Loaded(model=model, seconds=0.5))
            journal("loaded", model=model)

    def cancel(self, message: protocol.Cancel) -> None:
        for jobs in (self.waiting, self.live, self.stuck):
            for job in list(jobs):
                if (job.render.job, job.render.token) == (message.job, message.token):
                    jobs.remove(job)
                    journal("cancelled", job)
                    self.send(protocol.Cancelled(job=message.job, token=message.token))

    def admit(self) -> None:
        while self.waiting and not any(j.render.alone for j in (*self.live, *self.stuck)):
            if self.waiting[0].render.alone and (self.live or self.stuck):
                return
            job = self.waiting.pop(0)
            journal("admitted", job, alone=job.render.alone, company=len(self.live))
            with self.evidence.working("prepare", [job.attempt]):
                if os.environ.get(DEVICE_DIES):
                    os.kill(os.getpid(), signal.SIGKILL)
                die_of(job.model)
                self.act(job)
            if job.script.get("do") == "decode":
                self.stick(job)
                continue
            self.live.append(job)
            if job.model not in self.loaded:
                self.loaded.append(job.model)
                self.send(protocol.Loading(model=job.model))
                self.send(protocol.Loaded(model=job.model, seconds=0.0))
                journal("loaded", job, model=job.model)

    def stick(self, job: Job) -> None:
        journal("decode", job)
        self.stuck.append(job)
        threading.Thread(target=self.hang, args=(job,), daemon=True).start()
        self.send(
            protocol.Progress(
                job=job.render.job, token=job.render.token, stage="prepare", step=0, of=job.steps
            )
        )

    def hang(self, job: Job) -> None:
        with self.evidence.working("prepare", [job.attempt]):
            threading.Event().wait()

    def turn(self) -> None:
        with self.lock:
            self.admit()
            batch = list(self.live)
        if not batch:
            self.beat()
            self.send(protocol.Unit(stage="idle", budget_s=0.0))
            self.evidence.idle()
            self.work.wait()
            self.work.clear()
            return
        self.send(protocol.Unit(stage="denoise", budget_s=self.budget_s, jobs=[j.render.job for j in batch]))
        with self.evidence.working("denoise", [j.attempt for j in batch]):
            time.sleep(max(float(j.script.get("step_s", 0.005)) for j in batch))
            with self.lock:
                self.turns, self.rows = self.turns + 1, self.rows + 2 * len(batch)
                for job in batch:
                    if job in self.live:
                        self.advance(job, len(batch))
        if any(job.dies_between for job in batch):
            os.kill(os.getpid(), signal.SIGKILL)

    def beat(self) -> None:
        self.send(
            protocol.Stats(
                live=len(self.live),
                held=len(self.live) + len(self.waiting) + len(self.stuck),
                turns=self.turns,
                rows=self.rows,
                memory_used=1,
                models=self.loaded,
                row_limit=8,
            )
        )

    def advance(self, job: Job, company: int) -> None:
        job.step += 1
        if self.act(job):
            self.live.remove(job)
            return
        render = job.render
        self.send(
            protocol.Progress(
                job=render.job,
                token=render.token,
                stage="denoise",
                step=job.step,
                of=job.steps,
                company=company,
            )
        )
        if job.step >= job.steps:
            self.live.remove(job)
            journal("done", job, company=company)
            files = {"image.png": job.picture(), "receipt.json": b"{}"}
            self.send(
                protocol.Done(job=render.job, token=render.token, files=files, summary={"steps": job.steps})
            )

    def act(self, job: Job) -> bool:
        do, at = job.script.get("do"), job.script.get("at", 1)
        if do in {None, "decode", "between"} or job.step != at:
            return False
        journal(do, job)
        if "say" in job.script:
            print(job.script["say"], file=sys.stderr, flush=True)
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        kinds = {
            "fail": ("input", "job"),
            "unable": ("unsupported", "unable"),
            "oom": ("out_of_memory", "device"),
        }
        code, kind = kinds[do]
        error = {"code": code, "message": f"told to {do}", "field": "prompt", "value": None, "fix": None}
        self.send(protocol.Failed(job=job.render.job, token=job.render.token, error=error, kind=kind))
        return True


def die_of(model: str) -> None:
    if model == os.environ.get(DEADLY):
        os.kill(os.getpid(), signal.SIGKILL)


def journal(event: str, job: Job | None = None, **more: Any) -> None:
    path = os.environ.get(JOURNAL)
    if path:
        who = {"job": job.render.job, "token": job.render.token} if job else {}
        line = json.dumps({"event": event, "pid": os.getpid(), "at": time.time(), **who, **more})
        with Path(path).open("a") as file:
            file.write(line + "\n")


def names(registry: Path) -> Iterable[str]:
    """The models that it says it has."""
    return tomllib.loads(registry.read_text())["models"] if registry.is_file() else ("tiny",)


def main() -> None:
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--evidence", type=int)
    parser.add_argument("--registry", type=Path, default=Path("none"))
    parser.add_argument("--spare", action="store_true")
    known, _ = parser.parse_known_args()
    pipe, evidence = Connection(known.fd), Evidence(known.evidence)
    if known.spare:
        wait_as_spare(pipe, evidence)
    Engine(pipe, evidence, names(known.registry)).run()


def received(pipe: Connection, evidence: Evidence) -> protocol.Message:
    """The next message; the end of the pipe is the end of the process."""
    try:
        pipe.poll(None)
        with evidence.taking():
            return protocol.decode(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def wait_as_spare(pipe: Connection, evidence: Evidence) -> None:
    journal("spare")
    if os.environ.get(SPARE_DIES):
        os._exit(1)
    pipe.send_bytes(protocol.encode(protocol.Warm(pid=os.getpid())))
    while not isinstance(received(pipe, evidence), protocol.Begin):
        pass


if __name__ == "__main__":
    sys.exit(main())
