"""Whatever is asked for, with whatever pictures: a typed error or a picture, never a dead engine."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from overpaint_shared.catalogue import Catalogue, ModelDefaults, ModelTraits, check
from overpaint_shared.errors import OverpaintError, SpecError
from overpaint_shared.job import FEATURES, JobSpec, OnlyMasked, Scale, ScaleBy, parse_job
from overpaint_shared.ledger.records import WorkerRecord
from overpaint_shared.lint import lint
from overpaint_shared.settings import Limits
from overpaint_shared.sizes import cropped, size_after
from overpaint_worker import protocol as p
from overpaint_worker.engine.conductor import Conductor
from overpaint_worker.engine.limits import FixedLimits
from overpaint_worker.engine.loop import Loop
from overpaint_worker.engine.provenance import pixel_digest
from tests import extra_weights, fuzzing, segmenters
from tests.fuzzing import moves_the_terminal
from tests.hostile import spoiled
from tests.random_jobs import Asked, asked, picture
from tests.rendering import house, img2img
from tests.unit.spec_strategies import specs

SPECS, SPOILED = 500, 20
"""Of each spec that is drawn, this many hostile variants: 10,000 in all."""
CASES = 60
"""Mutated inputs of each kind."""
MEETINGS = 100
COMPANY = [
    ["Img2Img", "InpaintModel"], ["VaeEncodeInpaint", "LatentNoiseMask"],
    ["ControlnetInpaint", "InpaintModel", "LatentNoiseMask"],
]  # fmt: skip
"""The methods of the jobs that render together, and how often they do: 300 jobs in all."""

LONGEST_MESSAGE = 20_000
FULL = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------- validation


def catalogue() -> Catalogue:
    """One live worker, with few names."""
    defaults = ModelDefaults()
    traits = [
        ModelTraits(name="a", kind="model", family="sd", channels=4, sha256="a" * 64, defaults=defaults),
        ModelTraits(name="b", kind="model", family="sdxl", channels=9, sha256="b" * 64, defaults=defaults),
        ModelTraits(name="a", kind="controlnet", family="sd"),
        ModelTraits(name="a", kind="lora", family="sd"),
        ModelTraits(name="a", kind="vae", family="sd"), ModelTraits(name="a", kind="segmenter", family="sd"),
    ]  # fmt: skip
    worker = WorkerRecord(
        id="w", name="w", host="h", device="cpu", slots=1, version="1", features=FEATURES, models=(),
        catalogue=tuple(each.to_json() for each in traits),
    )  # fmt: skip
    return Catalogue.merge([worker])


def names_that_exist(spec: dict[str, Any]) -> dict[str, Any]:
    """Now and then the catalogue's own names, so that more than their absence is checked."""
    return {**spec, "model": "ab"[len(json.dumps(spec)) % 2]}


def held(data: Any, offered: Catalogue, size: tuple[int, int] | None) -> str:
    """Take a spec through all that a producer checks; how it ended."""
    try:
        spec = parse_job(data, where="fuzz.json")
    except SpecError as error:
        assert_told(error)
        return "refused"
    text = spec.to_json()
    assert parse_job(text) == spec
    assert parse_job(text).to_json() == text
    assert spec.features() <= FEATURES
    try:
        told = check(spec, offered, Limits(), where="fuzz.json")
    except SpecError as error:
        assert_told(error)
        return "cannot be rendered"
    for warning in (*told, *lint(spec, source_size=size)):
        str(warning).encode()
    return "fine"


def assert_told(error: SpecError) -> None:
    """In words that can be printed and sent, of a length that can be read."""
    assert error.problems
    assert error.exit_code == 2
    words = str(error)
    assert len(words.encode()) < LONGEST_MESSAGE, len(words)
    assert not [char for char in words if moves_the_terminal(char)], ascii(words)
    back = OverpaintError.from_json(json.loads(json.dumps(error.to_json(), allow_nan=False)))
    assert isinstance(back, SpecError)
    assert str(back) == words


@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_mutated_inputs_of_every_kind_give_a_result_or_a_typed_error(kind: str) -> None:
    """The short form of `bench/fuzz`."""
    ends = Counter(fuzzing.run(kind, fuzzing.case(kind, 9, number)) for number in range(CASES))

    assert sum(ends.values()) == CASES


def test_ten_thousand_hostile_specs_are_refused_in_words_or_parse():
    ends: Counter[str] = Counter()
    offered = (Catalogue(), catalogue())

    @settings(FULL, max_examples=SPECS)
    @given(specs(), st.integers(0, 2**32))
    def all_of(spec: dict[str, Any], seed: int) -> None:
        for i in range(SPOILED):
            data = spoiled(names_that_exist(spec) if i % 2 else spec, seed + i)
            size = None if i % 3 else (seed % 3000 + 1, seed % 700 + 1)
            ends[held(data, offered[i % 2], size)] += 1

    all_of()
    assert sum(ends.values()) >= SPECS * SPOILED
    assert min(ends["refused"], ends["cannot be rendered"], ends["fine"]) > 100, ends


# ----------------------------------------------------------------------------------------------- rendering


@dataclass
class Engine:
    """One conductor for all jobs, and how they ended."""

    conductor: Conductor
    said: list[p.ToWorker]
    ends: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)

    def render(self, jobs: Sequence[Asked]) -> list[p.Done | p.Failed]:
        """The last word on each."""
        self.said.clear()
        for i, job in enumerate(jobs):
            text = json.dumps(job.spec)
            self.conductor.submit(p.Render(job=f"j{i}", token=1, spec_json=text, inputs=job.files))
        self.conductor.run_until_idle()
        last = {m.job: m for m in self.said if isinstance(m, p.Done | p.Failed)}
        return [last[f"j{i}"] for i in range(len(jobs))]


def all_entries(tiny: Path, folder: Path) -> Path:
    """A registry with entries of every kind, right and wrong; its models are for small pictures."""
    registry = extra_weights.build(tiny, folder)
    segmenter = segmenters.build(folder / "clipseg")
    dtype = 'text_encoder_dtype = "float16"'
    small = 'defaults = { steps = 2, cfg = 5.0, sampler = "euler", scheduler = "normal", size = 64 }'
    text = registry.read_text().replace(dtype, f"{dtype}\n{small}")
    registry.write_text(f'{text}\n[segmenters.clipseg]\npath = "{segmenter}"\n')
    return registry


@pytest.fixture(scope="module")
def engine(tiny_registry, tmp_path_factory):
    entries = all_entries(tiny_registry, tmp_path_factory.mktemp("all"))
    limits = Limits(max_input_bytes=100_000, max_pixels=20_000, max_steps=3, max_output_pixels=12_000)
    said: list[p.ToWorker] = []
    conductor = Conductor(house(entries, limits=limits, kept=3), said.append, loop=Loop(FixedLimits(8)))
    yield Engine(conductor, said)
    conductor.close()


def reference() -> Asked:
    spec = img2img(image="source", steps=3)
    return Asked(spec, {"source": picture("RGB", 64, 64, 5)}, (64, 64))


def shown(done: p.Done | p.Failed) -> np.ndarray:
    assert isinstance(done, p.Done), done
    return np.asarray(Image.open(io.BytesIO(done.files["image.png"])))


def judge(job: Asked, end: p.Done | p.Failed) -> None:
    if isinstance(end, p.Done):
        assert_coherent(job, end)
    else:
        assert_typed(end)


def assert_typed(failed: p.Failed) -> None:
    """Of a type, with words that say what, where and what to do."""
    error = OverpaintError.from_json(failed.error)
    assert type(error) is not OverpaintError, failed.error
    assert failed.kind in ("job", "unable"), failed
    assert str(error).encode()
    assert isinstance(error, SpecError) or error.fix, failed.error


def assert_coherent(job: Asked, done: p.Done) -> None:
    """The receipt is of this job and of this picture."""
    receipt = json.loads(done.files["receipt.json"])
    spec = parse_job(json.dumps(receipt["spec"]))
    wanted = parse_job(json.dumps(job.spec))
    assert spec.sampling.seed is not None
    assert spec == wanted.resolved(ModelDefaults(steps=2, cfg=5.0, size=64)).with_seed(spec.sampling.seed)
    assert wanted.sampling.seed in (None, spec.sampling.seed)
    name = f"image.{spec.output.format}"
    assert receipt["picture"] == {"name": name, "pixels_sha256": pixel_digest(done.files[name])}
    size = expected_size(job, spec)
    assert Image.open(io.BytesIO(done.files[name])).size == size
    assert (receipt["size"]["width"], receipt["size"]["height"]) == size
    assert (done.summary["width"], done.summary["height"]) == size
    assert set(receipt["inputs"]) == set(job.files)
    assert (receipt["certificate"] is None) == (receipt["mask"] is None) == (spec.mask is None)
    assert ("mask.png" in done.files) == (spec.mask is not None and spec.output.previews)
    assert receipt["skipped"] == (receipt["evaluations"] is None)
    if keeps_the_outside(spec) and (outside := receipt["certificate"]["outside"]):
        assert outside["largest_change"] == 0, outside


def expected_size(job: Asked, spec: JobSpec) -> tuple[int, int]:
    compat = spec.compat == "comfyui"
    size = size_after(job.size, spec.prepare, compat=compat)
    assert size is not None
    if compat and not isinstance(spec.region, OnlyMasked):
        size = cropped(size)
    size = size_after(size, spec.finish, compat=compat)
    assert size is not None
    return size


def keeps_the_outside(spec: JobSpec) -> bool:
    scales = any(isinstance(op, Scale | ScaleBy) for op in spec.finish)
    return spec.mask is not None and spec.composite and spec.output.lossless and not scales


def test_three_hundred_random_jobs_end_in_a_typed_error_or_a_picture_and_the_engine_lives(engine):
    before = shown(*engine.render([reference()]))

    wrong: list[str] = []

    @settings(FULL, max_examples=MEETINGS, phases=[Phase.generate])
    @given(st.tuples(*map(asked, COMPANY)))
    def all_of(jobs: tuple[Asked, ...]) -> None:
        for job, end in zip(jobs, engine.render(jobs), strict=True):
            engine.ends["done" if isinstance(end, p.Done) else end.error["code"]] += 1
            engine.methods[job.spec["method"]["kind"]] += isinstance(end, p.Done)
            try:
                judge(job, end)
            except Exception as error:  # all that is wrong is told at once: a run takes minutes
                wrong.append(f"{type(error).__name__}: {error}\n{job.size} {job.spec}")

    all_of()
    assert not wrong, "\n\n".join(wrong)
    assert np.array_equal(shown(*engine.render([reference()])), before)
    assert sum(engine.ends.values()) >= MEETINGS * len(COMPANY)
    assert engine.ends["done"] > 50, engine.ends
    assert min(engine.ends[code] for code in ("input", "mask", "spec", "unsupported")) > 0, engine.ends
    assert sum(count > 0 for count in engine.methods.values()) == 5, engine.methods
