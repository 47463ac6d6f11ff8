"""The simulation of queue affinity runs the real rule, and the rule does what docs/worker.md says of it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def affinity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_affinity", ROOT / "bench" / "affinity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_documented_figures_are_those_of_the_simulation(affinity: ModuleType) -> None:
    text = (ROOT / "docs" / "worker.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 3
    for workers, models, *told in rows:
        plan = affinity.Plan(workers=int(workers), models=int(models))
        before, after = (affinity.simulate(plan, kind) for kind in (affinity.RoundRobin, affinity.Affine))
        found = [before.loads_per_1000, after.loads_per_1000, before.longest_wait_s, after.longest_wait_s]
        assert [float(each) for each in told] == found
        assert after.loads_per_1000 < before.loads_per_1000


def test_no_model_starves_while_two_others_never_end(affinity: ModuleType) -> None:
    plan = affinity.Plan(workers=1, models=3, load=0.9)
    assert (
        affinity.simulate(plan, affinity.Affine).longest_wait_s
        < affinity.simulate(plan, affinity.RoundRobin).longest_wait_s
    )


def test_every_worker_renders_every_job_once(affinity: ModuleType) -> None:
    plan = affinity.Plan(jobs=50, load_s=0.0, workers=2)
    found = affinity.simulate(plan, affinity.Affine)
    assert found.took_s >= 50 * plan.job_s / plan.workers
    assert found.loads_per_1000 >= 1000 * plan.models / plan.jobs
