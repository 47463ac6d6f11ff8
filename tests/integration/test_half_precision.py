"""Half precision against float32: the same jobs on the same device. `docs/engine.md` has the figures."""

import json
import math
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.rendering import DEVICE, INPUTS, PARITY, pixels, render, request

CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(PARITY.glob("cases/*/job.json"))}
LEAST_DB = {"bfloat16": 35}
if DEVICE.type == "cuda":  # a CPU convolves float16 a hundred times slower than float32
    LEAST_DB["float16"] = 50
WIDEST = 256 if DEVICE.type == "cuda" else 64
"""Pixels. A CPU without instructions for bfloat16 takes minutes for a picture of 256."""


@pytest.fixture(scope="module")
def exact(tiny_registry):
    return rendered(tiny_registry, "float32")


@pytest.fixture(scope="module", params=LEAST_DB)
def half(request, tiny_registry):
    """The precision, the pictures of all cases rendered one by one, and of all rendered together."""
    return request.param, rendered(tiny_registry, request.param), together(tiny_registry, request.param)


def rendered(registry, dtype):
    return {name: ended(render(registry, [case(name)], dtype=dtype))[name] for name in CASES}


def together(registry, dtype):
    return ended(render(registry, [case(name) for name in CASES], dtype=dtype))


def case(name):
    return request(name, CASES[name], {path.name: shrunk(path) for path in INPUTS.iterdir()})


def shrunk(path):
    with Image.open(path) as opened:
        shrink = math.ceil(max(opened.size) / WIDEST)
        less = opened.resize((opened.width // shrink, opened.height // shrink))
    file = BytesIO()
    less.save(file, "PNG")
    return file.getvalue()


def ended(ends):
    for done in ends.values():
        assert hasattr(done, "files"), done
    return ends


def decibels(one, other):
    off = (picture(one) - picture(other)).astype(np.float64)
    return math.inf if not off.any() else 10 * math.log10(255**2 / (off**2).mean())


def picture(done):
    return pixels(done.files["image.png"])[..., :3]


@pytest.mark.parametrize("name", CASES)
def test_a_picture_in_half_precision_is_near_the_one_in_float32(name, exact, half, record_property):
    dtype, alone, _ = half
    assert json.loads(alone[name].files["receipt.json"])["device"]["dtype"] == dtype
    psnr = decibels(alone[name], exact[name])
    record_property("psnr", psnr)
    print(f"{name} in {dtype}: {psnr:.1f} dB from float32")
    assert LEAST_DB[dtype] <= psnr < math.inf


@pytest.mark.parametrize("name", CASES)
def test_company_moves_a_picture_no_further_than_half_precision_itself_does(name, half, exact):
    dtype, alone, company = half
    psnr = decibels(alone[name], company[name])
    print(f"{name} in {dtype}: {psnr:.1f} dB from itself in company")
    assert psnr >= LEAST_DB[dtype]
