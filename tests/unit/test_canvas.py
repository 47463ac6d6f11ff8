"""`prepare`: every filter, crop and pad against the reference's outputs and a second derivation."""

import json
from math import isclose
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import Crop, Pad, PrepareOp, Scale, ScaleBy
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, resample
from overpaint_worker.engine.geometry import Size, centre_box, plan
from overpaint_worker.engine.picture import Picture

NODES = Path(__file__).parents[1] / "data" / "parity" / "nodes"
LIMITS = Limits()
FILTERS: tuple[resample.Filter, ...] = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")


def picture(rgb: torch.Tensor, depth: int = 8, alpha: torch.Tensor | None = None) -> Picture:
    levels = (rgb.numpy() * (2**depth - 1)).astype(np.uint8 if depth == 8 else np.uint16)
    return Picture(rgb=rgb, alpha=alpha, icc=None, depth=16 if depth == 16 else 8, samples=levels)


def noise(width: int, height: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def reference(name: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    with np.load(NODES / name) as file:
        arrays = {key: torch.from_numpy(file[key][0]) for key in file if key != "params"}
        return json.loads(str(file["params"])), arrays


def cases(pattern: str) -> list[str]:
    found = sorted(path.name for path in NODES.glob(pattern))
    assert found
    return found


@pytest.mark.parametrize("name", cases("ImageScale_*.npz"))
def test_scale_gives_the_references_pixels(name: str) -> None:
    params, arrays = reference(name)
    op = Scale.model_validate(
        {key: params[key] for key in ("width", "height", "crop")} | {"filter": params["upscale_method"]}
    )
    made = canvas.prepare(picture(arrays["in_image"]), [op], LIMITS)
    assert torch.equal(made.rgb, arrays["out_0"])


@pytest.mark.parametrize("name", cases("ImageScaleBy_*.npz"))
def test_scale_by_gives_the_references_pixels(name: str) -> None:
    params, arrays = reference(name)
    op = ScaleBy.model_validate({"factor": params["scale_by"], "filter": params["upscale_method"]})
    made = canvas.prepare(picture(arrays["in_image"]), [op], LIMITS)
    assert torch.equal(made.rgb, arrays["out_0"])


@pytest.mark.parametrize("name", cases("ImagePadForOutpaint_*.npz"))
def test_pad_gives_the_references_pixels_and_mask(name: str) -> None:
    params, arrays = reference(name)
    made = canvas.prepare(picture(arrays["in_image"]), [Pad.model_validate(params)], LIMITS)
    assert torch.equal(made.rgb, arrays["out_0"])
    assert torch.equal(made.pad_mask, arrays["out_1"])


@pytest.mark.parametrize("name", cases("LatentUpscaleBy_*.npz"))
def test_latents_scale_as_the_references_do(name: str) -> None:
    params, arrays = reference(name)
    how = str(params["upscale_method"])
    made = resample.interpolate(arrays["in_samples"][None], 30, 24, "area" if how == "area" else "bilinear")
    assert torch.equal(made[0], arrays["out_0"])


def bilinear_by_hand(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """Sample at pixel centres, edges repeated, no smoothing: the definition, one output pixel at a time."""
    rows, columns = plane.shape

    def weights(out: int, size: int, length: int) -> tuple[int, int, float]:
        at = max((out + 0.5) * length / size - 0.5, 0.0)
        low = min(int(at), length - 1)
        return low, min(low + 1, length - 1), at - low

    made = np.zeros((height, width))
    for i in range(height):
        y0, y1, fy = weights(i, height, rows)
        for j in range(width):
            x0, x1, fx = weights(j, width, columns)
            top = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
            bottom = plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx
            made[i, j] = top * (1 - fy) + bottom * fy
    return made


def nearest_by_hand(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    rows = [min(int((i + 0.5) * plane.shape[0] / height), plane.shape[0] - 1) for i in range(height)]
    columns = [min(int((j + 0.5) * plane.shape[1] / width), plane.shape[1] - 1) for j in range(width)]
    return plane[rows][:, columns]


def area_by_hand(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    made = np.zeros((height, width))
    rows, columns = plane.shape
    for i in range(height):
        for j in range(width):
            y0, y1 = i * rows // height, -(-(i + 1) * rows // height)
            x0, x1 = j * columns // width, -(-(j + 1) * columns // width)
            made[i, j] = plane[y0:y1, x0:x1].mean()
    return made


def cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def bicubic_by_hand(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    def along(lines: np.ndarray, size: int) -> np.ndarray:
        length = lines.shape[0]
        made = np.zeros((size, lines.shape[1]))
        for out in range(size):
            at = (out + 0.5) * length / size - 0.5
            low = int(np.floor(at))
            for tap in range(low - 1, low + 3):
                made[out] += cubic(at - tap) * lines[min(max(tap, 0), length - 1)]
        return made

    return along(along(plane, height).T, width).T


@pytest.mark.parametrize(
    ("how", "by_hand"),
    [
        ("bilinear", bilinear_by_hand),
        ("nearest-exact", nearest_by_hand),
        ("area", area_by_hand),
        ("bicubic", bicubic_by_hand),
    ],
)
@pytest.mark.parametrize("size", [(7, 5), (40, 9), (13, 31), (50, 61), (1, 1), (23, 17)])
def test_filters_agree_with_their_definitions(how: resample.Filter, by_hand, size: tuple[int, int]) -> None:
    source = noise(23, 17)
    made = resample.resize(source, *size, how)
    expected = np.stack([by_hand(source[..., c].double().numpy(), *size) for c in range(3)], axis=-1)
    np.testing.assert_allclose(made.numpy(), expected, atol=2e-6)


def lanczos_by_hand(lines: np.ndarray, size: int) -> np.ndarray:
    """Antialiased Lanczos of three lobes: the kernel widens by the scale, normalised at the borders."""
    length = lines.shape[0]
    scale = length / size
    wide = max(scale, 1.0)
    made = np.zeros((size, lines.shape[1]))
    for out in range(size):
        centre = (out + 0.5) * scale
        taps = np.arange(length)
        t = (taps + 0.5 - centre) / wide
        weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
        made[out] = (weights / weights.sum()) @ lines
    return made


@pytest.mark.parametrize("size", [(11, 8), (40, 39), (23, 17)])
def test_lanczos_agrees_with_its_definition_within_a_level_and_exactly_to_float_at_16_bits(
    size: tuple[int, int],
) -> None:
    source = (noise(23, 17) * 255).floor() / 255

    def by_hand(between: float) -> np.ndarray:
        """Across first, then down; in eight bits Pillow also clips between the two."""
        planes = source.double().numpy().transpose(2, 0, 1)
        across = [np.clip(lanczos_by_hand(plane.T, size[0]).T, -between, 1 + between) for plane in planes]
        return np.clip(np.stack([lanczos_by_hand(plane, size[1]) for plane in across], axis=-1), 0, 1)

    coarse = resample.resize(source, *size, "lanczos").numpy()
    assert np.abs(coarse - by_hand(0)).max() < 1.6 / 255
    assert np.array_equal(np.rint(coarse * 255) / np.float32(255), coarse)
    np.testing.assert_allclose(
        resample.resize(source, *size, "lanczos", depth=16).numpy(), by_hand(9), atol=2e-5
    )


def test_lanczos_cuts_levels_off_as_the_reference_does() -> None:
    almost = torch.full((4, 4, 3), 200.999 / 255)
    assert torch.equal(resample.resize(almost, 4, 4, "lanczos"), torch.full((4, 4, 3), 200 / 255))


def test_bicubic_may_leave_the_range_as_the_reference_does() -> None:
    edge = torch.zeros(8, 8, 3)
    edge[:, 4:] = 1
    made = resample.resize(edge, 24, 24, "bicubic")
    assert made.min() < 0
    assert made.max() > 1


def size_after(source: tuple[int, int], *ops: PrepareOp, compat: bool = False) -> tuple[int, int]:
    return plan(Size(*source), ops, LIMITS.max_output_pixels, "prepare", compat=compat).size


@pytest.mark.parametrize(
    ("source", "width", "height", "expected"),
    [
        ((61, 45), 0, 0, (61, 45)),
        ((61, 45), 64, 0, (64, 47)),
        ((61, 45), 0, 90, (122, 90)),
        ((1000, 1), 10, 0, (10, 1)),  # never 0
        ((4, 2), 5, 0, (5, 2)),  # 2.5 goes to the even 2
        ((4, 2), 7, 0, (7, 4)),  # 3.5 goes to the even 4
        ((2, 4), 0, 5, (2, 5)),
        ((2, 4), 0, 7, (4, 7)),
    ],
)
def test_a_side_of_0_keeps_the_aspect(
    source: tuple[int, int], width: int, height: int, expected: tuple[int, int]
) -> None:
    assert size_after(source, Scale(width=width, height=height)) == expected


@pytest.mark.parametrize(
    ("factor", "expected"), [(0.5, (2, 4)), (1.5, (8, 10)), (2.03, (10, 14)), (1.0, (5, 7))]
)
def test_scale_by_rounds_halves_to_even(factor: float, expected: tuple[int, int]) -> None:
    assert size_after((5, 7), ScaleBy(factor=factor)) == expected


@pytest.mark.parametrize(
    ("source", "target", "box"),
    [
        ((61, 45), (31, 17), (0, 6, 61, 33)),  # (45 - 33.45) / 2 = 5.77
        ((61, 45), (17, 31), (18, 0, 25, 45)),
        ((10, 9), (10, 4), (0, 2, 10, 5)),  # (9 - 4) / 2 = 2.5 goes to 2
        ((10, 11), (10, 4), (0, 4, 10, 3)),  # 3.5 goes to 4
        ((45, 61), (17, 31), (6, 0, 33, 61)),
        ((9, 10), (4, 10), (2, 0, 5, 10)),
        ((11, 10), (4, 10), (4, 0, 3, 10)),
        ((64, 64), (10, 10), (0, 0, 64, 64)),
    ],
)
def test_a_centre_crop_takes_the_targets_aspect(
    source: tuple[int, int], target: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    op = Scale(width=target[0], height=target[1], crop="center", filter="bilinear")
    (step,) = plan(Size(*source), [op], LIMITS.max_output_pixels, "prepare").steps
    assert step.box == box
    made = canvas.prepare(picture(noise(*source)), [op], LIMITS).rgb
    x, y, width, height = box
    cut = noise(*source)[y : y + height, x : x + width]
    assert torch.equal(made, resample.resize(cut, *target, "bilinear"))


def test_a_crop_is_the_plain_slice() -> None:
    source = noise(30, 20)
    made = canvas.prepare(picture(source), [Crop(x=3, y=5, width=10, height=7)], LIMITS)
    assert torch.equal(made.rgb, source[5:12, 3:13])
    assert made.size == (10, 7)


@pytest.mark.parametrize(
    "crop",
    [
        Crop(x=25, y=0, width=10, height=4),
        Crop(x=0, y=18, width=2, height=4),
        Crop(x=99, y=0, width=1, height=1),
    ],
)
def test_a_crop_over_the_border_is_refused_by_place_and_sizes(crop: Crop) -> None:
    with pytest.raises(InputError, match="30 x 20") as caught:
        size_after((30, 20), ScaleBy(factor=1.0), crop)
    assert caught.value.field == "prepare[1]"
    assert f"{crop.width} x {crop.height}" in caught.value.message
    assert caught.value.fix


def test_a_crop_over_the_border_is_cut_under_compat() -> None:
    made = canvas.prepare(picture(noise(30, 20)), [Crop(x=25, y=90, width=10, height=4)], LIMITS, compat=True)
    assert torch.equal(made.rgb, noise(30, 20)[19:20, 25:30])


@given(
    sides=st.tuples(*[st.integers(0, 12)] * 4),
    feathering=st.integers(0, 12),
    size=st.tuples(st.integers(1, 26), st.integers(1, 26)),
)
@settings(deadline=None, max_examples=60)
def test_a_pads_mask_is_what_the_page_says(
    sides: tuple[int, int, int, int], feathering: int, size: tuple[int, int]
) -> None:
    left, top, right, bottom = sides
    width, height = size
    op = Pad(left=left, top=top, right=right, bottom=bottom, feathering=feathering)
    made = canvas.prepare(picture(noise(*size)), [op], LIMITS)
    assert made.size == (left + width + right, top + height + bottom)
    assert torch.equal(made.rgb[top : top + height, left : left + width], noise(*size))
    for y in range(made.size.height):
        for x in range(made.size.width):
            i, j = y - top, x - left
            inside = 0 <= i < height and 0 <= j < width
            near = [d for side, d in ((top, i), (bottom, height - i), (left, j), (right, width - j)) if side]
            nearest = min(near, default=feathering)
            soft = (
                feathering > 0 and 2 * feathering < height and 2 * feathering < width and nearest < feathering
            )
            expected = (((feathering - nearest) / feathering) ** 2 if soft else 0.0) if inside else 1.0
            assert isclose(made.pad_mask[y, x].item(), expected, rel_tol=1e-6)
            assert inside or made.rgb[y, x].tolist() == [0.5] * 3


def test_a_picture_too_large_is_refused_before_it_is_made() -> None:
    with pytest.raises(InputError, match="scale_by would make a picture of") as caught:
        canvas.prepare(picture(noise(2000, 2000)), [ScaleBy(factor=8, filter="bicubic")], LIMITS)
    assert caught.value.field == "prepare[0]"


@pytest.mark.parametrize(
    "op", [Scale(width=16384, height=0), Pad(left=16384, top=16384), Scale(width=16384, height=16384)]
)
def test_no_single_step_may_exceed_the_limit_even_if_the_last_is_small(op: PrepareOp) -> None:
    with pytest.raises(InputError):
        size_after((64, 64), op, Scale(width=8, height=8))


def test_a_picture_that_may_be_read_but_not_rendered_must_be_made_smaller() -> None:
    limits = Limits(max_output_pixels=599)
    with pytest.raises(InputError, match="30 x 20") as caught:
        canvas.prepare(picture(noise(30, 20)), [], limits)
    assert caught.value.field == "source.image"
    assert canvas.prepare(picture(noise(30, 20)), [Crop(width=29, height=20)], limits).size == (29, 20)


def test_scaling_to_nothing_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        size_after((20, 20), ScaleBy(factor=0.01))
    assert caught.value.field == "prepare[0].factor"


def test_a_mask_goes_through_the_same_steps() -> None:
    ops = [
        Crop(x=2, y=3, width=20, height=10),
        Scale(width=41, height=21, filter="lanczos"),
        Pad(left=8, bottom=5),
    ]
    made = canvas.prepare(picture(noise(30, 20)), ops, LIMITS)
    mask = noise(30, 20, seed=1)[..., 0]
    expected = np.zeros((26, 49))
    expected[:21, 8:] = bilinear_by_hand(mask[3:13, 2:22].double().numpy(), 41, 21)
    np.testing.assert_allclose(made.carry(mask).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("width", "left"), [(7, 1), (8, 2)])
def test_a_centre_crop_to_a_far_narrower_aspect_leaves_something(width: int, left: int) -> None:
    made = canvas.prepare(
        picture(noise(7, width)), [Scale(width=1, height=65, crop="center", filter="bilinear")], LIMITS
    )
    assert made.rgb.shape == (65, 1, 3)
    assert centre_box(Size(width, 7), Size(1, 65)).width == left


def test_a_mask_is_centre_cropped_with_its_picture() -> None:
    op = Scale(width=20, height=5, filter="nearest-exact", crop="center")
    made = canvas.prepare(picture(noise(40, 40)), [op], LIMITS)
    mask = torch.zeros(40, 40)
    mask[15:25] = 1
    assert torch.equal(made.carry(mask), torch.ones(5, 20))


@pytest.mark.parametrize("shape", [(20, 31), (21, 30), (30, 20), (64, 64), (1, 1)])
def test_a_mask_of_another_size_is_never_resized_in_silence(shape: tuple[int, int]) -> None:
    made = canvas.prepare(picture(noise(30, 20)), [], LIMITS)
    with pytest.raises(MaskError, match="30 x 20"):
        made.carry(torch.zeros(shape))


def test_the_mask_of_a_pad_goes_through_what_follows() -> None:
    ops = [Pad(right=10, feathering=0), Crop(x=20, y=0, width=20, height=20), Pad(top=4, feathering=0)]
    made = canvas.prepare(picture(noise(30, 20)), ops, LIMITS)
    expected = torch.zeros(24, 20)
    expected[:4] = 1
    expected[:, 10:] = 1
    assert torch.equal(made.pad_mask, expected)


def test_the_files_own_values_survive_crop_and_pad_but_not_scaling() -> None:
    source = picture(noise(30, 20), depth=16)
    kept = canvas.prepare(source, [Crop(x=1, y=2, width=9, height=8), Pad(left=3)], LIMITS)
    assert kept.samples is not None
    assert source.samples is not None
    assert np.array_equal(kept.samples[:, 3:], source.samples[2:10, 1:10])
    assert kept.samples.shape == (8, 12, 3)
    assert canvas.prepare(source, [ScaleBy(factor=2)], LIMITS).samples is None


def test_alpha_follows_and_what_was_added_is_transparent() -> None:
    alpha = noise(30, 20, seed=2)[..., 0]
    made = canvas.prepare(picture(noise(30, 20), alpha=alpha), [Pad(left=4)], LIMITS)
    assert made.alpha is not None
    assert torch.equal(made.alpha[:, 4:], alpha)
    assert not made.alpha[:, :4].any()


def test_results_like_the_references_have_no_alpha() -> None:
    shown = picture(noise(30, 20), alpha=noise(30, 20, seed=2)[..., 0])
    assert canvas.prepare(shown, [], LIMITS, compat=True).alpha is None


def test_finish_takes_the_mask_along() -> None:
    rgb, geometry = canvas.finish(
        noise(30, 20), [ScaleBy(factor=2, filter="area"), Crop(x=0, y=0, width=10, height=10)], LIMITS
    )
    assert rgb.shape == (10, 10, 3)
    assert geometry.carry(torch.ones(20, 30)).shape == (10, 10)
    with pytest.raises(InputError) as caught:
        canvas.finish(noise(8, 8), [Crop(width=9, height=1)], LIMITS)
    assert caught.value.field == "finish[0]"
