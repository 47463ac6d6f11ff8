"""The tiny weights that tests render with: built once per user and version, by `data/parity/make_weights.py`.

They are random, of the SD 1.5 architecture (8.6 M parameters), and the same on every machine, so that
the reference's own outputs in `data/parity` hold for them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "data" / "parity" / "make_weights.py"
TOKENIZER = HERE.parent / "worker" / "overpaint_worker" / "engine" / "families" / "clip-tokenizer"

MODELS_TOML = """\
[models.tiny]
family = "sd"
path = "weights/diffusers/sd15"
text_encoder_dtype = "float16"
defaults = { steps = 4, cfg = 7.0, sampler = "euler", scheduler = "normal", size = 64 }

[models.tiny-single]
family = "sd"
path = "weights/original/sd15.safetensors"
config = "config/sd15"
text_encoder_dtype = "float16"
defaults = { steps = 4, cfg = 7.0, sampler = "euler", scheduler = "normal", size = 64 }

[models.tiny-v]
family = "sd"
path = "weights/diffusers/sd15"
prediction = "v"
text_encoder_dtype = "float16"

[models.tiny-inpaint]
family = "sd"
path = "weights/diffusers/sd15_inpaint9"
text_encoder_dtype = "float16"

[models.tiny-inpaint-single]
family = "sd"
path = "weights/original/sd15_inpaint9.safetensors"
config = "config/sd15"
text_encoder_dtype = "float16"

[controlnets.tiny]
path = "weights/diffusers/controlnet"
"""


@pytest.fixture(scope="session")
def tiny_registry() -> Path:
    """Path of a `models.toml` with the tiny models `tiny`, `tiny-single`, `tiny-v`, `tiny-inpaint`,
    `tiny-inpaint-single` and the ControlNet `tiny`."""
    return build_tiny_registry()


@pytest.fixture(scope="session")
def sdxl_registry() -> Path:
    """Path of a `models.toml` with the tiny SDXL models `xl`, `xl-single`, `xl-inpaint`, `xl-inpaint-single`,
    the ControlNets `xl` and `xl-single`, and the tiny SD model `tiny`."""
    from tests.weights_sdxl import build_sdxl_registry  # only tests that render need torch

    return build_sdxl_registry()


def build_tiny_registry() -> Path:
    """Build the tiny weights if this user has none of this version yet, and return their `models.toml`."""
    return cached(f"tiny-{_key()}", _build) / "models.toml"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """This user's folder of that name; `build` makes it, whole, if it is not there yet."""
    root = _cache_root()
    folder = root / name
    with _locked(root / "lock"):
        if not folder.exists():
            build(folder)
    return folder


def _cache_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(home) / "overpaint-tests"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _key() -> str:
    """Changes with the script, the registry text and the libraries that write the weights."""
    digest = hashlib.sha256(SCRIPT.read_bytes() + MODELS_TOML.encode())
    for name in ("torch", "diffusers", "transformers"):
        digest.update(f"{name}=={version(name)};".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that of many test runs at once one builds and the others wait."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as name:
        building = Path(name)
        # The script looks for the tokenizer in ../data beside its own folder.
        (building / "parity").mkdir()
        (building / "data").mkdir()
        shutil.copy(SCRIPT, building / "parity" / SCRIPT.name)
        (building / "data" / "clip-tokenizer").symlink_to(TOKENIZER)
        result = building / "result"
        subprocess.run(
            [sys.executable, building / "parity" / SCRIPT.name, "tiny", result / "weights"],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        )
        copy_json(result / "weights" / "diffusers" / "sd15", result / "config" / "sd15")
        (result / "models.toml").write_text(MODELS_TOML)
        result.rename(folder)


def copy_json(source: Path, target: Path) -> None:
    """Only the configurations: a single file's weights must not be able to come from the folder."""
    for path in source.glob("*/*config.json"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
