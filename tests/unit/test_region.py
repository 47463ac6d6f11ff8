"""Only masked: which rectangle, at what size, and nothing else touched."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import OnlyMasked
from overpaint_worker.engine.region import around


def blob(*numbers: int) -> torch.Tensor:
    """Height, width; then the blob's top, left, bottom, right."""
    height, width, top, left, bottom, right = numbers
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


def where(mask: torch.Tensor, **wish: float):
    return around(mask, OnlyMasked.model_validate({"kind": "only_masked", **wish}), 10**7)


def test_the_rectangle_holds_the_mask_and_its_padding_at_the_wished_size() -> None:
    region = where(blob(400, 600, 100, 200, 164, 328), padding=32, size=384)
    assert region.box == (168, 68, 192, 128)
    assert region.work == (384, 256)


def test_a_side_that_is_no_multiple_of_eight_takes_in_more_canvas() -> None:
    region = where(blob(400, 600, 100, 200, 150, 300), padding=0, size=100)
    assert region.work == (104, 56)
    assert region.box == (198, 97, 104, 56)


def test_at_the_canvas_border_the_rectangle_is_moved_in_or_ends_there() -> None:
    corner = where(blob(400, 600, 0, 0, 10, 50), padding=0, size=64)
    assert corner.box[:2] == (0, 0)
    assert corner.work == (64, 16)
    narrow = where(blob(60, 600, 0, 100, 60, 300), padding=10, size=220)
    assert (narrow.box.y, narrow.box.height, narrow.work.height) == (0, 60, 60)


def test_only_what_is_greater_than_the_threshold_counts() -> None:
    mask = blob(100, 100, 40, 40, 60, 60)
    mask[0, 0] = 0.5
    assert where(mask, padding=0, size=64).box == (40, 40, 20, 20)
    assert where(mask, padding=0, size=64, threshold=0.49).box[:2] == (0, 0)
    with pytest.raises(MaskError) as caught:
        where(mask * 0.5, padding=0, size=64)
    assert caught.value.field == "region.threshold"


def test_without_a_size_it_is_that_of_most_models_and_too_large_a_size_is_refused() -> None:
    assert max(where(blob(100, 100, 0, 0, 100, 50), padding=0).work) == 512
    with pytest.raises(InputError) as caught:
        where(blob(100, 100, 0, 0, 100, 100), size=8192)
    assert caught.value.field == "region.size"


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(8, 200), st.integers(8, 200), st.integers(0, 40), st.integers(64, 600))
def test_every_rectangle_lies_in_the_canvas_holds_the_mask_and_keeps_the_aspect(
    data: st.DataObject, height: int, width: int, padding: int, size: int
) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    x, y, w, h = (
        region := where(blob(height, width, top, left, bottom, right), padding=padding, size=size)
    ).box
    assert 0 <= x <= max(left - padding, 0)
    assert 0 <= y <= max(top - padding, 0)
    assert min(right + padding, width) <= x + w <= width
    assert min(bottom + padding, height) <= y + h <= height
    assert size <= max(region.work) <= size + 8
    scale = max(region.work) / max(w, h)
    # Half a canvas pixel of rounding on a side, and a whole working one.
    assert abs(region.work.width - w * scale) <= scale + 1
    assert abs(region.work.height - h * scale) <= scale + 1
    for side, box, room in ((region.work.width, w, width), (region.work.height, h, height)):
        assert side % 8 == 0 or box == room


def test_stitching_changes_the_rectangle_only_and_undoes_the_cut_of_a_smooth_picture() -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 120), torch.linspace(0, 1, 160), indexing="ij")
    canvas = torch.stack([rows, columns, (rows + columns) / 2], dim=-1)
    region = where(blob(120, 160, 40, 60, 80, 110), padding=8, size=128)
    x, y, w, h = region.box
    work = region.cut(canvas)
    assert work.shape == (region.work.height, region.work.width, 3)
    back = region.stitch(work, canvas)
    inside = np.s_[y : y + h, x : x + w]
    assert (back[inside] - canvas[inside])[3:-3, 3:-3].abs().max() < 2e-3
    painted = region.stitch(1 - work, canvas)
    changed = (painted != canvas).any(-1)
    changed[inside] = False
    assert not changed.any()


def test_the_mask_keeps_its_softness_at_the_working_size() -> None:
    mask = torch.zeros(64, 64)
    mask[:, 16:48] = torch.linspace(0, 1, 32)
    region = where(mask, padding=64, size=128)
    cut = region.cut_mask(mask)
    assert cut.shape == (128, 128)
    assert cut[0, 33:95].diff().min() > 0
    assert abs(cut.mean().item() - mask.mean().item()) < 0.01
