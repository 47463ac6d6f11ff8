"""The certificate's figures, against published colours and against counting by hand."""

import numpy as np
import pytest
import torch

from overpaint_worker.engine import certificate

# Lab (D65) of sRGB colours: white, black and the primaries, from the formulas of IEC 61966-2-1 and CIE 15,
# as published in Lindbloom's tables to two digits; and mid grey.
PUBLISHED = {
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    (0.5, 0.5, 0.5): (53.39, 0.0, 0.0),
}


@pytest.mark.parametrize("srgb", PUBLISHED)
def test_colours_have_their_published_lab_values(srgb: tuple[float, float, float]) -> None:
    got = certificate.lab(np.array([srgb], np.float32))[0]
    assert got == pytest.approx(PUBLISHED[srgb], abs=0.03)


def test_lab_is_pillows_to_its_precision() -> None:
    """A second way, by a colour management system; its Lab is of D50, in whole levels."""
    from PIL import Image, ImageCms

    greys = np.repeat(np.arange(0, 256, 15, dtype=np.uint8)[:, None], 3, axis=1)
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    theirs = np.asarray(ImageCms.applyTransform(Image.fromarray(greys[None]), to_lab))[0, :, 0]
    ours = certificate.lab(greys.astype(np.float32) / 255)[:, 0]
    assert np.abs(theirs / 2.55 - ours).max() < 0.5


def square() -> torch.Tensor:
    mask = torch.zeros(40, 50)
    mask[15:25, 20:30] = 1
    return mask


def test_the_greatest_change_outside_and_its_share_are_counted() -> None:
    before = torch.full((40, 50, 3), 100, dtype=torch.int32)
    after = before.clone()
    after[15:25, 20:30] = 0  # under the mask: no matter
    after[0, 0, 1] = 103
    after[39, 49, 2] = 95
    got = certificate.outside(after, before, square(), 255)
    assert got is not None
    assert (got.largest, got.changed) == (5, pytest.approx(2 / 1900))
    assert certificate.outside(after, before, torch.ones(40, 50), 255) is None


def test_sixteen_bits_are_told_in_eight_bit_levels() -> None:
    before = torch.zeros(4, 4, 3, dtype=torch.int32)
    got = certificate.outside(before + 1, before, torch.zeros(4, 4), 65535)
    assert got is not None
    assert got.largest == pytest.approx(255 / 65535)
    assert got.to_json()["largest_change"] > 0


def test_only_the_ring_of_eight_pixels_counts_for_the_shift() -> None:
    before = torch.full((40, 50, 3), 0.5)
    after = before.clone()
    after[15:25, 20:30] = 1.0  # under the mask
    after[15 - 9, 20:30] = 1.0  # the ninth row out
    shift = certificate.ring_shift(after, before, square())
    assert shift is not None
    assert shift.distance == 0
    after[15 - 8, 20 - 8] = 1.0  # the ring's corner: one of 26 x 26 - 100 pixels
    shift = certificate.ring_shift(after, before, square())
    assert shift is not None
    assert shift.lightness == pytest.approx((100 - 53.39) / 576, rel=1e-3)
    assert shift.distance == pytest.approx(shift.lightness)
    assert (shift.a, shift.b) == pytest.approx((0, 0), abs=1e-4)


def test_a_shift_that_cancels_out_still_has_a_distance() -> None:
    before = torch.full((40, 50, 3), 0.5)
    after = before.clone()
    after[:, ::2] += 0.1
    after[:, 1::2] -= 0.1
    shift = certificate.ring_shift(after, before, square())
    assert shift is not None
    assert abs(shift.lightness) < 1
    assert shift.distance > 9


def test_seam_contrast_is_the_mean_over_neighbours_across_the_edge() -> None:
    picture = torch.full((40, 50, 3), 0.5)
    assert certificate.seam_contrast(picture, square()) == 0
    picture[15:25, 20:30] = 1.0
    assert certificate.seam_contrast(picture, square()) == pytest.approx(100 - 53.39, abs=0.01)
    picture[15:25, 29] = 0.5  # one side of four blends in
    assert certificate.seam_contrast(picture, square()) == pytest.approx(
        (100 - 53.39) * 28 / 40, abs=0.01
    )  # of the 40 pairs, those of the right side and of its two corners
    assert certificate.seam_contrast(picture, torch.zeros(40, 50)) is None


def test_a_mask_of_everything_has_no_ring() -> None:
    white = torch.ones(9, 9, 3)
    assert certificate.ring_shift(white, white, torch.ones(9, 9)) is None
