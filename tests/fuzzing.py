"""Kinds of input that strangers write, mutated by a seed, each of which gives a result or a typed error.

A case is a kind and a number: its bytes are made anew from them. `bench/fuzz` runs many, in a process that
may be killed; the suite runs a few.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image, ImageCms

from overpaint_producer.pictures import sniff
from overpaint_producer.workflow.conversion import convert
from overpaint_shared.catalogue import Catalogue, check
from overpaint_shared.errors import OverpaintError
from overpaint_shared.job import parse_job
from overpaint_shared.lint import lint
from overpaint_shared.settings import Limits
from overpaint_worker import messages
from overpaint_worker.engine import colour, picture
from overpaint_worker.engine.families.prompt import Marks, blocks
from overpaint_worker.registry import Registry
from overpaint_worker.rerender import read_receipt
from tests import hostile_pictures
from tests.hostile import NUMBERS, STRINGS, spoiled
from tests.unit.pictures import png16
from tests.unit.spec_strategies import specs

DATA = Path(__file__).parent / "data"
SPECS = 60
LONGEST_WORDS = 20_000
LIMITS = Limits(max_input_bytes=2**20, max_pixels=2_000_000)
MARKS = Marks(start=-1, end=-2, pad=-3)


@dataclass(frozen=True)
class Kind:
    """One kind of input: how a case is made, and what reads it."""

    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]
    """Raises OverpaintError for what is refused, and nothing else."""


# ------------------------------------------------------------------------------------------------ mutation


def mutated(data: bytes, random: Random) -> bytes:
    """One to four changes of bytes: flips, cuts, doubled and swapped parts, lies about sizes."""
    out = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        if out:
            random.choice(_CHANGES)(out, random)
    return bytes(out)


def _flip(out: bytearray, random: Random) -> None:
    for _ in range(random.choice([1, 1, 3, 20])):
        out[_place(out, random)] ^= 1 << random.randrange(8)


def _set(out: bytearray, random: Random) -> None:
    out[_place(out, random)] = random.choice([0, 1, 0x7F, 0x80, 0xFF])


def _place(out: bytearray, random: Random) -> int:
    """Mostly near the start, where headers are."""
    return random.randrange(min(len(out), random.choice([32, 128, 1024, len(out)])))


def _cut(out: bytearray, random: Random) -> None:
    del out[random.randrange(len(out)) :]


def _drop(out: bytearray, random: Random) -> None:
    at = random.randrange(len(out))
    del out[at : at + random.randrange(1, 64)]


def _double(out: bytearray, random: Random) -> None:
    at, length = random.randrange(len(out)), random.choice([1, 12, 100, 1000])
    part = out[at : at + length] * random.choice([1, 2, 50])
    out[at:at] = part[: 2**18]


def _lie(out: bytearray, random: Random) -> None:
    if len(out) >= 4:
        value = random.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, len(out), random.randrange(2**32)])
        at = min(_place(out, random), len(out) - 4)
        out[at : at + 4] = struct.pack(random.choice([">I", "<I"]), value)


def _noise(out: bytearray, random: Random) -> None:
    at = random.randrange(len(out))
    out[at : at + 16] = random.randbytes(16)


_CHANGES = [_flip, _flip, _set, _cut, _drop, _double, _lie, _lie, _noise]

# ------------------------------------------------------------------------------------------------ pictures


@cache
def pictures() -> tuple[bytes, ...]:
    """A picture of each accepted format and mode, with profiles and EXIF, and small costly ones."""
    rgba = np.random.default_rng(1).integers(0, 256, (24, 33, 4), np.uint8)
    deep = np.random.default_rng(2).integers(0, 65536, (9, 7, 4), np.uint16)
    image = Image.fromarray(rgba)
    exif = Image.Exif()
    exif[274] = 6
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    costly = hostile_pictures
    made = [png16(deep), png16(deep[..., :1]), costly.webp_frames(3), costly.tiff(chain=5),
            costly.jpeg_scans(5), costly.jpeg_exif(2)]  # fmt: skip
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "PNG", {"icc_profile": icc, "exif": exif}), ("RGBA", "PNG", {}), ("P", "PNG", {}),
        ("1", "PNG", {}), ("LA", "PNG", {}), ("RGB", "JPEG", {"icc_profile": icc, "exif": exif}),
        ("L", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"progressive": True}), ("CMYK", "JPEG", {}), ("RGB", "WEBP", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True, "icc_profile": icc}), ("RGB", "TIFF", {"exif": exif}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}), ("L", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("RGB", "TIFF", {"compression": "jpeg"}), ("1", "TIFF", {"compression": "group4"}),
        ("I;16", "TIFF", {}), ("RGB", "TIFF", {"big_tiff": True}),
    ]  # fmt: skip
    for mode, kind, options in ways:
        out = io.BytesIO()
        image.convert(mode).save(out, kind, **options)
        made.append(out.getvalue())
    for kind in ("PNG", "WEBP", "TIFF"):
        out = io.BytesIO()
        image.save(out, kind, save_all=True, append_images=[image.rotate(90)])
        made.append(out.getvalue())
    return tuple(made)


def make_picture(random: Random) -> bytes:
    data = random.choice(pictures())
    if random.random() < 0.1:
        return random.choice(pictures())[: random.randrange(4, 40)] + data[random.randrange(4, 40) :]
    made = mutated(data, random)
    return _mended(made) if random.random() < 0.5 else made


def _mended(data: bytes) -> bytes:
    """A PNG with right checksums again, so that what is wrong in its chunks is reached."""
    if not data.startswith(hostile_pictures.SIGNATURE):
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = min(int.from_bytes(data[at : at + 4]), len(data) - at - 12)
        body = data[at + 4 : at + 8 + length]
        out += struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out + data[at:])


def read_picture(data: bytes) -> object:
    """As a client looks at it, and as a worker decodes it; what is decoded has the size that was promised."""
    promised = None
    with suppress(OverpaintError):
        header, promised = sniff(data, LIMITS, "image", "image")
        assert header.frames == 1, header
        assert header.width * header.height <= LIMITS.max_pixels, header
    for compat in (True, False):
        with suppress(OverpaintError):
            picture.load_mask(data, LIMITS, "image", "alpha", compat=compat)
    picture_ = picture.load(data, LIMITS, "image")
    assert promised is None or sorted(promised) == sorted((picture_.width, picture_.height)), promised
    return picture_


def make_profile(random: Random) -> bytes:
    names = ["sRGB", "LAB", "XYZ"]
    real = [ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes() for name in names]
    return mutated(random.choice([*real, (DATA / "odd_profile.icc").read_bytes()]), random)


def read_profile(data: bytes) -> object:
    """A profile is read, or it is a ProfileError, which becomes a note."""
    values = np.zeros((2, 2, 3), np.float32)
    with suppress(colour.ProfileError):
        profile = colour.read.__wrapped__(data)
        seen = profile.to_srgb(values[..., : profile.channels])
        if profile.returns:
            profile.from_srgb(seen)
    return None


# ---------------------------------------------------------------------------------------------------- jobs


@cache
def some_specs() -> tuple[dict[str, Any], ...]:
    """Specs of all kinds, drawn from the schema."""
    found: list[dict[str, Any]] = []

    @settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate], max_examples=SPECS,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(specs())
    def draw(spec: dict[str, Any]) -> None:
        found.append(spec)

    draw()
    return tuple(found)


def make_job(random: Random) -> bytes:
    made = spoiled(random.choice(some_specs()), random.randrange(2**32))
    if isinstance(made, dict):
        try:
            made = json.dumps(made)
        except (ValueError, RecursionError):
            made = "{}"
    data = made.encode(errors="surrogatepass") if isinstance(made, str) else made
    return mutated(data, random) if random.random() < 0.2 else data


def read_job(data: bytes) -> object:
    spec = parse_job(data, where="fuzz.json")
    assert parse_job(spec.to_json()) == spec
    for warning in (*check(spec, Catalogue(), Limits(), where="fuzz.json"), *lint(spec)):
        assert not any(map(moves_the_terminal, str(warning))), ascii(str(warning))
    return spec


def make_prompt(random: Random) -> bytes:
    alphabet = random.choice(["()", "(a:1.)", "ab (),:1.5e-\\", "\\()", "( \n\t:9)", "é(\u202e\u0661:)"])
    length = random.choice([3, 30, 300, 20_000])
    part = "".join(random.choice(alphabet) for _ in range(min(length, 400)))
    return (part * (length // len(part) + 1))[:length].encode()


def read_prompt(data: bytes) -> object:
    return blocks(data.decode(errors="replace"), lambda text: [1] * len(text.split()), MARKS)


def make_item(random: Random) -> bytes:
    item: Any = {
        "body": "W1siam9iIl0sIHt9LCB7fV0=", "properties": {"priority": 5, "delivery_tag": "x"},
        "headers": {"op_ts": 1.5, "id": "job", "argsrepr": "title"},
    }  # fmt: skip
    return _spoiled_json(item, random)


def read_item(data: bytes) -> object:
    """A worker refuses it by an error of any kind but those that end a process."""
    try:
        return json.dumps(messages.rebuilt(messages.parsed(data), "m.a"))
    except MemoryError:
        raise
    except Exception:
        return None


def make_workflow(random: Random) -> bytes:
    names = sorted((DATA / "workflows").glob("*.json"))
    return _spoiled_json(json.loads(random.choice(names).read_bytes()), random)


def read_workflow(data: bytes) -> object:
    return convert(data, where="fuzz.json")


def make_receipt(random: Random) -> bytes:
    receipt = {
        "version": 1, "spec": random.choice(some_specs()),
        "inputs": {"a.png": {"sha256": "a" * 64, "bytes": 9}},
        "picture": {"name": "image.png", "pixels_sha256": "b" * 64}, "versions": {}, "device": {},
    }  # fmt: skip
    data = _spoiled_json(receipt, random)
    if random.random() < 0.7:
        return data
    text = hostile_pictures.png_chunk(b"tEXt", b"overpaint-receipt\0" + data)
    return mutated(hostile_pictures.png(text), random)


def _as_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            return read(path)

    return run


def make_registry(random: Random) -> bytes:
    text = (
        '[models.sd15]\nfamily = "sd"\npath = "/models/sd15"\nsha256 = "%s"\n'
        'defaults = { steps = 20, cfg = 7.0, sampler = "dpmpp_2m", size = 512 }\n'
        '[loras.ink]\npath = "/models/ink.safetensors"\n[segmenters.c]\npath = "../c"\n' % ("a" * 64)
    )
    for _ in range(random.randrange(1, 4)):
        text = re.sub(
            random.choice(['"[^"]*"', r"\d+", r"\b\w+ =", r"\[.*"]), lambda _: _toml(random), text, count=1
        )
    return (
        mutated(text.encode(errors="replace"), random)
        if random.random() < 0.5
        else text.encode(errors="replace")
    )


def _toml(random: Random) -> str:
    return str(random.choice([*NUMBERS, *(json.dumps(each) for each in STRINGS), "[", "a.b =", "[models.x]"]))


def _spoiled_json(value: Any, random: Random) -> bytes:
    made = spoiled({"value": value}, random.randrange(2**32))
    if isinstance(made, dict):
        made = made.get("value", value)
        with suppress(ValueError, RecursionError):
            made = json.dumps(made)
    if isinstance(made, str):
        made = made.removeprefix('{"value": ').removesuffix("}").encode(errors="surrogatepass")
    data = made if isinstance(made, bytes) else json.dumps(value).encode()
    return mutated(data, random) if random.random() < 0.3 else data


KINDS: Mapping[str, Kind] = {
    "picture": Kind(make_picture, read_picture),
    "profile": Kind(make_profile, read_profile),
    "job": Kind(make_job, read_job),
    "prompt": Kind(make_prompt, read_prompt),
    "item": Kind(make_item, read_item),
    "workflow": Kind(make_workflow, read_workflow),
    "receipt": Kind(make_receipt, _as_file("receipt.json", read_receipt)),
    "registry": Kind(make_registry, _as_file("models.toml", Registry.load)),
}


def moves_the_terminal(char: str) -> bool:
    """Whether a sign controls a terminal, or turns the direction of writing."""
    turns = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    strange = unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs") and char != "\n"
    return strange or unicodedata.bidirectional(char) in turns


def case(kind: str, seed: int, number: int) -> bytes:
    """The bytes of a case."""
    return KINDS[kind].make(Random(f"{seed} {kind} {number}"))


def run(kind: str, data: bytes) -> str:
    """Read a case: "fine" or "refused". Raises what must never be raised, AssertionError too."""
    try:
        KINDS[kind].read(data)
    except OverpaintError as error:
        refusal = error
    else:
        return "fine"
    words = str(refusal)
    assert not any(map(moves_the_terminal, words)), ascii(words)
    assert len(words) < LONGEST_WORDS
    json.dumps(refusal.to_json(), allow_nan=False).encode()
    return "refused"
