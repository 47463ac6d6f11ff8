"""What may be uploaded: pictures only, within limits, told from their header alone."""

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from overpaint_producer.pictures import Seen, check_costs, read_picture
from overpaint_shared.errors import InputError
from overpaint_shared.job import parse_job
from overpaint_shared.setting_views import Limits

LIMITS = Limits()


def saved(path: Path, kind: str, **options: object) -> Path:
    Image.new("RGB", (20, 10), "red").save(path, kind, **options)
    return path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_read_with_its_size(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "picture", kind)
    picture = read_picture(path, LIMITS, "source.image")
    assert (picture.data, picture.size) == (path.read_bytes(), (20, 10))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "TGA"])
def test_a_picture_of_a_kind_that_workers_do_not_read_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="is not a picture"):
        read_picture(saved(tmp_path / "picture", kind), LIMITS, "source.image")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"root:x:0:0:root:/root:/bin/bash\n",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + bytes(20),
        b"%PDF-1.7",
        b"<svg/>",
    ],
    ids=["empty", "passwd", "cut PNG", "GIF", "PDF", "SVG"],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a picture, so it was not uploaded") as caught:
        read_picture(path, LIMITS, "mask.image")
    assert (caught.value.field, caught.value.value) == ("mask.image", str(path))
    assert "root:x" not in str(caught.value)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 10_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    with pytest.raises(InputError, match="pixels; at most 64000000 are allowed"):
        read_picture(path, LIMITS, "source.image")


def test_a_picture_at_the_limit_is_taken(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", "PNG")
    assert read_picture(
        path, Limits(max_pixels=200, max_input_bytes=path.stat().st_size), "source.image"
    ).size
    with pytest.raises(InputError, match="20 x 10 pixels"):
        read_picture(path, Limits(max_pixels=199), "source.image")
    with pytest.raises(InputError, match="bytes; at most"):
        read_picture(path, Limits(max_input_bytes=path.stat().st_size - 1), "source.image")


def test_a_picture_of_many_frames_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    path = tmp_path / "moving.webp"
    path.write_bytes(out.getvalue())
    with pytest.raises(InputError, match="2 or more frames; at most 1 is allowed"):
        read_picture(path, LIMITS, "source.image")
    assert read_picture(path, Limits(max_frames=3), "source.image").size == (4, 4)


def test_a_pipe_a_folder_and_a_missing_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "is no file"),
        (".", "is no file"),
        ("none.png", "No such file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(InputError, match=words):
            read_picture(tmp_path / name, LIMITS, "source.image")


def test_a_jobs_local_pictures_are_counted_together_before_any_is_sent(tmp_path: Path) -> None:
    names = ("a.png", "b.png")
    found = {name: read_picture(saved(tmp_path / name, "PNG"), LIMITS, "image") for name in names}
    seen = {
        name: Seen(f"sha256:{name}", each.size, each.header, len(each.data)) for name, each in found.items()
    }
    spec = parse_job(
        {
            "version": 1, "model": "m", "source": {"image": "a.png"}, "method": {"kind": "latent_noise_mask"},
            "mask": {"from": "image", "image": "b.png"},
        }
    )  # fmt: skip
    length, decoded = len(found["a.png"].data), 20 * 10 * 3
    check_costs(spec, seen, Limits(max_job_bytes=2 * length, max_decoded_bytes=2 * decoded))

    for limits, name in (
        (Limits(max_job_bytes=2 * length - 1), "OVERPAINT_MAX_JOB_BYTES"),
        (Limits(max_decoded_bytes=2 * decoded - 1), "OVERPAINT_MAX_DECODED_BYTES"),
    ):
        with pytest.raises(InputError) as caught:
            check_costs(spec, seen, limits)
        assert caught.value.field == "mask.image"
        assert name in str(caught.value.fix)
