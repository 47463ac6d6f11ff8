"""Sizes that are told beforehand are those that the engine makes."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overpaint_producer.headers import size_of
from overpaint_shared.errors import InputError
from overpaint_shared.job import Crop, Pad, PrepareOp, Scale, ScaleBy
from overpaint_shared.settings import Limits
from overpaint_shared.sizes import cropped, is_whole, padded, size_after
from overpaint_worker.engine import picture, sizing
from overpaint_worker.engine.geometry import Size, plan

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


def test_what_is_no_picture_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    assert [size_of(tmp_path / name) for name in ("text", "nothing", "s3://bucket/key", ".", "a\0b")] == [
        None
    ] * 5
