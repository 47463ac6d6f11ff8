"""The worker's own job, which shows that a device renders: one step on a small grey picture."""

import hashlib
import json
from io import BytesIO

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
    from PIL import Image  # a worker needs it for nothing else

    file = BytesIO()
    Image.new("L", (SIDE, SIDE), "grey").save(file, "PNG")
    return file.getvalue()
