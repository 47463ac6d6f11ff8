"""The worker's own job, which shows that a device renders: one step on a small grey picture."""

import hashlib
import json
import struct
import zlib

from overpaint_worker.crashes import TEST_JOB
from overpaint_worker.protocol import Render

SIDE = 64


def device_test(model: str) -> Render:
    """The job, for a model. No person sees its picture."""
    picture = _grey_png()
    image = f"sha256:{hashlib.sha256(picture).hexdigest()}"
    spec = {
        "version": 1,
        "model": model,
        "source": {"image": image},
        "method": {"kind": "img2img"},
        "prompt": "",
        "sampling": {"seed": 0, "steps": 1, "cfg": 1.0, "denoise": 1.0},
    }
    return Render(job=TEST_JOB, token=0, spec_json=json.dumps(spec), inputs={image: picture}, alone=True)


def _grey_png() -> bytes:
    rows = (b"\0" + b"\x80" * SIDE) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
