"""Results as files: levels, depth, profile, alpha and notes, and the pixels that were not to change."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from overpaint_shared.errors import InputError, PrecisionError
from overpaint_shared.job import Output, Pad
from overpaint_shared.settings import Limits
from overpaint_worker.engine import canvas, composite, encode, picture
from tests.unit.pictures import SMALL, chunk, png16, saved, table_icc
from tests.unit.test_colour import PROFILES

LIMITS = Limits()
RNG = np.random.default_rng(3)
PNG, JPEG, WEBP = Output(), Output(format="jpeg"), Output(format="webp")
WEBP_LOSSY = Output(format="webp", lossless=False)


def noise(height: int, width: int, *channels: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(height, width, *channels, generator=torch.Generator().manual_seed(seed))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_levels_are_rounded_or_cut_off_as_the_reference_does() -> None:
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 100.5001 / 255, 254.9 / 255, 1.0, 1.7])
    assert encode.quantise(values).tolist() == [0, 0, 0, 1, 101, 255, 255, 255]
    assert encode.quantise(values, truncate=True).tolist() == [0, 0, 0, 0, 100, 254, 255, 255]
    assert encode.quantise(torch.tensor([0.6 / 65535, 1.0]), 16).tolist() == [1, 65535]


@pytest.mark.parametrize("truncate", [False, True])
def test_levels_that_were_read_come_back_as_they_were(truncate: bool) -> None:
    levels = torch.arange(256, dtype=torch.float32)
    assert encode.quantise(levels / 255, truncate=truncate).tolist() == list(range(256))
    deep = torch.arange(65536, dtype=torch.float32)
    assert encode.quantise(deep / 65535, 16).tolist() == list(range(65536))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_made_a_level(bad: float) -> None:
    with pytest.raises(PrecisionError):
        encode.encode(torch.full((4, 4, 3), bad), PNG)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("output", [PNG, WEBP])
def test_lossless_files_hold_the_levels_exactly(output: Output, compat: bool) -> None:
    image, alpha = noise(17, 23, 3), noise(17, 23, seed=1)
    made = np.asarray(opened(encode.encode(image, output, alpha=alpha, compat=compat)))
    expected = torch.cat([image, alpha[..., None]], dim=-1).numpy() * np.float32(255)
    assert np.array_equal(made, (expected if compat else np.rint(expected)).astype(np.uint8))


def test_lossless_webp_keeps_the_colour_under_full_transparency() -> None:
    made = np.asarray(opened(encode.encode(noise(17, 23, 3), WEBP, alpha=torch.zeros(17, 23))))
    assert np.array_equal(made[..., :3], encode.quantise(noise(17, 23, 3)))


@pytest.mark.parametrize("output", [JPEG, WEBP_LOSSY])
def test_quality_is_obeyed(output: Output) -> None:
    image = noise(64, 64, 3)
    sizes = [len(encode.encode(image, output.model_copy(update={"quality": q}))) for q in (10, 60, None)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_colour_in_a_jpeg_has_full_resolution() -> None:
    red = torch.zeros(16, 16, 3)
    red[:, ::2, 0] = 1
    made = np.asarray(opened(encode.encode(red, JPEG))).astype(int)
    assert (made[:, ::2, 0] - made[:, 1::2, 0]).mean() > 200


@pytest.mark.parametrize("alpha", [None, noise(17, 23, seed=1)])
def test_sixteen_bits_are_written_to_png(alpha: torch.Tensor | None) -> None:
    image = noise(17, 23, 3)
    back = picture.load(encode.encode(image, PNG, alpha=alpha, depth=16), LIMITS, "x")
    assert back.depth == 16
    assert np.array_equal(back.samples, encode.quantise(image, 16))
    assert (back.alpha is None) == (alpha is None)
    assert back.alpha is None or alpha is None or (back.alpha - alpha).abs().max() < 1 / 65535


def test_the_result_returns_to_the_sources_profile() -> None:
    for name in ("a wide space of gamma 2.2", "a small space of gamma 1.8", "curve of function 4"):
        icc = PROFILES[name]
        image = noise(9, 9, 3) * 0.6 + 0.2
        data = encode.encode(image, PNG, icc=icc, depth=16)
        assert opened(data).info["icc_profile"] == icc
        back = picture.load(data, LIMITS, "x")
        inside = ((back.samples > 0) & (back.samples < 65535)).all(-1)
        assert inside.any()
        assert (back.rgb - image)[torch.from_numpy(inside)].abs().max() < 1e-3


@pytest.mark.parametrize("output", [PNG, JPEG, WEBP, WEBP_LOSSY])
def test_the_profile_is_in_every_format(output: Output) -> None:
    icc = PROFILES["a linear space"]
    assert opened(encode.encode(noise(9, 9, 3), output, icc=icc)).info["icc_profile"] == icc


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(
    "icc",
    [
        None,
        PROFILES["a wide space of gamma 2.2"],
        PROFILES["curve of function 4"],
        table_icc(SMALL, 1.8, back=True),
    ],
    ids=["sRGB", "wide", "small", "tables"],
)
def test_pixels_the_mask_spares_are_the_files_own_bit_for_bit(depth: int, icc: bytes | None) -> None:
    dtype, top = (np.uint8, 255) if depth == 8 else (np.uint16, 65535)
    levels = RNG.integers(0, top + 1, (24, 32, 3)).astype(dtype)
    if depth == 8:
        data = saved(Image.fromarray(levels), **({"icc_profile": icc} if icc else {}))
    else:
        data = png16(levels, *([chunk(b"iCCP", b"x\0\0" + zlib.compress(icc))] if icc else []))
    source = picture.load(data, LIMITS, "x")
    made = canvas.prepare(source, [], LIMITS)
    mask = torch.zeros(24, 32)
    mask[8:16, 8:24] = noise(8, 16)
    result = composite.composite(made.rgb, noise(24, 32, 3, seed=2), mask)
    assert made.samples is not None
    spared = encode.Spared(made.samples, (mask == 0).numpy())
    back = picture.load(
        encode.encode(result, PNG, icc=made.icc, depth=made.depth, spared=spared), LIMITS, "x"
    )
    where = (mask == 0).numpy()
    assert back.samples is not None
    assert back.samples.dtype == dtype
    assert np.array_equal(back.samples[where], levels[where])
    assert (back.samples[~where] != levels[~where]).mean() > 0.9


@pytest.mark.parametrize("compat", [False, True])
def test_what_a_pad_added_and_the_mask_spares_is_the_canvas_grey_in_any_profile(compat: bool) -> None:
    icc = PROFILES["a small space of gamma 1.8"]
    source = picture.load(saved(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), icc_profile=icc), LIMITS, "x")
    made = canvas.prepare(source, [Pad(left=8)], LIMITS, compat=compat)
    spared = encode.Spared(made.samples, np.ones((8, 16), bool))
    plain = encode.encode(made.rgb, PNG, icc=icc, compat=compat)
    assert plain == encode.encode(made.rgb, PNG, icc=icc, spared=spared, compat=compat)


def test_alpha_out_is_the_larger_of_alpha_and_mask() -> None:
    alpha, mask = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.25, 0.25, 0.0]])
    assert encode.alpha_out(alpha, mask).tolist() == [[0.25, 0.5, 1.0]]  # type: ignore[union-attr]
    assert encode.alpha_out(alpha, None) is None
    assert encode.alpha_out(None, mask) is None


def test_transparency_in_a_jpeg_is_refused_and_full_opacity_is_not() -> None:
    with pytest.raises(InputError) as caught:
        encode.check(JPEG, 8, 8, torch.tensor([[1.0, 0.99]]))
    assert caught.value.field == "output.format"
    assert opened(encode.encode(noise(8, 8, 3), JPEG, alpha=torch.ones(8, 8))).mode == "RGB"


def test_sides_a_format_cannot_hold_are_refused() -> None:
    with pytest.raises(InputError, match="webp"):
        encode.check(WEBP, 16_384, 8, None)
    encode.check(PNG, 16_384, 8, None)
    encode.check(JPEG, 16_384, 8, None)


NOTES = {"overpaint": json.dumps({"seed": 1, "prompt": "ein Hut, rot, très chic"}), "long": "x" * 5000}


@pytest.mark.parametrize("width", [1, 2, 9])
def test_sixteen_bits_are_written_whatever_the_picture_lies_like_in_memory(width: int) -> None:
    planes = noise(3, 5, width)  # as it leaves a model: plane by plane
    image = planes.permute(1, 2, 0)
    back = picture.load(encode.encode(image, PNG, depth=16), LIMITS, "x")
    assert np.array_equal(back.samples, encode.quantise(image, 16))


@pytest.mark.parametrize("depth", [8, 16])
def test_notes_are_text_chunks_of_a_png(depth: int) -> None:
    image = opened(encode.encode(noise(8, 8, 3), PNG, text=NOTES, depth=16 if depth == 16 else 8))
    assert {key: image.info[key] for key in NOTES} == NOTES


@pytest.mark.parametrize("output", [JPEG, WEBP, WEBP_LOSSY])
def test_notes_are_a_user_comment_elsewhere(output: Output) -> None:
    image = opened(encode.encode(noise(8, 8, 3), output, text=NOTES))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"ASCII\0\0\0"
    assert json.loads(comment[8:]) == NOTES


def test_notes_too_long_for_a_jpeg_are_left_out() -> None:
    assert not opened(encode.encode(noise(8, 8, 3), JPEG, text={"a": "x" * 70_000})).getexif()


@pytest.mark.parametrize("output", [PNG, JPEG, WEBP])
def test_an_xmp_packet_is_one_in_every_format(output: Output) -> None:
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x:xmpmeta>'
    image = opened(encode.encode(noise(8, 8, 3), output, text={encode.XMP_KEY: packet}))
    held = image.info.get("xmp") or image.info[encode.XMP_KEY]
    assert (held if isinstance(held, str) else held.decode()) == packet


def test_the_sources_exif_does_not_leak_into_the_result() -> None:
    for output in (PNG, JPEG, WEBP):
        assert not opened(encode.encode(noise(8, 8, 3), output)).getexif()
