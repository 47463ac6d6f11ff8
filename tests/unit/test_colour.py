"""Profiles against LittleCMS, which works in eight bits and was not used for the matrix kind."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from overpaint_worker.engine import colour
from tests.unit import pictures

CUBE = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(18, -1, 3)
SRGB_CURVE = pictures.parametric_curve(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
PROFILES = {
    "a wide space of gamma 2.2": pictures.matrix_icc(pictures.WIDE, pictures.gamma_curve(2.199)),
    "a small space of gamma 1.8": pictures.matrix_icc(pictures.SMALL, pictures.gamma_curve(1.8)),
    "a linear space": pictures.matrix_icc(pictures.SMALL, pictures.parametric_curve(0, 1.0)),
    "a wide space with sRGB's curve": pictures.matrix_icc(pictures.WIDE, SRGB_CURVE),
    "curve of function 0": pictures.matrix_icc(pictures.SMALL, pictures.parametric_curve(0, 2.2)),
    "curve of function 1": pictures.matrix_icc(pictures.SMALL, pictures.parametric_curve(1, 2.0, 0.9, 0.1)),
    "curve of function 2": pictures.matrix_icc(
        pictures.SMALL, pictures.parametric_curve(2, 2.0, 0.8, 0.1, 0.1)
    ),
    "curve of function 4": pictures.matrix_icc(
        pictures.SMALL, pictures.parametric_curve(4, 2.4, 0.9, 0.05, 0.5, 0.04, 0.02, 0.0028)
    ),
    "a curve of samples": pictures.matrix_icc(
        pictures.SMALL, pictures.sampled_curve((np.linspace(0, 1, 300) ** 2 + np.linspace(0, 1, 300)) / 2)
    ),
}


def by_littlecms(levels: np.ndarray, icc: bytes, *, back: bool = False) -> np.ndarray:
    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    source, target = (srgb, own) if back else (own, srgb)
    made = ImageCms.profileToProfile(
        Image.fromarray(levels), source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    assert made is not None
    return np.asarray(made).astype(float)


@pytest.mark.parametrize("name", PROFILES)
def test_matrix_profiles_agree_with_littlecms_within_a_level(name: str) -> None:
    space = colour.read(PROFILES[name])
    assert isinstance(space, colour.Matrix)
    ours = space.to_srgb(CUBE.astype(np.float32) / 255) * 255
    assert np.abs(ours - by_littlecms(CUBE, PROFILES[name])).max() < 1.1
    ours, theirs = (
        space.from_srgb(CUBE.astype(np.float32) / 255) * 255,
        by_littlecms(CUBE, PROFILES[name], back=True),
    )
    dark = np.minimum(ours, theirs) < 4  # there the way back is steep, and LittleCMS's eight bits are coarse
    assert np.abs(ours - theirs)[~dark].max() < 1.1
    assert np.abs(ours - theirs)[dark].max() < 2.2


@pytest.mark.parametrize("name", PROFILES)
def test_sixteen_bit_colours_inside_srgb_come_back(name: str) -> None:
    space = colour.read(PROFILES[name])
    inside = np.random.default_rng(0).random((50, 50, 3), dtype=np.float32) * 0.9 + 0.05
    device = space.from_srgb(inside)
    kept = ((device > 0.002) & (device < 0.998)).all(axis=-1)
    assert kept.any()
    again = space.to_srgb(device)
    assert np.abs(again - inside)[kept].max() < 2 / 65535 * 8


def test_srgb_by_any_name_changes_no_bit() -> None:
    littlecms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    written_here = pictures.matrix_icc(colour.SRGB_TO_XYZ, SRGB_CURVE)
    values = np.random.default_rng(0).random((9, 9, 3), dtype=np.float32)
    for icc in (littlecms, written_here):
        assert isinstance(colour.read(icc), colour.Identity)
        assert colour.read(icc).to_srgb(values) is values


def test_table_profiles_go_through_littlecms_both_ways() -> None:
    space = colour.read(pictures.table_icc(pictures.SMALL, 1.8, back=True))
    assert isinstance(space, colour.Tables)
    assert space.returns
    same = colour.read(PROFILES["a small space of gamma 1.8"])
    values = CUBE.astype(np.float32) / 255
    assert np.abs(space.to_srgb(values) - same.to_srgb(values)).max() < 1.6 / 255
    inside = same.to_srgb(values * 0.9 + 0.05)
    levels = np.abs(space.from_srgb(inside) - same.from_srgb(inside)) * 255
    assert np.quantile(levels, 0.98) < 1.6
    assert levels.max() < 8  # saturated and dark at once: eight bits going in are coarse there


def test_a_scanners_profile_leads_into_srgb_only() -> None:
    space = colour.read(pictures.table_icc(pictures.SMALL, 1.8, back=False))
    assert not space.returns
    with pytest.raises(colour.ProfileError):
        space.from_srgb(np.zeros((1, 1, 3), np.float32))


def test_a_grey_profile_gives_neutral_srgb() -> None:
    space = colour.read(pictures.icc({b"kTRC": pictures.gamma_curve(1.0)}, space=b"GRAY"))
    made = space.to_srgb(np.array([[[0.0], [0.2140], [1.0]]], np.float32))
    np.testing.assert_allclose(made[0], [[0] * 3, [0.5] * 3, [1] * 3], atol=2e-4)


BROKEN = {
    "nothing": b"",
    "no header": b"x" * 200,
    "cut short": PROFILES["curve of function 4"][:300],
    "for CMYK": pictures.icc({}, space=b"CMYK"),
    "grey without a curve": pictures.icc({}, space=b"GRAY"),
    "RGB without tags": pictures.icc({}),
    "an unknown curve": pictures.matrix_icc(pictures.SMALL, b"nope" + bytes(12)),
    "an unknown function": pictures.matrix_icc(pictures.SMALL, pictures.parametric_curve(9, 1.0)),
    "primaries on a line": pictures.matrix_icc(np.ones((3, 3)) / 3, pictures.gamma_curve(2.2)),
    "a million tags": PROFILES["a linear space"][:128] + b"\0\x0f\xff\xff" + PROFILES["a linear space"][132:],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_profiles_are_named_as_such(name: str) -> None:
    with pytest.raises(colour.ProfileError, match=r"\w"):
        colour.read(BROKEN[name])
