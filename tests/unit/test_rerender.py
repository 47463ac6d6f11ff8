"""A receipt may be anybody's: it is read within the limits of a job's pictures, or refused in words."""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from overpaint_shared.errors import InputError
from overpaint_shared.settings import Limits
from overpaint_worker.rerender import LARGEST_RECEIPT, _threads, compare, find_inputs, in_words, read_receipt

DATA = b"bytes that stand for a picture"


def receipt(**changes: Any) -> dict[str, Any]:
    """A receipt, as far as it is read."""
    spec = {
        "version": 1,
        "model": "m",
        "source": {"image": "photo.png"},
        "method": {"kind": "img2img"},
        "sampling": {"seed": 1},
    }
    inputs = {"photo.png": {"sha256": hashlib.sha256(DATA).hexdigest(), "bytes": len(DATA)}}
    picture = {"name": "image.png", "pixels_sha256": "0" * 64}
    return {"spec": spec, "inputs": inputs, "picture": picture} | changes


def written(folder: Path, whole: object, name: str = "receipt.json") -> Path:
    path = folder / name
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole))
    return path


def grown(path: Path, size: int) -> Path:
    """The file with nothing behind its end, up to `size` bytes."""
    with path.open("ab") as file:
        file.truncate(size)
    return path


def test_the_pictures_are_found_by_their_digest_whatever_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(DATA)
    read = read_receipt(written(tmp_path, receipt()))
    assert find_inputs(read, [tmp_path]) == {"photo.png": DATA}


@pytest.mark.parametrize(
    ("device", "threads"),
    [
        ({"threads": 3}, 3),
        ({"threads": 0}, None),
        ({"threads": "3"}, None),
        ({"threads": 10**9}, None),
        ([], None),
    ],
)
def test_it_is_rendered_with_the_threads_that_the_receipt_names(
    tmp_path: Path, device: object, threads: int | None
) -> None:
    assert _threads(read_receipt(written(tmp_path, receipt(device=device)))) == threads


def test_the_working_folder_is_looked_in_for_the_names_that_the_job_gave_alone(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    read = read_receipt(written(out, receipt()))
    (work / "other.png").write_bytes(DATA)
    with pytest.raises(InputError, match=r"the picture photo\.png .* is not in .*out, .*work") as caught:
        find_inputs(read, [out], named_in=work)
    assert caught.value.fix is not None
    assert "--inputs" in caught.value.fix
    (work / "photo.png").write_bytes(DATA[::-1])
    with pytest.raises(InputError, match="is not in"):
        find_inputs(read, [out], named_in=work)
    (work / "photo.png").write_bytes(DATA)
    assert find_inputs(read, [out], named_in=work) == {"photo.png": DATA}


@pytest.mark.parametrize(
    ("passes", "deterministic", "change", "told"),
    [
        ({"2": 5}, False, 1, "by up to 1 level, as is normal for a job rendered in company"),
        ({"2": 5}, False, 2, "by up to 2 levels"),
        ({"1": 5}, False, 1, "by up to 1 level"),
        ({"2": 5}, True, 1, "by up to 1 level"),
    ],
)
def test_a_level_that_company_costs_is_said_to_be_normal(
    tmp_path: Path, passes: dict[str, int], deterministic: bool, change: int, told: str
) -> None:
    old = receipt(evaluations={"by_company": passes})
    old["spec"]["sampling"]["deterministic"] = deterministic
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "image.png")
    made = BytesIO()
    Image.new("RGB", (2, 2), (9 + change, 9, 9)).save(made, "PNG")
    new = json.dumps(receipt(picture={"name": "image.png", "pixels_sha256": "1" * 64})).encode()
    about = compare(read_receipt(written(tmp_path, old)), {"receipt.json": new, "image.png": made.getvalue()})
    words = in_words(about)
    assert told in words
    assert ("normal" in words) == ("normal" in told)
    assert words.endswith(told) or "normal" in told


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "receipt.json")
    return folder / "receipt.json"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(folder: Path) -> Path:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path = folder / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "longer than any receipt": (
        lambda folder: grown(written(folder, receipt()), LARGEST_RECEIPT + 1),
        "no receipt",
    ),
    "longer than any picture": (
        lambda folder: grown(written(folder, "", "a.png"), Limits().max_input_bytes + 1),
        "at most 67108864 are allowed",
    ),
    "a pipe": (pipe, "is no file"),
    "a PNG of too many pixels": (bomb, "no receipt"),
    "nested deep": (lambda folder: written(folder, "[" * 100_000), "no receipt"),
    "no size of a picture": (
        lambda folder: written(folder, receipt(inputs={"a": {"sha256": "0"}})),
        "no receipt",
    ),
    "no object": (lambda folder: written(folder, "[]"), "no receipt"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_receipt_is_refused_in_words(tmp_path: Path, what: str) -> None:
    make, words = HOSTILE[what]
    with pytest.raises(InputError, match=words) as caught:
        read_receipt(make(tmp_path))
    assert caught.value.field == "receipt"


def test_a_picture_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    size = Limits().max_input_bytes + 1
    grown(tmp_path / "photo.png", size)
    large = {"photo.png": {"sha256": "0" * 64, "bytes": size}}
    with pytest.raises(InputError, match="at most 67108864 are allowed"):
        find_inputs(read_receipt(written(tmp_path, receipt(inputs=large))), [tmp_path])


def test_the_old_picture_is_looked_for_beside_the_receipt_alone_and_within_the_limits(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "secret.png").write_bytes(b"no picture")
    new = {
        "receipt.json": json.dumps(receipt(picture={"name": "image.png", "pixels_sha256": "1" * 64})).encode()
    }
    away = receipt(picture={"name": "../secret.png", "pixels_sha256": "0" * 64})
    read = read_receipt(written(tmp_path / "out", away))
    assert "not_compared" not in compare(read, new | {"image.png": b""})
    grown(tmp_path / "out" / "secret.png", Limits().max_input_bytes + 1)
    assert "at most" in compare(read, new | {"image.png": b""})["not_compared"]
