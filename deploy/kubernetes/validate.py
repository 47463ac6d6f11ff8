"""Renders every overlay as `kubectl apply -k` would and holds it against Kubernetes' own schemas, closed.

KEDA's ScaledObject is no part of those: it is held against the schema beside this file. Then what no schema
says: that what is named exists, that pods are locked down, and that images have a tag.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).resolve().parent
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
KEDA = json.loads((HERE / "schemas" / "scaledobject-keda-v1alpha1.json").read_text(encoding="utf-8"))
SECRETS = {
    "overpaint-redis": {"producer", "worker", "monitor", "operator"},
    "overpaint-s3": {"access-key", "secret-key"},
    "overpaint-flower": {"basic-auth"},
}
"""The Secrets that operators make, as base/kustomization.yaml says."""
Manifest = dict[str, Any]


def rendered(overlay: Path) -> list[Manifest]:
    """What an overlay comes to."""
    done = subprocess.run([KUBECTL, "kustomize", overlay], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def against_schema(manifest: Manifest) -> Iterator[str]:
    """What its schema says against a manifest."""
    if manifest["kind"] == "ScaledObject":
        found = jsonschema.Draft202012Validator(KEDA).iter_errors(manifest)
        yield from (f"{error.json_path}: {error.message}" for error in found)
        return
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        yield error.message


def against_sense(manifest: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with a manifest that its schema allows."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "ScaledObject" and ("Deployment", spec["scaleTargetRef"]["name"]) not in names:
        yield f"scales {spec['scaleTargetRef']['name']}, which is not there"
    if manifest["kind"] in {"PodDisruptionBudget", "ScaledObject", "NetworkPolicy"}:
        return
    pod = spec.get("template", {}).get("spec")
    if pod:
        if (
            spec["selector"]["matchLabels"].items() - spec["template"]["metadata"]["labels"].items()
        ) != set():
            yield "its selector does not select its pods"
        yield from against_pod(pod, names)


def against_pod(pod: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with a pod."""
    if not pod.get("securityContext", {}).get("runAsNonRoot") or pod.get(
        "automountServiceAccountToken", True
    ):
        yield "may run as root, or holds a service account's token"
    for volume in pod.get("volumes", []):
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names:
            yield f"mounts the ConfigMap {volume['configMap']['name']}, which is not there"
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        yield from (f"{container['name']}: {what}" for what in against_container(container, names))


def against_container(container: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with a container."""
    locked = container.get("securityContext", {})
    if not locked.get("readOnlyRootFilesystem") or locked.get("capabilities") != {"drop": ["ALL"]}:
        yield "its root file system is writable, or it keeps capabilities"
    if ":" not in container["image"] or container["image"].endswith(":latest"):
        yield f"the image {container['image']} has no tag"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield "has no memory limit"
    for source in container.get("envFrom", []):
        if ("ConfigMap", source["configMapRef"]["name"]) not in names:
            yield f"reads the ConfigMap {source['configMapRef']['name']}, which is not there"
    for variable in container.get("env", []):
        ref = variable.get("valueFrom", {}).get("secretKeyRef")
        if ref and ref["key"] not in SECRETS.get(ref["name"], set()):
            yield f"reads {ref['key']} of the Secret {ref['name']}: not one of those that operators make"


def problems(manifests: list[Manifest]) -> Iterator[str]:
    """What is wrong with an overlay."""
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    for manifest in manifests:
        where = f"{manifest['kind']}/{manifest['metadata']['name']}"
        for problem in (*against_schema(manifest), *against_sense(manifest, names)):
            yield f"{where}: {problem}"
        if manifest["kind"] == "Secret":
            yield f"{where}: Secrets are made by operators, never written into the repository"


def main() -> None:
    """Say what is wrong with each overlay; exit 1 if anything is."""
    wrong = [
        f"{overlay.name}: {problem}"
        for overlay in sorted(HERE.glob("overlays/*"))
        for problem in problems(rendered(overlay))
    ]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
