"""What a file says of itself: how it came to be (the IPTC mark), its receipt, its pixels' digest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from overpaint_worker.engine import deep_png
from overpaint_worker.engine.deep_png import Samples
from overpaint_worker.engine.png import SIGNATURE

RECEIPT_KEY: Final = "overpaint-receipt"
"""Name of the PNG text chunk that holds the receipt."""

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""IPTC's words for a picture that a model made, and for one of which it made a part."""

_SCHEME: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{uri}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def source_type(mask: Tensor | None) -> SourceType:
    """Of a picture repainted under a mask [H, W], 1 = repainted; None: everywhere."""
    whole = mask is None or bool((mask >= 1).all())
    return "trainedAlgorithmicMedia" if whole else "compositeWithTrainedAlgorithmicMedia"


def xmp_packet(kind: SourceType) -> str:
    """The mark as an XMP packet (IPTC Photo Metadata Standard 2023.2, Digital Source Type)."""
    return _PACKET.format(uri=_SCHEME + kind)


def with_text(png: bytes, text: Mapping[str, str]) -> bytes:
    """A PNG with more text chunks, before its pixels; everything else stays byte for byte."""
    info, chunks = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key, value, zip=True)
    for name, data, *_ in info.chunks:
        PngImagePlugin.putchunk(chunks, name, data)
    place = _first_pixels(png)
    return png[:place] + chunks.getvalue() + png[place:]


def _first_pixels(png: bytes) -> int:
    """Where the first IDAT chunk begins (PNG third edition, section 5.3)."""
    place = len(SIGNATURE)
    while png[place + 4 : place + 8] != b"IDAT":
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return place


def pixel_digest(image: bytes) -> str:
    """SHA-256 of what a file decodes to: height, width, channels and bits, then the samples, little-endian.

    Text, profile and compression do not count: two files with one digest show the same stored values.
    """
    with Image.open(io.BytesIO(image)) as opened:
        return samples_digest(deep_png.read(image) if deep_png.is_deep(opened) else np.asarray(opened))


def samples_digest(samples: Samples) -> str:
    """`pixel_digest` of a file that holds these samples [H, W, C]."""
    head = "x".join(map(str, (*samples.shape, samples.dtype.itemsize * 8)))
    digest = hashlib.sha256(head.encode())
    digest.update(np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")).data)
    return digest.hexdigest()
