"""Sizes that are told beforehand are those that the engine makes."""

import io
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overpaint_producer.headers import size_of
from overpaint_shared.errors import InputError, MaskError
from overpaint_shared.job import Crop, Pad, PrepareOp, Scale, ScaleBy, parse_job
from overpaint_shared.settings import Limits
from overpaint_shared.sizes import cropped, is_whole, misfits, padded, size_after
from overpaint_worker.engine import picture, sizing
from overpaint_worker.engine.geometry import Size, plan
from overpaint_worker.engine.preparation import open_pictures

SIDE = st.integers(1, 300)
LENGTH = st.integers(0, 300)
OPS = st.one_of(
    st.builds(Crop, x=LENGTH, y=LENGTH, width=SIDE, height=SIDE),
    st.builds(Scale, width=LENGTH, height=LENGTH, crop=st.sampled_from(["disabled", "center"])),
    st.builds(ScaleBy, factor=st.floats(0.01, 3)),
    st.builds(Pad, left=LENGTH, top=LENGTH, right=LENGTH, bottom=LENGTH),
)


@given(SIDE, SIDE, st.lists(OPS, max_size=4), st.booleans())
@settings(deadline=None, max_examples=300)
def test_the_size_after_operations_is_the_engines(
    width: int, height: int, ops: list[PrepareOp], compat: bool
) -> None:
    try:
        made = plan(Size(width, height), ops, 1 << 40, "prepare", compat=compat).size
    except InputError:
        return
    assert size_after((width, height), ops, compat=compat) == made
    known = size_after(None, ops, compat=compat)
    assert known in {None, made}


FEW = st.sampled_from([8, 12])
NEAR = st.tuples(FEW, FEW)
NEAR_OPS = st.one_of(
    st.builds(Crop, x=st.integers(0, 4), width=FEW, height=FEW),
    st.builds(Scale, width=FEW, height=st.sampled_from([0, 8])),
    st.builds(Pad, left=st.sampled_from([0, 4])),
)
PLACES = st.sampled_from(["source", "canvas"])


def white(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("L", size, 255).save(out, "PNG")
    return out.getvalue()


@given(NEAR, st.tuples(NEAR, NEAR), st.tuples(PLACES, PLACES), st.lists(NEAR_OPS, max_size=2), st.booleans())
@settings(deadline=None, max_examples=200)
def test_a_mask_is_told_to_misfit_exactly_when_the_engine_refuses_it(
    source: tuple[int, int],
    masks: tuple[tuple[int, int], ...],
    places: tuple[str, ...],
    ops: list[PrepareOp],
    compat: bool,
) -> None:
    pictures = {"source.png": source, "a.png": masks[0], "b.png": masks[1]}
    parts = [
        {"from": "image", "image": name, "at": at}
        for name, at in zip(("a.png", "b.png"), places, strict=True)
    ]
    spec = parse_job(
        {
            "version": 1,
            "model": "m",
            "source": {"image": "source.png"},
            "prepare": [op.model_dump(mode="json") for op in ops],
            "mask": {"from": "combine", "how": "union", "masks": parts},
            "method": {"kind": "img2img"},
            "compat": "comfyui" if compat else "none",
        }
    )
    told = [(wrong.message, wrong.path, wrong.given) for wrong in misfits(spec, pictures)]
    refused: list[object] = []
    try:
        open_pictures(spec, {name: white(size) for name, size in pictures.items()}, Limits()).mask()
    except InputError:  # `prepare` does not fit the source: no worker renders this, whatever is told
        return
    except MaskError as error:
        refused = [(error.message, error.field, error.value)]
    assert told[:1] == refused  # a worker stops at the first


def test_a_mask_that_has_the_other_size_is_told_what_to_write() -> None:
    spec = parse_job(
        {
            "version": 1,
            "model": "m",
            "source": {"image": "a"},
            "prepare": [{"op": "scale", "width": 32, "height": 16}],
            "mask": {"from": "image", "image": "b"},
            "method": {"kind": "img2img"},
        }
    )
    [wrong] = misfits(spec, {"a": (64, 48), "b": (32, 16)})
    assert str(wrong) == (
        "mask.image: the mask is 32 x 16 pixels, but the source is 64 x 48. "
        'Did you mean "at": "canvas", whose size it has? Allowed: 64 x 48.'
    )
    assert misfits(spec, {"a": (64, 48), "b": (64, 48)}) == []
    assert misfits(spec, {"a": (64, 48)}) == misfits(spec, {"b": (1, 1)}) == []


@given(SIDE, SIDE)
def test_the_models_size_is_the_engines(width: int, height: int) -> None:
    size = Size(width, height)
    assert padded(size) == sizing.pad_to_multiple(size).model
    if min(size) >= sizing.MULTIPLE:
        assert cropped(size) == sizing.centre_crop(size).model
    assert is_whole(size) == (padded(size) == size)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_pictures_size_is_told_as_the_engine_sees_it(tmp_path: Path, kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    path = tmp_path / "picture"
    Image.new("RGB", (30, 20)).save(path, kind, exif=exif)
    seen = picture.load(path.read_bytes(), Limits(), "source.image")
    assert size_of(path) == (seen.width, seen.height)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return exif.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED_BY = {
    "EXIF": chunk(b"eXIf", exif_turned().removeprefix(b"Exif\0\0")),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "a raw profile": chunk(
        b"tEXt", b"Raw profile type exif\0\nexif\n      26\n" + exif_turned().hex().encode() + b"\n"
    ),
}


@pytest.mark.parametrize("by", TURNED_BY)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before its pixels", "behind its pixels"])
def test_a_png_that_is_turned_by_metadata_is_told_as_the_engine_sees_it(
    tmp_path: Path, by: str, before: bytes
) -> None:
    data = white((30, 20))
    at = data.index(before) - 4
    path = tmp_path / "picture.png"
    path.write_bytes(data[:at] + TURNED_BY[by] + data[at:])
    seen = picture.load(path.read_bytes(), Limits(), "source.image")
    assert size_of(path) == (seen.width, seen.height) == (20, 30)


def test_what_is_no_picture_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    assert [size_of(tmp_path / name) for name in ("text", "nothing", "s3://bucket/key", ".", "a\0b")] == [
        None
    ] * 5
