"""Mask operations against the reference's own outputs, and against slow second derivations."""

import json
import time
import tracemalloc
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import ndimage

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import Mask, Pad, ScaleBy
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, composite, masks
from overpaint_worker.engine.picture import Picture

NODES = Path(__file__).parents[1] / "data" / "parity" / "nodes"
LIMITS = Limits()


def reference(name: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    with np.load(NODES / name) as file:
        arrays = {key: torch.from_numpy(file[key][0]) for key in file if key != "params"}
        return json.loads(str(file["params"])), arrays


def cases(pattern: str) -> list[str]:
    found = sorted(path.name for path in NODES.glob(pattern))
    assert found
    return found


def noise(height: int, width: int, *channels: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, *channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", cases("GrowMask_*.npz"))
def test_grow_gives_the_references_mask(name: str) -> None:
    params, arrays = reference(name)
    made = masks.grow(arrays["in_mask"], params["expand"], tapered=bool(params["tapered_corners"]))
    assert torch.equal(made, arrays["out_0"])


@pytest.mark.parametrize("name", cases("FeatherMask_*.npz"))
def test_feather_borders_gives_the_references_mask_under_compat(name: str) -> None:
    params, arrays = reference(name)
    made = masks.feather_borders(arrays["in_mask"], **params, compat=True)
    torch.testing.assert_close(made, arrays["out_0"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", cases("ImageCompositeMasked_*.npz"))
def test_composite_at_gives_the_references_pixels(name: str) -> None:
    params, arrays = reference(name)
    made = composite.composite_at(
        arrays["in_destination"],
        arrays["in_source"],
        params["x"],
        params["y"],
        arrays.get("in_mask"),
        resize_source=bool(params["resize_source"]),
    )
    assert torch.equal(made, arrays["out_0"])


def grown_by_steps(mask: torch.Tensor, by: int, *, tapered: bool) -> np.ndarray:
    """The page's own words: |by| passes of SciPy's grey dilation or erosion with a 3 x 3 footprint."""
    corner = not tapered
    footprint = np.array([[corner, True, corner], [True, True, True], [corner, True, corner]])
    step = ndimage.grey_dilation if by > 0 else ndimage.grey_erosion
    made = mask.numpy()
    for _ in range(abs(by)):
        made = step(made, footprint=footprint)
    return made


@given(
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    by=st.integers(-24, 24),
    tapered=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_grow_is_so_many_passes_of_grey_dilation(
    size: tuple[int, int], by: int, tapered: bool, seed: int
) -> None:
    mask = noise(*size, seed=seed)
    assert np.array_equal(
        masks.grow(mask, by, tapered=tapered).numpy(), grown_by_steps(mask, by, tapered=tapered)
    )


@pytest.mark.parametrize("tapered", [True, False])
@pytest.mark.parametrize("by", [16384, -16384])
def test_a_growth_takes_little_memory_beside_its_mask(by: int, tapered: bool) -> None:
    mask = torch.zeros(2, 4096)
    mask[0, 7] = 0.7
    tracemalloc.start()
    try:
        masks.grow(mask, by, tapered=tapered)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * mask.numel() * 4


@pytest.mark.parametrize("tapered", [True, False])
def test_a_growth_far_beyond_the_picture_fills_it(tapered: bool) -> None:
    mask = torch.zeros(9, 14)
    mask[0, 13] = 0.7
    assert torch.equal(masks.grow(mask, 16384, tapered=tapered), torch.full((9, 14), 0.7))


def feathered_by_hand(mask: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Mended: from the last row and column inward."""
    out = mask.astype(np.float64)
    height, width = mask.shape
    for i in range(min(left, width)):
        out[:, i] *= (i + 1) / min(left, width)
    for i in range(min(right, width)):
        out[:, width - 1 - i] *= (i + 1) / min(right, width)
    for i in range(min(top, height)):
        out[i] *= (i + 1) / min(top, height)
    for i in range(min(bottom, height)):
        out[height - 1 - i] *= (i + 1) / min(bottom, height)
    return out


def feathered_as_the_reference(mask: np.ndarray, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    out = mask.astype(np.float64)
    height, width = mask.shape
    for i in range(min(left, width)):
        out[:, i] *= (i + 1) / min(left, width)
    for i in range(min(right, width)):
        out[:, -i] *= (i + 1) / min(right, width)
    for i in range(min(top, height)):
        out[i] *= (i + 1) / min(top, height)
    for i in range(min(bottom, height)):
        out[-i] *= (i + 1) / min(bottom, height)
    return out


@pytest.mark.parametrize(
    "sides",
    [(5, 0, 0, 0), (0, 4, 0, 0), (0, 0, 5, 0), (0, 0, 0, 3), (3, 4, 5, 6), (99, 99, 99, 99), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("compat", [False, True])
def test_feather_borders_multiplies_ramps(sides: tuple[int, int, int, int], compat: bool) -> None:
    mask = noise(9, 13)
    by_hand = feathered_as_the_reference if compat else feathered_by_hand
    made = masks.feather_borders(mask, *sides, compat=compat)
    np.testing.assert_allclose(made.numpy(), by_hand(mask.numpy(), *sides), rtol=1e-6)


def test_the_right_and_bottom_feather_mirrors_the_left_and_top() -> None:
    mask = torch.ones(9, 13)
    left = masks.feather_borders(mask, 5, 3, 0, 0)
    assert torch.equal(masks.feather_borders(mask, 0, 0, 5, 3), left.flip(0, 1))
    assert left[8].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 9)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    by=st.integers(0, 9),
    share=st.integers(0, 100),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_feather_weakens_by_the_distance_to_the_nearest_unmasked_pixel(
    size: tuple[int, int], by: int, share: int, seed: int
) -> None:
    mask = noise(*size, seed=seed)
    mask[noise(*size, seed=seed + 100) < share / 100] = 0
    outside = np.argwhere(mask.numpy() == 0)
    expected = mask.numpy().copy()
    for y, x in np.argwhere(mask.numpy() > 0):
        nearest = np.sqrt(((outside - (y, x)) ** 2).sum(axis=1)).min() if len(outside) else np.inf
        if by > 0:
            expected[y, x] *= min(1, nearest / by)
    np.testing.assert_allclose(masks.feather(mask, by).numpy(), expected, rtol=1e-6)


def test_feather_of_a_square_falls_linearly_to_its_edge() -> None:
    mask = torch.zeros(20, 20)
    mask[4:16, 4:16] = 1
    assert (
        masks.feather(mask, 4)[10].tolist()
        == [0] * 4 + [0.25, 0.5, 0.75] + [1] * 6 + [0.75, 0.5, 0.25] + [0] * 4
    )


def test_blur_is_a_gaussian_of_that_deviation_and_keeps_the_sum() -> None:
    mask = torch.zeros(61, 61)
    mask[30, 30] = 1
    made = masks.blur(mask, 3.0).double()
    offsets = torch.arange(61, dtype=torch.float64) - 30
    assert made.sum().item() == pytest.approx(1, abs=1e-5)
    assert (made.sum(0) * offsets**2).sum().sqrt().item() == pytest.approx(3, rel=0.01)
    assert torch.equal(masks.blur(mask, 0), mask)


def test_threshold_is_strict_and_invert_swaps() -> None:
    mask = torch.tensor([[0.0, 0.5, 0.500001, 1.0]])
    assert masks.threshold(mask, 0.5).tolist() == [[0, 0, 1, 1]]
    assert masks.invert(mask)[0].tolist() == pytest.approx([1, 0.5, 0.499999, 0])


def test_combinations() -> None:
    a, b = torch.tensor([[0.0, 0.3, 0.9, 1.0]]), torch.tensor([[0.5, 0.2, 0.4, 1.0]])
    assert masks.combine("union", [a, b]).tolist() == torch.tensor([[0.5, 0.3, 0.9, 1.0]]).tolist()
    assert masks.combine("intersect", [a, b]).tolist() == torch.tensor([[0.0, 0.2, 0.4, 1.0]]).tolist()
    assert masks.combine("subtract", [a, b])[0].tolist() == pytest.approx([0.0, 0.1, 0.5, 0.0])
    assert masks.combine("subtract", [a, b, b])[0].tolist() == pytest.approx([0.0, 0.0, 0.1, 0.0])
    with pytest.raises(MaskError, match="2 x 2"):
        masks.combine("union", [a, torch.zeros(2, 2)])


def picture(rgb: torch.Tensor, alpha: torch.Tensor | None = None) -> Picture:
    return Picture(rgb=rgb, alpha=alpha, icc=None, depth=8, samples=None)


def built(
    spec: dict[str, object],
    source: Picture,
    *ops: object,
    images: dict[str, torch.Tensor] | None = None,
    **how: bool,
) -> torch.Tensor:
    made = canvas.prepare(source, ops, LIMITS)  # type: ignore[arg-type]
    mask = TypeAdapter(Mask).validate_json(json.dumps(spec))
    return masks.build(mask, source, made, (images or {}).__getitem__, **how)


@pytest.mark.parametrize("how", ["union", "intersect", "subtract"])
def test_a_combination_holds_two_of_its_parts_at_a_time(how: str) -> None:
    source, alive, most = picture(noise(10, 20, 3)), WeakSet[torch.Tensor](), []

    def image(path: str) -> torch.Tensor:
        alive.add(part := noise(10, 20, seed=len(path)))
        most.append(len(alive))
        return part

    inner = {"from": "combine", "how": how, "masks": [{"from": "image", "image": "m.png"}] * 8}
    spec = {"from": "combine", "how": "union", "masks": [inner] * 8}
    mask = TypeAdapter(Mask).validate_json(json.dumps(spec))
    masks.build(mask, source, canvas.prepare(source, (), LIMITS), image, compat=True)

    assert len(most) == 64
    assert max(most) <= 3  # one more in the mask around it


@pytest.mark.parametrize("deviation", [3.0, 9.0, 40.0, 300.0])
def test_blur_is_what_adding_up_each_pixels_neighbours_gives(deviation: float) -> None:
    mask = torch.zeros(61, 257)
    mask[10:20, 30:90] = noise(10, 60)
    slow = ndimage.gaussian_filter(mask.numpy(), deviation)

    made = masks.blur(mask, deviation).numpy()
    assert np.abs(made - slow).max() < 1e-6
    assert np.array_equal(made > 0, slow > 0)  # what it does not reach is spared bit for bit


def test_blur_costs_about_the_same_for_any_radius() -> None:
    mask = noise(300, 400)
    spent = {}
    for deviation in (16.0, 1024.0):
        began = time.thread_time()
        masks.blur(mask, deviation)
        spent[deviation] = time.thread_time() - began

    assert spent[1024.0] < 10 * spent[16.0]


def test_an_image_mask_is_carried_from_the_source_or_taken_at_the_canvas() -> None:
    source, mask = picture(noise(10, 20, 3)), noise(10, 20)
    spec = {"from": "image", "image": "m.png"}
    assert torch.equal(built(spec, source, Pad(left=4), images={"mask": mask})[:, 4:], mask)
    wide = noise(10, 24)
    assert torch.equal(built(spec | {"at": "canvas"}, source, Pad(left=4), images={"mask": wide}), wide)
    with pytest.raises(MaskError, match="24 x 10") as caught:
        built(spec | {"at": "canvas"}, source, Pad(left=4), images={"mask": mask})
    assert caught.value.field == "mask.image"


def test_operations_count_the_canvas_pixels() -> None:
    source = picture(noise(32, 32, 3), alpha=torch.ones(32, 32))
    assert source.alpha is not None
    source.alpha[8:24, 8:24] = 0
    spec = {"from": "alpha", "ops": [{"op": "threshold"}, {"op": "grow", "by": 6, "tapered": False}]}
    made = built(spec, source, ScaleBy(factor=2, filter="area"))
    assert made.sum().item() == (32 + 12) ** 2


def test_operations_run_in_order() -> None:
    source = picture(noise(8, 8, 3), alpha=torch.full((8, 8), 0.75))
    spec = {"from": "alpha", "ops": [{"op": "invert"}, {"op": "threshold", "at": 0.5}]}
    assert built(spec, source).all()
    other_way = spec | {"ops": [{"op": "threshold", "at": 0.2}, {"op": "invert"}]}
    assert not built(other_way, source, compat=True).any()
    assert not built({"from": "alpha", "ops": [{"op": "threshold", "at": 0.5}]}, source, compat=True).any()


def test_a_mask_that_covers_nothing_is_refused_but_under_compat() -> None:
    source, images = picture(noise(8, 8, 3)), {"mask": torch.zeros(8, 8)}
    with pytest.raises(MaskError, match="covers nothing") as caught:
        built({"from": "image", "image": "black.png"}, source, images=images)
    assert caught.value.field == "mask"
    assert caught.value.fix
    assert not built({"from": "image", "image": "black.png"}, source, images=images, compat=True).any()


def test_nested_combinations_find_their_images_by_path() -> None:
    source = picture(noise(8, 8, 3))
    left, top = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :4] = 1
    top[:4] = 1
    inner = {
        "from": "combine",
        "how": "intersect",
        "masks": [{"from": "image", "image": "a"}, {"from": "image", "image": "b"}],
    }
    spec = {
        "from": "combine",
        "how": "union",
        "masks": [inner, {"from": "image", "image": "c", "ops": [{"op": "invert"}]}],
    }
    images = {
        "mask.masks[0].masks[0]": left,
        "mask.masks[0].masks[1]": top,
        "mask.masks[1]": torch.ones(8, 8),
    }
    assert torch.equal(built(spec, source, images=images), left * top)


def test_a_source_without_transparency_is_refused_or_empty_under_compat() -> None:
    source = picture(noise(8, 9, 3))
    with pytest.raises(MaskError, match="no transparency"):
        built({"from": "alpha"}, source)
    assert torch.equal(built({"from": "alpha"}, source, compat=True), torch.zeros(8, 9))
    assert torch.equal(masks.load_image_mask(source), torch.zeros(64, 64))


def test_a_pad_mask_needs_a_pad() -> None:
    source = picture(noise(8, 9, 3))
    assert built({"from": "pad"}, source, Pad(right=8, feathering=0)).sum().item() == 64
    with pytest.raises(MaskError, match="`pad`"):
        built({"from": "pad"}, source)


@pytest.mark.parametrize(
    ("least", "most", "bad"), [(0.3, 1, "min_coverage"), (0, 0.2, "max_coverage"), (0.25, 0.25, None)]
)
def test_coverage_bounds_fail_before_anything_costs(least: float, most: float, bad: str | None) -> None:
    source = picture(noise(8, 8, 3), alpha=torch.ones(8, 8))
    assert source.alpha is not None
    source.alpha[:4, :4] = 0
    spec = {"from": "alpha", "min_coverage": least, "max_coverage": most}
    if bad is None:
        assert masks.coverage(built(spec, source)) == 0.25
        return
    with pytest.raises(MaskError, match=r"25\.00%") as caught:
        built(spec, source)
    assert caught.value.field == f"mask.{bad}"


@pytest.mark.parametrize("column", range(8))
def test_a_line_between_the_latents_sample_points_is_refused(column: int) -> None:
    mask = torch.zeros(64, 64)
    mask[:, 16 + column] = 1
    if column in {3, 4}:
        masks.check_survives(mask, 8, 8)
        return
    with pytest.raises(MaskError, match="8 x 8"):
        masks.check_survives(mask, 8, 8)


def test_an_empty_mask_is_not_called_thin() -> None:
    masks.check_survives(torch.zeros(64, 64), 8, 8)


def test_composite_keeps_the_original_bit_for_bit_where_the_mask_is_0() -> None:
    original, result, mask = noise(20, 20, 3), noise(20, 20, 3, seed=1) * 3 - 1, noise(20, 20, seed=2)
    mask[:10] = 0
    mask[10:13] = 1
    result[0, 0] = torch.nan  # what is not shown cannot hurt
    made = composite.composite(original, result, mask)
    assert torch.equal(made[:10], original[:10])
    assert torch.equal(made[10:13], result[10:13])
    mixed = original[13:] + mask[13:, :, None] * (result[13:] - original[13:])
    torch.testing.assert_close(made[13:], mixed)


def composited_by_hand(
    destination: np.ndarray, source: np.ndarray, mask: np.ndarray, x: int, y: int
) -> np.ndarray:
    out = destination.astype(np.float64)
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            if y + i < out.shape[0] and x + j < out.shape[1]:
                out[y + i, x + j] = mask[i, j] * source[i, j] + (1 - mask[i, j]) * out[y + i, x + j]
    return out


@pytest.mark.parametrize(("x", "y"), [(0, 0), (5, 3), (18, 11), (20, 12), (999, 0)])
def test_composite_at_touches_the_overlap_only(x: int, y: int) -> None:
    destination, source, mask = noise(12, 20, 3), noise(6, 7, 3, seed=1), noise(6, 7, seed=2)
    made = composite.composite_at(destination, source, x, y, mask)
    np.testing.assert_allclose(
        made.numpy(), composited_by_hand(destination.numpy(), source.numpy(), mask.numpy(), x, y), atol=1e-6
    )
    whole = composite.composite_at(destination, source, x, y)
    np.testing.assert_allclose(
        whole.numpy(),
        composited_by_hand(destination.numpy(), source.numpy(), np.ones((6, 7)), x, y),
        atol=1e-6,
    )


def test_composite_at_scales_the_source_when_asked() -> None:
    destination, source = noise(12, 20, 3), noise(6, 10, 3, seed=1)
    made = composite.composite_at(destination, source, 0, 0, resize_source=True)
    expected = torch.nn.functional.interpolate(source.permute(2, 0, 1)[None], (12, 20), mode="bilinear")[
        0
    ].permute(1, 2, 0)
    torch.testing.assert_close(made, expected)


def test_composite_at_puts_rgb_on_rgba_as_opaque_but_fails_under_compat() -> None:
    destination, source = torch.zeros(4, 4, 4), noise(2, 2, 3)
    made = composite.composite_at(destination, source, 1, 1)
    assert torch.equal(made[1:3, 1:3], torch.cat([source, torch.ones(2, 2, 1)], dim=-1))
    with pytest.raises(InputError):
        composite.composite_at(destination, source, 1, 1, compat=True)
    assert composite.composite_at(torch.zeros(4, 4, 3), noise(2, 2, 4), 0, 0, compat=True).shape == (4, 4, 3)
