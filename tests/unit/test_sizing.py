"""Canvas to model and back, both ways of meeting a multiple of 8."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared.errors import InputError
from overpaint_worker.engine.geometry import Size
from overpaint_worker.engine.sizing import centre_crop, pad_to_multiple


def noise(width: int, height: int, *channels: int) -> torch.Tensor:
    return torch.rand(height, width, *channels, generator=torch.Generator().manual_seed(0))


@given(width=st.integers(1, 70), height=st.integers(1, 70), multiple=st.sampled_from([8, 64]))
@settings(deadline=None, max_examples=100)
def test_padding_repeats_edges_and_comes_back_bit_for_bit(width: int, height: int, multiple: int) -> None:
    fit = pad_to_multiple(Size(width, height), multiple)
    canvas = noise(width, height, 3)
    model = fit.to_model(canvas)
    assert model.shape == (fit.model.height, fit.model.width, 3)
    assert fit.model.width % multiple == fit.model.height % multiple == 0
    assert 0 <= fit.model.width - width < multiple
    assert torch.equal(fit.from_model(model), canvas)
    assert torch.equal(fit.kept(canvas), canvas)
    assert fit.output == (width, height)
    for y in range(fit.model.height):
        row = min(max(y - fit.top, 0), height - 1)
        assert torch.equal(model[y, 0], canvas[row, 0])
        assert torch.equal(model[y, -1], canvas[row, -1])


@given(width=st.integers(8, 70), height=st.integers(8, 70))
@settings(deadline=None, max_examples=100)
def test_cropping_takes_the_references_offsets(width: int, height: int) -> None:
    fit = centre_crop(Size(width, height))
    canvas = noise(width, height, 3)
    x, y = (width % 8) // 2, (height % 8) // 2
    expected = canvas[y : y + height // 8 * 8, x : x + width // 8 * 8]
    assert torch.equal(fit.to_model(canvas), expected)
    assert torch.equal(fit.kept(canvas), expected)
    assert torch.equal(fit.from_model(expected), expected)
    assert fit.output == fit.model == (width // 8 * 8, height // 8 * 8)


def test_masks_fit_as_pictures_do() -> None:
    fit = pad_to_multiple(Size(203, 181))
    assert fit.to_model(noise(203, 181)).shape == (184, 208)
    assert centre_crop(Size(203, 181)).to_model(noise(203, 181)).shape == (176, 200)


def test_a_canvas_smaller_than_a_latent_cell_cannot_be_cropped() -> None:
    with pytest.raises(InputError, match="7 x 64"):
        centre_crop(Size(7, 64))
    assert pad_to_multiple(Size(7, 64)).model == (8, 64)
