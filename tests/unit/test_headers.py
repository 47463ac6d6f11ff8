"""What a picture file promises is told from its structure, in bounded work, before anything is decoded."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from overpaint_producer.headers import size_of
from overpaint_producer.pictures import read_picture
from overpaint_shared.errors import InputError, OverpaintError, PictureTooCostly
from overpaint_shared.headers import Header, look
from overpaint_shared.setting_views import Limits
from overpaint_worker.engine import picture
from tests import hostile_pictures
from tests.hostile_pictures import COSTLY
from tests.unit.pictures import png16, saved

RGBA = np.random.default_rng(1).integers(0, 256, (10, 20, 4), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (10, 20, 4), np.uint16)
QUICK_S = 0.5
"""Of this thread's own time; what is refused takes milliseconds, reading it would take seconds."""


def made(mode: str, kind: str, **options: Any) -> bytes:
    return saved(Image.fromarray(RGBA).convert(mode), kind, **options)


def moving(kind: str, count: int = 3) -> bytes:
    frames = [Image.fromarray(np.roll(RGBA, n, 0)) for n in range(count)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (made("RGB", "PNG"), Header(format="PNG", width=20, height=10)),
        (made("RGBA", "PNG"), Header(format="PNG", width=20, height=10, channels=4)),
        (made("L", "PNG"), Header(format="PNG", width=20, height=10, channels=1)),
        (made("LA", "PNG"), Header(format="PNG", width=20, height=10, channels=2)),
        (made("1", "PNG"), Header(format="PNG", width=20, height=10, channels=1)),
        (made("P", "PNG"), Header(format="PNG", width=20, height=10, channels=4)),
        (png16(DEEP), Header(format="PNG", width=20, height=10, channels=4, depth=16)),
        (moving("PNG"), Header(format="PNG", width=20, height=10, channels=4, frames=2)),
        (made("RGB", "JPEG"), Header(format="JPEG", width=20, height=10)),
        (made("L", "JPEG"), Header(format="JPEG", width=20, height=10, channels=1)),
        (made("CMYK", "JPEG"), Header(format="JPEG", width=20, height=10, channels=4)),
        (made("RGB", "JPEG", progressive=True), Header(format="JPEG", width=20, height=10)),
        (made("RGB", "JPEG", exif=b"Exif\0\0" + bytes(60_000)), Header(format="JPEG", width=20, height=10)),
        (made("RGB", "WEBP"), Header(format="WEBP", width=20, height=10)),
        (made("RGBA", "WEBP"), Header(format="WEBP", width=20, height=10, channels=4)),
        (made("RGBA", "WEBP", lossless=True), Header(format="WEBP", width=20, height=10, channels=4)),
        (made("RGB", "WEBP", exif=b"Exif\0\0"), Header(format="WEBP", width=20, height=10)),
        (moving("WEBP"), Header(format="WEBP", width=20, height=10, channels=4, frames=2)),
        (made("RGB", "TIFF"), Header(format="TIFF", width=20, height=10)),
        (made("RGB", "TIFF", compression="tiff_lzw"), Header(format="TIFF", width=20, height=10)),
        (made("RGBA", "TIFF", big_tiff=True), Header(format="TIFF", width=20, height=10, channels=4)),
        (made("1", "TIFF"), Header(format="TIFF", width=20, height=10, channels=1)),
        (made("I;16", "TIFF"), Header(format="TIFF", width=20, height=10, channels=1, depth=16)),
        (moving("TIFF"), Header(format="TIFF", width=20, height=10, channels=4, frames=2)),
        (made("RGB", "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))]),
         Header(format="JPEG", width=20, height=10)),
    ],
)  # fmt: skip
def test_a_header_says_what_pillow_will_say(data: bytes, expected: Header) -> None:
    assert look(data, "image") == expected
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (expected.width, expected.height)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_frames_are_counted_as_far_as_anybody_asks(kind: str) -> None:
    found = [look(moving(kind, 5), "image", max_frames=most) for most in (1, 3, 5, 9)]

    assert [header and header.frames for header in found] == [2, 4, 5, 5]


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a" + bytes(30), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"RIFF\0\0\0\0WEBP",
     b"\xff\xd8\xff\xd9", b"MM\0*\xff\xff\xff\xff",
     b"II+\0\x08\0\0\0" + b"\xff" * 8],
)  # fmt: skip
def test_what_is_no_picture_or_has_no_size_has_no_header(data: bytes) -> None:
    assert look(data, "image") is None


@pytest.mark.parametrize("what", COSTLY)
def test_what_costs_more_than_its_pixels_is_refused_unread_by_client_and_worker(
    tmp_path: Path, what: str
) -> None:
    path, data = tmp_path / "picture", COSTLY[what]()
    path.write_bytes(data)
    assert len(data) < 7_000_000

    def refused(read: Any, *given: Any) -> OverpaintError:
        began = time.thread_time()
        with pytest.raises(InputError) as caught:
            read(*given)
        assert time.thread_time() - began < QUICK_S
        return caught.value

    for error in (
        refused(read_picture, path, Limits(), "source.image"),
        refused(picture.load, data, Limits(), "source.image"),
        refused(picture.load_mask, data, Limits(), "source.image", "red"),
    ):
        assert error.field == "source.image"
        assert error.fix
        assert isinstance(error, PictureTooCostly) == (
            not what.startswith(("frames", "directories", "pixels"))
        )


@pytest.mark.parametrize("what", COSTLY)
def test_validating_a_job_does_not_read_such_a_picture_either(tmp_path: Path, what: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(COSTLY[what]())
    began = time.thread_time()
    size_of(path)

    assert time.thread_time() - began < QUICK_S


def test_many_directories_are_walked_once_where_an_operator_allows_as_many_frames() -> None:
    began = time.thread_time()
    header = look(hostile_pictures.tiff(chain=40_000), "image", max_frames=100_000)

    assert header is not None
    assert header.frames == 40_001
    assert time.thread_time() - began < QUICK_S


def test_directories_that_form_a_ring_are_counted_once() -> None:
    data = bytearray(hostile_pictures.tiff(chain=1))
    data[-4:] = data[4:8]  # the last leads to the first

    header = look(bytes(data), "image", max_frames=9)
    assert header is not None
    assert header.frames == 2


def test_scans_and_trailers_of_real_pictures_are_fine() -> None:
    progressive = made("RGB", "JPEG", progressive=True, quality=95)
    film = progressive + b"\xff\xda\0\2" * 5000  # what phones write behind the picture

    assert picture.load(film, Limits(), "image").rgb.shape == (10, 20, 3)
