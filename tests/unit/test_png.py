"""PNG files, written: held against Pillow's decoder, another's filter and another's size."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from overpaint_worker.engine import deep_png, png
from overpaint_worker.engine.deep_png import Samples
from tests.unit.test_colour import PROFILES

EDGES = np.array([0, 1, 2, 127, 128, 254, 255])


def written(samples: Samples) -> bytes:
    return png.write(samples, PngImagePlugin.PngInfo(), None)


def read(data: bytes) -> Samples:
    with Image.open(io.BytesIO(data)) as image:
        deep = deep_png.is_deep(image)
        levels = np.asarray(image)
    return deep_png.read(data) if deep else levels.reshape(*levels.shape[:2], -1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("band", [1, 100, 2**17])
def test_every_sample_comes_back(
    monkeypatch: pytest.MonkeyPatch, channels: int, bits: int, band: int
) -> None:
    monkeypatch.setattr(png, "BAND_BYTES", band)
    rng = np.random.default_rng(channels)
    for height, width in ((1, 1), (1, 9), (9, 1), (17, 23)):
        levels = rng.choice(EDGES, (height, width, channels)) * (257 if bits == 16 else 1)
        samples = levels.astype(np.uint8 if bits == 8 else np.uint16)
        got = read(written(samples))
        assert got.dtype == samples.dtype
        assert np.array_equal(got.reshape(samples.shape), samples)


def test_each_byte_is_predicted_as_the_standard_says() -> None:
    """All triples of neighbours with values at which a byte could run over."""
    left, upper, corner = (each.astype(np.uint8).ravel() for each in np.meshgrid(EDGES, EDGES, EDGES))
    rows = np.stack([np.stack([corner, upper], -1), np.stack([left, np.zeros_like(left)], -1)], 1)
    got = np.concatenate([png._predicted(pair, 1)[0] for pair in rows])

    def paeth(a: int, b: int, c: int) -> int:
        near = [abs(a + b - c - each) for each in (a, b, c)]
        return (a, b, c)[near.index(min(near))]  # the first of the nearest

    want = [paeth(int(a), int(b), int(c)) for a, b, c in zip(left, upper, corner, strict=True)]
    assert got.tolist() == want


def test_a_photograph_is_about_as_small_as_with_filters_chosen_row_by_row() -> None:
    y, x = np.mgrid[:256, :256] / 256
    smooth = np.stack([x, y, (np.sin(9 * x) * np.cos(7 * y) + 1) / 2], -1)
    photo = (np.clip(smooth + np.random.default_rng(0).normal(0, 0.01, smooth.shape), 0, 1) * 255).astype(
        np.uint8
    )
    pillows = io.BytesIO()
    Image.fromarray(photo).save(pillows, "PNG", compress_level=4)
    assert len(written(photo)) < 1.05 * len(pillows.getvalue())
    flat = np.zeros((256, 256, 3), np.uint8)
    assert len(written(flat)) < 1000


@pytest.mark.parametrize("bits", [8, 16])
def test_notes_and_profile_come_along(bits: int) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "ä" * 5)
    samples = np.full((4, 5, 3), 7, np.uint8 if bits == 8 else np.uint16)
    data = png.write(samples, info, PROFILES["a linear space"])
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.info["icc_profile"] == PROFILES["a linear space"]
        assert image.info["note"] == "ä" * 5
