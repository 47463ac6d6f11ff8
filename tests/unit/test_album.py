"""The pictures of one job: decoded once, held as stored, and within the operator's limits together."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_shared.errors import InputError, JobError, SpecError
from overpaint_shared.job import JobSpec, parse_job
from overpaint_shared.setting_views import Limits
from overpaint_worker.engine import decoding, time_limit
from overpaint_worker.engine.album import Album
from overpaint_worker.engine.decoding import Decoded
from overpaint_worker.engine.preparation import begin, open_pictures
from tests.unit.pictures import saved

RGBA = np.random.default_rng(1).integers(0, 256, (16, 24, 4), np.uint8)
FILES = {
    "a.png": saved(Image.fromarray(RGBA)),
    "m.png": saved(Image.fromarray(RGBA[..., :3])),
    "w.png": saved(Image.new("L", (24, 16), 255)),
}


def job(mask: dict[str, Any] | None = None, **more: Any) -> JobSpec:
    spec = {"version": 1, "model": "m", "source": {"image": "a.png"}, "method": {"kind": "img2img"}, **more}
    return parse_job(spec if mask is None else {**spec, "mask": mask})


def image(name: str, **more: Any) -> dict[str, Any]:
    return {"from": "image", "image": name, **more}


def union(*masks: dict[str, Any]) -> dict[str, Any]:
    return {"from": "combine", "how": "union", "masks": list(masks)}


class Counting:
    """Decodes, and counts."""

    def __init__(self) -> None:
        self.fields = Counter[str]()

    def __call__(self, data: bytes, limits: Limits, field: str, **how: bool) -> Decoded:
        self.fields[field] += 1
        return decoding.decode(data, limits, field, **how)


CONTROLS = [{"controlnet": "c", "image": name} for name in ("a.png", "w.png", "w.png", "m.png")]


def test_each_picture_is_decoded_once_however_often_a_job_names_it() -> None:
    red, green, alpha = image("m.png"), image("m.png", channel="green"), image("a.png", channel="alpha")
    spec = job(union(red, union(green, red), alpha, image("w.png")), controls=CONTROLS)
    decode = Counting()
    begin(open_pictures(spec, FILES, Limits(), decode), Limits())

    assert sum(decode.fields.values()) == 3, decode.fields


@pytest.mark.parametrize("compat", ["none", "comfyui"])
def test_what_masks_hold_is_what_each_alone_would_hold(compat: str) -> None:
    parts = [image("m.png", channel="blue"), image("m.png"), image("a.png", channel="alpha")]
    album = Album(job(union(*parts), compat=compat), FILES, Limits(), decoding.decode)
    album.read_masks()

    for index, part in enumerate(parts):
        alone = Album(job(part, compat=compat), FILES, Limits(), decoding.decode)
        alone.read_masks()
        assert torch.equal(album.mask(f"mask.masks[{index}]"), alone.mask("mask"))
    assert torch.equal(album.mask("mask.masks[0]"), torch.from_numpy(RGBA[..., 2].astype(np.float32) / 255))


def test_a_picture_is_let_go_when_nothing_needs_it_any_more() -> None:
    spec = job(image("m.png"), controls=[{"controlnet": "c", "image": "m.png"}])
    album = Album(spec, FILES, Limits(), decoding.decode)
    album.source()
    album.read_masks()
    assert list(album.kept) == ["m.png"]
    album.control("m.png", "controls[0].image")
    assert list(album.kept) == []


def test_pictures_that_are_decoded_slowly_one_by_one_fail_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time_limit, "monotonic", lambda: now[0])

    def slow(data: bytes, limits: Limits, field: str, **how: bool) -> Decoded:
        now[0] += 70
        return decoding.decode(data, limits, field, **how)

    spec = job(union(image("m.png"), image("w.png"), image("a.png", channel="alpha")))
    with time_limit.limited(), pytest.raises(JobError, match="more than 120 s") as caught:
        open_pictures(spec, FILES, Limits(), slow)
    assert caught.value.field == "mask.masks[1].image"


def costs() -> Iterator[tuple[int, str | None]]:
    """How much decoding may take, and the field that goes beyond it."""
    source, mask, hint = 16 * 24 * 4, 16 * 24 * 3, 16 * 24
    yield source + mask + hint, None
    yield source + mask + hint - 1, "controls[1].image"
    yield source + mask - 1, "mask.masks[0].image"
    yield source - 1, "source.image"


@pytest.mark.parametrize(("most", "field"), list(costs()))
def test_pictures_that_are_too_much_together_are_refused_before_any_is_decoded(
    most: int, field: str | None
) -> None:
    spec = job(union(image("m.png"), image("m.png", channel="green")), controls=CONTROLS[:2])
    decode = Counting()
    if field is None:
        begin(open_pictures(spec, FILES, Limits(max_decoded_bytes=most), decode), Limits())
        return
    with pytest.raises(InputError, match=f"{most} are allowed") as caught:
        open_pictures(spec, FILES, Limits(max_decoded_bytes=most), decode)

    assert caught.value.field == field
    assert isinstance(caught.value.value, int)
    assert caught.value.value > most
    assert "OVERPAINT_MAX_DECODED_BYTES" in str(caught.value.fix)
    assert not decode.fields


def test_more_masks_or_operations_than_a_job_may_have_are_named() -> None:
    def many(last: int) -> dict[str, Any]:
        return union(*[union(*[image("m.png")] * count) for count in (15, 15, 15, last)])

    def worked(ops: int) -> dict[str, Any]:
        full = image("m.png", ops=[{"op": "invert"}] * 32)
        return union(*[full] * 8, image("m.png", ops=[{"op": "invert"}] * ops))

    assert job(many(14)).mask
    assert job(worked(0)).mask
    for what, mask in (("65 masks", many(15)), ("257 operations on masks", worked(1))):
        with pytest.raises(SpecError, match=what) as caught:
            job(mask)
        (problem,) = caught.value.problems
        assert problem.path == "mask"
        assert problem.allowed
