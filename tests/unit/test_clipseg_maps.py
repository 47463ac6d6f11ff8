"""From logits to mask and heat map: against the reference, OpenCV, matplotlib, and first principles."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared.errors import PrecisionError
from overpaint_worker.engine.clipseg import findings, maps
from overpaint_worker.engine.clipseg.findings import Findings
from overpaint_worker.engine.packing import heat_files

DATA = Path(__file__).parents[1] / "data"
PARITY = np.load(DATA / "parity" / "clipseg" / "clipseg_7.0_0.4_4.npz")
REFERENCES = np.load(DATA / "clipseg" / "references.npz")
SETTINGS = [name.removeprefix("settings") for name in REFERENCES.files if name.startswith("settings")]
SIZES = [name.removeprefix("resized_") for name in REFERENCES.files if name.startswith("resized_")]


def found(logits: np.ndarray, blur: float = 7.0, threshold: float = 0.4, dilation: int = 4):
    return maps.indices(torch.from_numpy(logits), threshold=threshold, blur=blur, dilation=dilation)


def levels(values: torch.Tensor) -> np.ndarray:
    whole = values.numpy() * 255
    assert np.abs(whole - np.rint(whole)).max() < 1e-4
    return np.rint(whole)


def test_the_references_mask_and_heat_map_are_met_exactly() -> None:
    image = torch.from_numpy(PARITY["image"][0])
    where = found(PARITY["logits"])
    mask = maps.mask(where, image.shape[1], image.shape[0])
    assert np.array_equal(mask.numpy(), PARITY["mask"])
    assert np.array_equal(mask.numpy(), PARITY["bw"][0, ..., 0])
    assert np.array_equal(maps.heat_map(where, image).numpy(), PARITY["heatmap"][0])


@pytest.mark.parametrize("number", SETTINGS)
def test_other_settings_and_odd_sizes_are_what_opencv_and_matplotlib_make(number: str) -> None:
    blur, threshold, dilation = REFERENCES[f"settings{number}"]
    where = found(PARITY["logits"], float(blur), float(threshold), int(dilation))
    grey, picture = REFERENCES[f"grey{number}"], REFERENCES[f"picture{number}"]
    assert np.array_equal(levels(maps.mask(where, grey.shape[1], grey.shape[0])), grey)
    shown = torch.from_numpy(picture.astype(np.float32) / 255)
    assert np.array_equal(levels(maps.heat_map(where, shown)), REFERENCES[f"heat{number}"])


@pytest.mark.parametrize("size", SIZES)
def test_scaling_is_opencvs_to_the_bit(size: str) -> None:
    width, height = map(int, size.split("x"))
    assert np.array_equal(maps.resize(REFERENCES["source"], width, height), REFERENCES[f"resized_{size}"])


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, 40)] * 4), st.integers(0, 2**32 - 1))
def test_scaling_is_bilinear_to_within_one_level(sizes: tuple[int, int, int, int], seed: int) -> None:
    height, width, new_height, new_width = sizes
    source = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(source.astype(np.float64))[None, None], (new_height, new_width), mode="bilinear"
    )[0, 0].numpy()
    assert np.abs(maps.resize(source, new_width, new_height) - exact).max() <= 1


def test_the_tables_are_matplotlibs() -> None:
    grey, viridis = maps.tables()
    sixteenth = [0, 18, 37, 59, 82, 98, 115, 132, 150, 170, 189, 203, 217, 229, 240, 247]
    assert [*grey[::16], grey[255]] == [*sixteenth, 255]
    assert viridis.shape == (256, 3)
    assert viridis[0].tolist() == [68, 1, 84]
    assert viridis[255].tolist() == [253, 231, 36]


def test_the_threshold_is_strict() -> None:
    logits = np.full((8, 8), -20, np.float32)
    logits[2:4, 2:4] = 0  # a probability of exactly one half
    assert found(logits, blur=0, threshold=0.5) is None
    where = found(logits, blur=0, threshold=0.4999, dilation=0)
    assert where is not None
    assert np.array_equal(where == 255, logits == 0)


def test_dilation_grows_by_so_many_cells_on_each_side_and_nothing_comes_over_the_border() -> None:
    logits = np.full((16, 16), -20, np.float32)
    logits[0, 8] = 20
    where = found(logits, blur=0, dilation=3)
    assert where is not None
    assert np.argwhere(where == 255).tolist() == [[y, x] for y in range(4) for x in range(5, 12)]


@pytest.mark.parametrize("level", [-20.0, 20.0], ids=["nothing", "everything alike"])
def test_a_map_without_a_difference_finds_nothing_and_is_black(level: float) -> None:
    where = found(np.full((16, 16), level, np.float32))
    assert where is None
    assert not maps.mask(where, 5, 7).any()
    white = torch.ones(7, 5, 3)
    assert (
        levels(maps.heat_map(where, white)).tolist() == np.full((7, 5, 3), 128).tolist()
    )  # 127.5, half to even


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = np.zeros((8, 8), np.float32)
    logits[3, 3] = np.nan
    with pytest.raises(PrecisionError):
        found(logits)


def test_the_picture_is_cut_off_to_eight_bits() -> None:
    assert maps.eight_bits(torch.tensor([0.9999, 254.99 / 255, 1.2, -0.1])).tolist() == [254, 254, 255, 0]


def of_texts(count: int) -> Findings:
    return Findings({f"mask.masks[{i}]": np.full((4, 4), i, np.uint8) for i in range(count)})


def test_heat_maps_are_written_one_at_a_time() -> None:
    canvas = torch.zeros(512, 512, 3)
    tracemalloc.start()
    try:
        files = heat_files(of_texts(24).heat_maps(canvas))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(files) == ["heatmap.png", *(f"heatmap-{number}.png" for number in range(2, 25))]
    assert peak < 8 * canvas.numel() * 4  # all 24 at once take three times as much


@pytest.mark.parametrize(("count", "size"), [(4, (56, 36)), (5, (53, 35)), (40, (18, 12))])
def test_heat_maps_that_have_too_many_pixels_together_are_smaller_and_show_the_whole_canvas(
    count: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "HEAT_PIXELS", 4 * 60 * 40)
    canvas = torch.zeros(60, 40, 3)
    canvas[30:] = 1.0
    made = list(of_texts(count).heat_maps(canvas, lambda whole: whole[2:-2, 2:-2]))
    assert [tuple(each.shape) for each in made] == [(*size, 3)] * count
    assert sum(each.shape[0] * each.shape[1] for each in made) <= findings.HEAT_PIXELS
    dark, light = made[0][: size[0] // 2 - 1].mean(), made[0][size[0] // 2 + 1 :].mean()
    assert light - dark == pytest.approx(0.5, abs=0.01)
