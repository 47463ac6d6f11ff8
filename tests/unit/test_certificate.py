"""The certificate's figures, against published colours and against counting by hand."""

import tracemalloc

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
    before = np.full((40, 50, 3), 100, np.uint8)
    after = before.copy()
    after[15:25, 20:30] = 0  # under the mask: no matter
    after[0, 0, 1] = 103
    after[39, 49, 2] = 95
    got = certificate.outside(after, before, square(), 255)
    assert got is not None
    assert (got.largest, got.changed) == (5, pytest.approx(2 / 1900))
    assert certificate.outside(after, before, torch.ones(40, 50), 255) is None


def test_sixteen_bits_are_told_in_eight_bit_levels() -> None:
    before = np.zeros((4, 4, 3), np.uint16)
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


@pytest.mark.parametrize(
    "box", [(15, 25, 20, 30), (0, 5, 0, 50), (33, 40, 45, 50), (0, 2, 48, 50), (3, 37, 2, 48)]
)
def test_what_is_far_from_the_mask_is_not_looked_at_and_changes_no_figure(box: tuple[int, ...]) -> None:
    top, bottom, left, right = box
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.rand(40, 50, 3, generator=generator) for _ in range(2))
    mask = torch.zeros(40, 50)
    mask[top:bottom, left:right] = 0.5
    mask[top, left] = 0
    under = mask.numpy() > 0
    ring = np.zeros_like(under)  # by counting: all within eight pixels of the mask, and not in it
    for y, x in zip(*np.nonzero(under), strict=True):
        ring[max(y - 8, 0) : y + 9, max(x - 8, 0) : x + 9] = True
    moved = (certificate.lab(after.numpy()) - certificate.lab(before.numpy()))[ring & ~under]
    shift = certificate.ring_shift(after, before, mask)
    assert shift is not None
    assert (shift.lightness, shift.a, shift.b) == pytest.approx(tuple(moved.mean(axis=0)), rel=1e-12)
    lab, apart = certificate.lab(after.numpy()), list[float]()
    for axis in (0, 1):
        one, other = np.split(lab, [1], axis)[1], np.split(lab, [-1], axis)[0]
        edge = np.split(under, [1], axis)[1] != np.split(under, [-1], axis)[0]
        apart += np.linalg.norm(one - other, axis=-1)[edge].tolist()
    assert certificate.seam_contrast(after, mask) == pytest.approx(np.mean(apart), rel=1e-12)


def test_what_is_compared_in_bands_is_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(4)
    before, after = torch.rand(40, 30, 3, generator=chance), torch.rand(40, 30, 3, generator=chance)
    mask = (torch.rand(40, 30, generator=chance) > 0.9).float()

    def figures() -> list[float]:
        shift, seam = certificate.ring_shift(after, before, mask), certificate.seam_contrast(after, mask)
        assert shift is not None
        assert seam is not None
        return [*shift.to_json().values(), round(seam, 4)]

    whole = figures()
    for pixels in (1, 70, 200):  # a row at a time, two, six
        monkeypatch.setattr(certificate, "BAND_PIXELS", pixels)
        assert figures() == whole


def test_a_mask_that_is_edges_everywhere_takes_little_memory() -> None:
    picture = torch.full((1024, 1024, 3), 0.5)
    mask = (torch.arange(1024)[:, None] + torch.arange(1024)) % 2.0
    tracemalloc.start()
    try:
        certificate.seam_contrast(picture, mask)
        certificate.ring_shift(picture, picture, mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / 1024**2 < 40
