"""What a file says of itself."""

import io
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_shared.job import Output
from overpaint_worker.engine import encode, provenance

TERM = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
SCHEME = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NOISE = torch.rand(12, 10, 3, generator=torch.Generator().manual_seed(0))


def png(**how):
    return encode.encode(NOISE, Output(), **how)


@pytest.mark.parametrize("fmt", ["png", "webp", "jpeg"])
def test_every_format_carries_the_iptc_mark(fmt: str) -> None:
    packet = provenance.xmp_packet("compositeWithTrainedAlgorithmicMedia")
    data = encode.encode(NOISE, Output(format=fmt), text={encode.XMP_KEY: packet})
    with Image.open(io.BytesIO(data)) as image:
        found = image.info.get("xmp") or image.info[encode.XMP_KEY]
    found = found.decode() if isinstance(found, bytes) else found
    (mark,) = ET.fromstring(found[found.index("<x:xmpmeta") : found.index("<?xpacket end")]).iter(TERM)  # noqa: S314
    assert mark.text == SCHEME + "compositeWithTrainedAlgorithmicMedia"


def test_a_picture_is_a_composite_where_a_mask_spares_something() -> None:
    mask = torch.ones(4, 4)
    assert provenance.source_type(None) == provenance.source_type(mask) == "trainedAlgorithmicMedia"
    mask[0, 0] = 0.9
    assert provenance.source_type(mask) == "compositeWithTrainedAlgorithmicMedia"


@pytest.mark.parametrize("depth", [8, 16])
def test_text_is_added_without_touching_anything_else(depth) -> None:
    before = png(depth=depth, text={"a": "b"})
    text = json.dumps({"prompt": "é " * 5000}, ensure_ascii=False)
    after = provenance.with_text(before, {"receipt": text})
    with Image.open(io.BytesIO(after)) as image:
        image.load()
        assert image.info["receipt"] == text
        assert image.info["a"] == "b"
    assert provenance.pixel_digest(after) == provenance.pixel_digest(before)
    start = after.index(b"iTXt") - 4
    assert after.startswith(before[:start])
    assert after.endswith(before[start:])


def test_the_digest_is_of_the_samples_and_nothing_else() -> None:
    digest = provenance.pixel_digest(png())
    assert digest == provenance.pixel_digest(png(text={"x": "y"}))
    assert digest == provenance.pixel_digest(encode.encode(NOISE, Output(format="webp")))
    other = NOISE.clone()
    other[3, 3, 1] = (other[3, 3, 1] + 0.5) % 1
    turned = NOISE.reshape(10, 12, 3)  # the same bytes in another shape
    alpha = torch.ones(12, 10)
    others = [
        encode.encode(other, Output()),
        encode.encode(turned, Output()),
        png(alpha=alpha),
        png(depth=16),
    ]
    assert len({digest, *map(provenance.pixel_digest, others)}) == 5


def test_the_digest_of_deep_pictures_sees_the_lower_byte() -> None:
    one = np.full((2, 2, 3), 0x1234, np.uint16)
    pair = [encode.encode(torch.from_numpy((each / 65535.0).astype(np.float32)), Output(), depth=16)
            for each in (one, one + 1)]  # fmt: skip
    assert provenance.pixel_digest(pair[0]) != provenance.pixel_digest(pair[1])
