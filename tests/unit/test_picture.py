"""Files of every awkward kind: read once and right, or refused in words from their header."""

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import Output
from overpaint_shared.settings import Limits
from overpaint_worker.engine import colour, encode, masks, picture
from tests.unit import pictures
from tests.unit.pictures import chunk, png16, saved
from tests.unit.test_colour import PROFILES

DATA = Path(__file__).parents[1] / "data" / "parity"
LIMITS = Limits()
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = RNG.integers(0, 256, (9, 12), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (9, 12, 4), dtype=np.uint16)


def load(data: bytes, **how: bool) -> picture.Picture:
    return picture.load(data, LIMITS, "source.image", **how)


def refused(data: bytes, limits: Limits = LIMITS) -> InputError:
    with pytest.raises(InputError) as caught:
        picture.load(data, limits, "source.image")
    error = caught.value
    assert error.field == "source.image"
    assert error.fix
    json.dumps(error.to_json())
    return error


def same(made: torch.Tensor | None, levels: np.ndarray) -> bool:
    top = 65535 if levels.dtype == np.uint16 else 255
    assert made is not None
    return np.array_equal(made.numpy(), levels.astype(np.float32) / np.float32(top))


def grey3(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=-1)


@pytest.mark.parametrize("name", ["img256.png", "img64.png", "img_odd.png"])
@pytest.mark.parametrize("compat", [False, True])
def test_plain_pictures_are_their_levels_over_255(name: str, compat: bool) -> None:
    data = (DATA / "inputs" / name).read_bytes()
    made = load(data, compat=compat)
    levels = np.asarray(Image.open(io.BytesIO(data)))
    assert same(made.rgb, levels)
    assert np.array_equal(made.samples, levels)
    assert (made.alpha, made.icc, made.depth, made.notes) == (None, None, 8, ())
    assert made.rgb.dtype == torch.float32
    assert made.rgb.is_contiguous()


@pytest.mark.parametrize("compat", [False, True])
def test_alpha_is_kept_apart_and_colour_under_it_stays(compat: bool) -> None:
    data = (DATA / "inputs" / "rgba256.png").read_bytes()
    levels = np.asarray(Image.open(io.BytesIO(data)))
    made = load(data, compat=compat)
    assert same(made.rgb, levels[..., :3])
    assert same(made.alpha, levels[..., 3])
    assert torch.equal(masks.from_alpha(made), 1 - torch.from_numpy(levels[..., 3].astype(np.float32) / 255))


FILES = {
    "grey": (saved(Image.fromarray(GREY)), grey3(GREY), None),
    "grey and alpha": (saved(Image.fromarray(np.dstack([GREY, ALPHA]))), grey3(GREY), ALPHA),
    "one bit": (saved(Image.fromarray(GREY > 99)), grey3((GREY > 99) * np.uint8(255)), None),
    "RGB": (saved(Image.fromarray(RGB)), RGB, None),
    "RGBA": (saved(Image.fromarray(np.dstack([RGB, ALPHA]))), RGB, ALPHA),
    "RGB as lossless WebP": (saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB, None),
    "RGBA as lossless WebP": (
        saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True, exact=True),
        RGB,
        ALPHA,
    ),
    "RGB as TIFF": (saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB, None),
    "grey TIFF": (saved(Image.fromarray(GREY), "TIFF"), grey3(GREY), None),
    "RGB with one transparent colour": (
        saved(Image.fromarray(RGB), transparency=tuple(RGB[4, 5].tolist())),
        RGB,
        np.where((RGB[4, 5] == RGB).all(-1), 0, 255).astype(np.uint8),
    ),
    "grey with one transparent level": (
        saved(Image.fromarray(GREY), transparency=int(GREY[4, 5])),
        grey3(GREY),
        np.where(GREY[4, 5] == GREY, 0, 255).astype(np.uint8),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_eight_bit_files_are_read_to_the_bit(name: str) -> None:
    data, rgb, alpha = FILES[name]
    made = load(data)
    assert made.depth == 8
    assert same(made.rgb, rgb)
    assert (made.alpha is None) == (alpha is None)
    assert alpha is None or same(made.alpha, alpha)


def test_a_jpeg_is_what_pillow_decodes() -> None:
    data = saved(Image.fromarray(RGB), "JPEG", quality=90)
    assert same(load(data).rgb, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_looked_up_with_their_transparency(bits: int, transparent: bool) -> None:
    colours = RNG.integers(0, 256, (2**bits, 3), dtype=np.uint8)
    opacity = RNG.integers(0, 256, 2**bits, dtype=np.uint8)
    indices = RNG.integers(0, 2**bits, (9, 12), dtype=np.uint8)
    image = Image.frombytes("P", (12, 9), indices.tobytes())
    image.putpalette(colours.tobytes())
    options = {"transparency": opacity.tobytes()} if transparent else {}
    for compat in (False, True):
        made = load(saved(image, bits=bits, **options), compat=compat)
        assert same(made.rgb, colours[indices])
        assert (made.alpha is not None) == transparent
        assert not transparent or same(made.alpha, opacity[indices])


def test_the_references_palette_picture_and_mask() -> None:
    with np.load(DATA / "nodes" / "LoadImage_p.npz") as file:
        rgb, mask = np.rint(file["out_0"][0] * 255).astype(np.uint8), file["out_1"][0]
        expected = torch.from_numpy(file["out_0"][0]), torch.from_numpy(file["out_1"][0])
    colours, indices = np.unique(np.dstack([rgb, mask]).reshape(-1, 4), axis=0, return_inverse=True)
    image = Image.frombytes("P", (12, 9), indices.astype(np.uint8).tobytes())
    image.putpalette(colours[:, :3].astype(np.uint8).tobytes())
    opacity = bytes(255 * (1 - colours[:, 3]).astype(np.uint8))
    made = load(saved(image, transparency=opacity), compat=True)
    assert torch.equal(made.rgb, expected[0])
    assert torch.equal(masks.load_image_mask(made), expected[1])


def test_the_references_sixteen_bit_grey_saturates_under_compat_only() -> None:
    with np.load(DATA / "nodes" / "LoadImage_i16.npz") as file:
        expected = torch.from_numpy(file["out_0"][0]), torch.from_numpy(file["out_1"][0])
    levels = DEEP[..., :1] | 256
    data = png16(levels)
    made = load(data, compat=True)
    assert torch.equal(made.rgb, expected[0])
    assert torch.equal(masks.load_image_mask(made), expected[1])
    assert made.depth == 8
    assert same(load(data).rgb, np.repeat(levels, 3, axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [False, True])
def test_sixteen_bit_pngs_keep_every_bit(channels: int, filters: bool) -> None:
    levels = DEEP[..., :channels]
    made = load(png16(levels, filters=filters))
    rgb = np.repeat(levels[..., :1], 3, axis=-1) if channels < 3 else levels[..., :3]
    assert made.depth == 16
    assert same(made.rgb, rgb)
    assert np.array_equal(made.samples, rgb)
    assert channels in {1, 3} or same(made.alpha, levels[..., -1])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_pngs_with_one_transparent_colour(channels: int) -> None:
    levels = DEEP[..., :channels]
    key = levels[2, 3]
    made = load(png16(levels, chunk(b"tRNS", key.astype(">u2").tobytes())))
    expected = np.where((levels == key).all(-1), 0, 65535).astype(np.uint16)
    assert same(made.alpha, expected)


def test_sixteen_bit_colour_is_eight_bits_under_compat() -> None:
    made = load(png16(DEEP[..., :3]), compat=True)
    assert same(made.rgb, (DEEP[..., :3] >> 8).astype(np.uint8))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("compat", [False, True])
def test_every_exif_orientation_is_applied_once(turn: int, kind: str, compat: bool) -> None:
    exif = Image.Exif()
    exif[274] = turn
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(RGB), kind, exif=exif, **options)
    with Image.open(io.BytesIO(saved(Image.fromarray(RGB), kind, **options))) as plain:
        plain.getexif()[274] = turn
        expected = np.asarray(ImageOps.exif_transpose(plain))
    made = load(data, compat=compat)
    assert (made.width, made.height) == ((9, 12) if turn > 4 else (12, 9))
    assert same(made.rgb, expected)
    assert np.array_equal(made.samples, expected)


def test_a_meaningless_orientation_is_noted_and_taken_as_upright() -> None:
    exif = Image.Exif()
    exif[274] = 77
    made = load(saved(Image.fromarray(RGB), exif=exif))
    assert same(made.rgb, RGB)
    assert "77" in made.notes[0]


def test_profiles_lead_to_srgb_and_are_kept() -> None:
    icc = PROFILES["a wide space of gamma 2.2"]
    data = saved(Image.fromarray(RGB), icc_profile=icc)
    made = load(data)
    assert made.icc == icc
    assert np.array_equal(made.samples, RGB)
    assert not same(made.rgb, RGB)
    plain = load(data, compat=True)
    assert same(plain.rgb, RGB)
    assert plain.icc is None


GREY_ICC = pictures.icc({b"kTRC": pictures.gamma_curve(1.8)}, space=b"GRAY")
SPACES = {
    "curves and a matrix": PROFILES["a wide space of gamma 2.2"],
    "tables": pictures.table_icc(pictures.SMALL, 1.8, back=True),
    "grey": GREY_ICC,
}


@pytest.mark.parametrize("kind", SPACES)
def test_what_is_converted_in_bands_has_the_bits_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(colour, "BAND_PIXELS", 70)  # two rows and a bit
    space = colour.read(SPACES[kind])
    levels = RNG.integers(0, 256, (37, 33, space.channels), dtype=np.uint8)
    unit = levels.astype(np.float32) / np.float32(255)
    made = load(saved(Image.fromarray(levels.squeeze()), icc_profile=SPACES[kind]))
    assert np.array_equal(made.rgb.numpy(), space.to_srgb(unit))
    if space.returns:
        there = encode.in_space(made.rgb, SPACES[kind])
        assert np.array_equal(there.numpy(), space.from_srgb(made.rgb.numpy()))


def test_a_conversion_takes_little_memory_beside_the_picture() -> None:
    levels = np.broadcast_to(RGB[:1, :1], (2048, 2048, 3))
    stored = picture.Stored(levels, colour.read(PROFILES["a wide space of gamma 2.2"]))
    tracemalloc.start()
    try:
        there = stored.colours()
        encode.in_space(there, PROFILES["a wide space of gamma 2.2"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / 2048**2 < 2 * 12 + 10  # two pictures in float32, and a band of 2**18 pixels on its way


def test_sixteen_bits_stay_sixteen_through_a_profile() -> None:
    icc = PROFILES["a small space of gamma 1.8"]
    ramp = np.linspace(20000, 20255, 256).astype(np.uint16)[None, :, None].repeat(3, axis=-1)
    made = load(png16(ramp, chunk(b"iCCP", b"x\0\0" + zlib.compress(icc))))
    assert len(np.unique(made.rgb[..., 0].numpy())) > 250


def test_a_profile_that_does_not_fit_is_ignored_with_a_note() -> None:
    for image, icc in ((RGB, b"rubbish" * 40), (RGB, GREY_ICC), (GREY, PROFILES["a linear space"])):
        made = load(saved(Image.fromarray(image), icc_profile=icc))
        assert "profile was ignored" in made.notes[0]
        assert made.icc is None
        assert same(made.rgb, image if image.ndim == 3 else grey3(image))


@pytest.mark.parametrize("more", [0, 1])
def test_a_profile_is_kept_up_to_the_size_at_which_the_result_can_be_read(more: int) -> None:
    profile = PROFILES["a wide space of gamma 2.2"]
    icc = profile + RNG.bytes(2**20 + more - len(profile))
    made = load(saved(Image.fromarray(RGB), "TIFF", icc_profile=icc))
    assert made.icc == (None if more else icc)
    assert ["profile was ignored" in note for note in made.notes] == [True] * more
    result = picture.read_back(encode.encode(made.rgb, Output(), made.icc))
    assert result.samples.shape == RGB.shape


def test_a_grey_profile_is_left_for_srgb() -> None:
    grey = pictures.icc({b"kTRC": pictures.gamma_curve(1.0)}, space=b"GRAY")
    for image in (GREY, np.dstack([GREY, ALPHA])):
        made = load(saved(Image.fromarray(image), icc_profile=grey))
        linear = GREY[0, 0] / 255
        expected = 12.92 * linear if linear < 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
        assert made.rgb[0, 0, 1].item() == pytest.approx(expected, abs=1e-4)
        assert (made.icc, made.samples) == (None, None)


WIDE, TALL = Limits(max_pixels=107), Limits(max_pixels=108)


def test_pixels_are_counted_before_decoding() -> None:
    data = saved(Image.fromarray(RGB))
    assert load(data)
    assert picture.load(data, TALL, "source.image")
    assert "12 x 9" in refused(data, WIDE).message


def bomb(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (1, 66_000), (66_000, 1)]
)
def test_a_header_that_promises_an_absurd_size_is_believed_and_refused(width: int, height: int) -> None:
    assert f"{width} x {height}" in refused(bomb(width, height)).message


def test_bytes_are_counted_first() -> None:
    data = saved(Image.fromarray(RGB))
    error = refused(data, Limits(max_input_bytes=len(data) - 1))
    assert error.value == len(data)
    assert str(len(data) - 1) in str(error.fix)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_frames_are_counted(kind: str) -> None:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB), Image.fromarray(RGB)]
    data = saved(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert refused(data).value == 2  # or more: nobody needs to know how many
    made = picture.load(data, Limits(max_frames=3), "source.image")
    assert same(made.rgb, RGB)


def test_a_phones_several_pictures_in_one_jpeg_are_the_first() -> None:
    first = Image.fromarray(np.full((9, 12, 3), 200, np.uint8))
    data = saved(first, "MPO", save_all=True, append_images=[Image.fromarray(RGB)])
    assert load(data).rgb.mean().item() == pytest.approx(200 / 255, abs=0.01)


TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 5_000_000))
NO_PICTURES = {
    "nothing": b"",
    "text": b"hello, I am a picture",
    "a PDF": b"%PDF-1.7\n" + b"0" * 100,
    "a GIF, which is not read here": saved(Image.fromarray(GREY), "GIF"),
    "a BMP, which is not read here": saved(Image.fromarray(RGB), "BMP"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a pickle": b"\x80\x04K\x01.",
    "only a signature": b"\x89PNG\r\n\x1a\n",
    "a bomb of text": png16(DEEP, TEXT_BOMB),
    "a bomb of a profile": png16(DEEP, chunk(b"iCCP", b"x\0\0" + zlib.compress(b"a" * 5_000_000))),
    "CMYK": saved(Image.fromarray(np.dstack([RGB, ALPHA]), "RGBA").convert("RGB").convert("CMYK"), "JPEG"),
    "Lab": saved(Image.frombytes("LAB", (12, 9), RGB.tobytes()), "TIFF"),
    "floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "32-bit integers": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_usable_picture_is_refused_in_words(name: str) -> None:
    assert refused(NO_PICTURES[name]).message


@pytest.mark.parametrize("name", ["a bomb of text", "a bomb of a profile"])
def test_a_bomb_is_not_called_a_damaged_file(name: str) -> None:
    error = refused(NO_PICTURES[name])
    assert "more than 1 MB" in error.message
    assert "metadata" in (error.fix or "")


def test_thirty_two_bit_integers_follow_the_reference_under_compat() -> None:
    levels = np.arange(108, dtype=np.int32).reshape(9, 12) * 700
    made = load(saved(Image.fromarray(levels), "TIFF"), compat=True)
    assert same(made.rgb, grey3(np.clip(levels / 255, 0, 255).astype(np.uint8)))


def test_a_deep_colour_tiff_is_refused_rather_than_cut_to_eight_bits() -> None:
    entries = [
        (256, 12),
        (257, 9),
        (258, 16),
        (259, 1),
        (262, 2),
        (273, 0),
        (277, 3),
        (278, 9),
        (279, 9 * 12 * 6),
    ]
    start = 8 + 2 + 12 * len(entries) + 4
    ifd = struct.pack("<H", len(entries))
    for tag, value in entries:
        if tag == 258:
            ifd += struct.pack("<HHII", tag, 3, 3, start)
        else:
            ifd += struct.pack("<HHII", tag, 4, 1, start + 6 if tag == 273 else value)
    body = struct.pack("<3H", 16, 16, 16) + DEEP[..., :3].astype("<u2").tobytes()
    assert "more than 8 bits" in refused(b"II*\0" + struct.pack("<I", 8) + ifd + b"\0" * 4 + body).message


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_deep_grey_tiff_keeps_every_bit_in_either_byte_order(order: str) -> None:
    entries = [
        (256, 12),
        (257, 9),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 0),
        (277, 1),
        (278, 9),
        (279, 9 * 12 * 2),
    ]
    start = 8 + 2 + 12 * len(entries) + 4
    ifd = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        ifd += struct.pack(order + "HHII", tag, 4, 1, start if tag == 273 else value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    made = load(head + ifd + b"\0" * 4 + DEEP[..., 0].astype(order + "u2").tobytes())
    assert made.depth == 16
    assert same(made.rgb, grey3(DEEP[..., 0]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_file_cut_short_is_refused(kind: str, share: float) -> None:
    data = saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    refused(data[: int(len(data) * share)])


def test_sixteen_bit_files_cut_short_are_refused() -> None:
    data = png16(RNG.integers(0, 65536, (64, 64, 3), dtype=np.uint16))
    refused(data[: len(data) // 2])


SEEDS = [
    saved(Image.fromarray(RGB), "JPEG", icc_profile=PROFILES["a linear space"]),
    saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG", icc_profile=PROFILES["curve of function 4"]),
    saved(Image.fromarray(RGB), "WEBP"),
    saved(Image.fromarray(RGB), "TIFF", compression="tiff_deflate"),
    png16(DEEP, chunk(b"iCCP", b"x\0\0" + zlib.compress(PROFILES["a linear space"]))),
]


@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8),
)
@settings(deadline=None, max_examples=400)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_and_nothing_else(
    seed: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    try:
        made = load(bytes(data))
    except InputError:
        return
    assert torch.isfinite(made.rgb).all()
    assert made.rgb.min() >= 0
    assert made.rgb.max() <= 1


def channel(data: bytes, name: picture.Channel, **how: bool) -> torch.Tensor:
    return picture.load_mask(data, LIMITS, "mask.image", name, **how)


@pytest.mark.parametrize("compat", [False, True])
def test_mask_channels(compat: bool) -> None:
    data = saved(Image.fromarray(np.dstack([RGB, ALPHA])))
    for index, name in enumerate(("red", "green", "blue")):
        assert same(channel(data, name, compat=compat), RGB[..., index])
    assert torch.equal(
        channel(data, "alpha", compat=compat), 1 - torch.from_numpy(ALPHA.astype(np.float32) / 255)
    )


def test_a_grey_mask_is_any_of_its_colours_and_soft_values_stay() -> None:
    data = (DATA / "inputs" / "mask256_soft.png").read_bytes()
    levels = np.asarray(Image.open(io.BytesIO(data)))
    assert same(channel(data, "red"), levels)
    assert same(channel(data, "blue"), levels)
    assert len(np.unique(levels)) > 2


def test_a_mask_is_read_as_stored_whatever_its_profile() -> None:
    data = saved(Image.fromarray(RGB), icc_profile=PROFILES["a wide space of gamma 2.2"])
    assert same(channel(data, "green"), RGB[..., 1])


def test_a_sixteen_bit_mask_keeps_its_steps() -> None:
    assert same(channel(png16(DEEP[..., :1]), "red"), DEEP[..., 0])


def test_a_mask_without_alpha_is_refused_or_empty_under_compat() -> None:
    data = saved(Image.fromarray(RGB))
    with pytest.raises(MaskError) as caught:
        channel(data, "alpha")
    assert caught.value.field == "mask.image"
    assert torch.equal(channel(data, "alpha", compat=True), torch.zeros(9, 12))


def test_a_transparent_colour_counts_for_a_mask_but_not_for_a_source_under_compat() -> None:
    data, _, alpha = FILES["RGB with one transparent colour"]
    assert alpha is not None
    assert load(data, compat=True).alpha is None
    assert torch.equal(
        channel(data, "alpha", compat=True), 1 - torch.from_numpy(alpha.astype(np.float32) / 255)
    )
