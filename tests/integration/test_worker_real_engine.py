"""The real engine with tiny weights, behind a real worker on real services."""

import os
import signal
import uuid
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from overpaint_shared.job import parse_job
from overpaint_shared.ledger import JobState
from tests.waiting import wait_until
from tests.workers import OWNER, TestFarm, WorkerProcess


def picture(size: int = 64) -> bytes:
    made = Image.radial_gradient("L").resize((size, size)).convert("RGB")
    out = BytesIO()
    made.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def spec(farm: TestFarm) -> dict[str, Any]:
    sha256 = farm.store.put_input(OWNER, picture())
    return {
        "version": 1,
        "model": "tiny",
        "source": {"image": f"sha256:{sha256}"},
        "method": {"kind": "img2img"},
        "prompt": "a red hat",
        "sampling": {
            "seed": 1,
            "steps": 4,
            "cfg": 7.0,
            "sampler": "euler",
            "scheduler": "normal",
            "denoise": 0.6,
        },
    }


def ready(worker: WorkerProcess) -> WorkerProcess:
    worker.until("engine.ready", within_s=180)
    return worker


def with_seed(spec: dict[str, Any], seed: int, **sampling: Any) -> dict[str, Any]:
    return spec | {"sampling": spec["sampling"] | {"seed": seed} | sampling}


def image(farm: TestFarm, job_id: str) -> bytes:
    result = farm.job(job_id).result
    assert result is not None
    data = farm.store.get(result["files"]["image.png"], 10_000_000)
    with Image.open(BytesIO(data)) as opened:
        return opened.convert("RGB").tobytes()


def test_pictures_are_rendered_kept_warm_cancelled_and_recovered(
    farm: TestFarm, tiny_registry: Path, spec: dict[str, Any]
) -> None:
    """One start of the engine, which imports torch, serves several checks."""
    worker = ready(farm.start(registry=tiny_registry, threads=1))
    assert farm.ledger.catalogue() is not None
    (announced,) = farm.ledger.workers()
    assert announced.features >= parse_job(__import__("json").dumps(spec)).features()

    ids = farm.submit(*[with_seed(spec, seed) for seed in (1, 1, 2)])
    assert farm.all_ended(ids) == {JobState.DONE: 3}
    pictures = [image(farm, i) for i in ids]
    assert len(pictures[0]) == 64 * 64 * 3
    assert max(abs(a - b) for a, b in zip(pictures[0], pictures[1], strict=True)) <= 1
    assert pictures[0] != pictures[2]
    assert len(worker.said("model.loaded")) == 1

    pid = worker.engine_pid
    (long,) = farm.submit(with_seed(spec, 3, steps=1000, denoise=1.0))
    farm.stepping(long)
    farm.ledger.cancel(long)
    farm.until(long, JobState.CANCELLED, within_s=20)
    (after,) = farm.submit(with_seed(spec, 1))
    farm.until(after, JobState.DONE)
    assert worker.engine_pid == pid
    assert len(worker.said("model.loaded")) == 1, "the model stayed warm"

    (hit,) = farm.submit(with_seed(spec, 4, steps=1000, denoise=1.0))
    farm.stepping(hit)
    os.kill(pid, signal.SIGKILL)
    assert worker.until("job.released", job=hit)["reason"] == "crashed"
    worker.until("engine.ready", times=2, within_s=180)
    wait_until(lambda: farm.job(hit).attempt == 2 and farm.job(hit).state is JobState.RUNNING, within_s=60)
    farm.ledger.cancel(hit)
    farm.until(hit, JobState.CANCELLED)

    assert "/torch/" not in Path(f"/proc/{worker.popen.pid}/maps").read_text()
    bad = farm.store.put_input(OWNER, b"this is no picture")
    (refused,) = farm.submit(spec | {"source": {"image": f"sha256:{bad}"}})
    error = farm.until(refused, JobState.FAILED).error
    assert error is not None
    assert (error["code"], error["field"]) == ("input", "source.image")
    assert uuid.UUID(announced.id).version == 4


def running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_worker_with_the_real_engine_loses_no_job_and_leaves_no_engine_that_hangs(
    farm: TestFarm, tiny_registry: Path, spec: dict[str, Any]
) -> None:
    doomed = ready(farm.start(registry=tiny_registry))
    ids = farm.submit(*[with_seed(spec, seed) for seed in range(24)])
    wait_until(lambda: farm.commits().total() >= 4, within_s=120)
    os.kill(doomed.engine_pid, signal.SIGSTOP)  # it cannot see the end of its pipe
    os.kill(doomed.popen.pid, signal.SIGKILL)
    doomed.wait()
    wait_until(lambda: not running(doomed.engine_pid), what="the engine has ended")
    ready(farm.start(registry=tiny_registry))
    assert farm.all_ended(ids, within_s=180) == {JobState.DONE: 24}
    assert set(farm.commits().values()) == {1}
    assert len({image(farm, i) for i in ids}) == 24
