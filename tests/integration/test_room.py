"""Models that do not fit the device together: what is idle makes room, and what cannot fit says so."""

import sys
from pathlib import Path
from typing import Any

import pytest

from overpaint_shared.ledger import JobState
from overpaint_shared.settings import Limits
from overpaint_worker import protocol as p
from overpaint_worker.engine.assemble import describe
from overpaint_worker.engine.clipseg.store import SegmenterStore
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.limits import FixedLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.models import ModelStore
from overpaint_worker.engine.session import House
from overpaint_worker.registry import Registry
from tests import budget
from tests.budget import MIB, Budget
from tests.rendering import DEVICE, Kitchen, img2img, request
from tests.workers import TestFarm


@pytest.fixture(scope="module")
def size(tiny_registry: Path) -> int:
    """Bytes of a model."""
    whole = Budget(2**40)
    store = ModelStore(Registry.load(tiny_registry), DEVICE)
    whole.rule(store)
    store.get("tiny")
    return whole.used


def little(registry: Path, total: int) -> tuple[Kitchen, Budget]:
    names = Registry.load(registry)
    house = House(
        models=ModelStore(names, DEVICE, kept=9), segmenters=SegmenterStore(names, DEVICE),
        limits=Limits(), device=describe(DEVICE),
    )  # fmt: skip
    memory, said = Budget(total), list[p.ToWorker]()
    memory.rule(house.models)
    return Kitchen(Conductor(house, said.append, loop=Loop(FixedLimits(16))), said), memory


def job(model: str, **sampling: Any) -> dict[str, Any]:
    return {**img2img(**sampling), "model": model}


def test_two_models_alternate_where_one_fits(tiny_registry: Path, size: int) -> None:
    k, memory = little(tiny_registry, size * 3 // 2)
    for number in range(4):
        k.conductor.submit(request(f"{number}", job(("tiny", "tiny-v")[number % 2], steps=2)))
        k.conductor.run_until_idle()
    assert all(isinstance(end, p.Done) for end in k.ends().values()), k.ends()
    assert memory.loads == ["tiny", "tiny-v"] * 2
    assert memory.refusals == 3


def test_a_job_waits_while_another_models_job_holds_the_memory(tiny_registry: Path, size: int) -> None:
    k, memory = little(tiny_registry, size * 3 // 2)
    for number, model in enumerate(("tiny", "tiny-v", "tiny", "tiny-v", "tiny")):
        k.conductor.submit(request(f"{number}", job(model, steps=6)))
    k.conductor.run_until_idle()
    assert all(isinstance(end, p.Done) for end in k.ends().values()), k.ends()
    assert memory.used <= memory.total


def test_a_job_that_waits_for_memory_can_be_cancelled(tiny_registry: Path, size: int) -> None:
    k, _ = little(tiny_registry, size * 3 // 2)
    k.conductor.submit(request("steps", job("tiny", steps=30)))
    k.conductor.submit(request("waits", job("tiny-v", steps=2)))
    emit = k.conductor._emit

    def cancel(message: p.ToWorker) -> None:
        emit(message)
        if k.conductor._parked:
            k.conductor.cancel("waits", 1)

    k.conductor._emit = cancel
    k.conductor.run_until_idle()
    assert isinstance(k.ends()["waits"], p.Cancelled)
    assert isinstance(k.ends()["steps"], p.Done)
    assert k.conductor._parked == []
    assert k.conductor._short == set()


def test_a_job_that_fits_no_empty_device_is_refused_with_the_bytes(tiny_registry: Path, size: int) -> None:
    k, _ = little(tiny_registry, size // 2)
    k.conductor.submit(request("a", job("tiny")))
    k.conductor.submit(request("b", job("tiny-v")))
    k.conductor.run_until_idle()
    for name in ("a", "b"):
        end = k.ends()[name]
        assert isinstance(end, p.Failed)
        assert (end.kind, end.error["code"]) == ("unable", "out_of_memory")
        assert "MiB of" in end.error["message"]
        assert "weights take about" in end.error["message"]


def test_a_model_that_is_asked_for_early_takes_the_place_of_an_idle_one(
    tiny_registry: Path, size: int
) -> None:
    k, memory = little(tiny_registry, size * 3 // 2)
    for model in ("tiny", "tiny-v"):
        k.conductor.load(model)
    k.conductor.submit(request("a", job("tiny-v", steps=1)))
    k.conductor.run_until_idle()
    assert memory.loads == ["tiny", "tiny-v"]
    assert not [m for m in k.said if isinstance(m, p.NotLoaded)]


def test_a_worker_renders_two_models_where_one_fits(farm: TestFarm, tiny_registry: Path, size: int) -> None:
    farm.start(
        models=("tiny", "tiny-v"),
        registry=tiny_registry,
        environment={budget.VARIABLE: str(size * 1.5 / MIB)},
        engine=[sys.executable, budget.__file__],
        engine_env=[budget.VARIABLE],
        switch_after_s=0.5,
    ).ready()
    specs = [farm.spec(model=("tiny", "tiny-v")[n % 2], steps=3) for n in range(6)]
    picture = farm.store.put_input(
        "tester", (Path(__file__).parents[1] / "data/parity/inputs/img64.png").read_bytes()
    )
    ids = farm.submit(*[spec | {"source": {"image": f"sha256:{picture}"}} for spec in specs])
    assert farm.all_ended(ids, within_s=180) == {JobState.DONE: 6}
