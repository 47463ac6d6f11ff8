"""Renders every overlay as `kubectl apply -k` would, without and with TLS, and checks it.

Against Kubernetes' own schemas, closed; KEDA's ScaledObject, which is no part of those, against the schema
beside this file. Then what no schema says: that what is named exists, that pods are locked down, and that
images have a tag.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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
    "overpaint-redis": {"producer", "worker", "monitor", "operator", "replica"},
    "overpaint-s3": {"access-key", "secret-key"},
    "overpaint-flower": {"basic-auth"},
    "overpaint-redis-tls": {"tls.crt", "tls.key", "ca.crt"},
    "overpaint-s3-tls": {"tls.crt", "tls.key", "ca.crt"},
}
"""The Secrets that operators make, as base/kustomization.yaml and the components for TLS say."""
TLS = {"one-gpu": ("tls", "seaweedfs-tls"), "many-gpus": ("tls",)}
"""The components that give an overlay TLS."""
Manifest = dict[str, Any]


def rendered(overlay: Path) -> list[Manifest]:
    """What an overlay comes to."""
    done = subprocess.run([KUBECTL, "kustomize", overlay], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def with_tls(overlay: str) -> list[Manifest]:
    """What an overlay comes to with the components for TLS after its own, as docs/security.md says."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kubernetes", "valkey"):
            shutil.copytree(HERE.parent / name, Path(folder) / name)
        changed = Path(folder) / "kubernetes" / "overlays" / overlay
        file = changed / "kustomization.yaml"
        wanted = yaml.safe_load(file.read_text(encoding="utf-8"))
        more = [f"../../components/{name}" for name in TLS[overlay]]
        wanted["components"] = [*wanted.get("components", []), *more]
        file.write_text(yaml.safe_dump(wanted), encoding="utf-8")
        return rendered(changed)


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
        claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        yield from against_pod(pod, names, claims)


def against_pod(pod: Manifest, names: set[tuple[str, str]], claims: set[str]) -> Iterator[str]:
    """What is wrong with a pod. `claims`: the volumes that its StatefulSet makes."""
    if not pod.get("securityContext", {}).get("runAsNonRoot") or pod.get(
        "automountServiceAccountToken", True
    ):
        yield "may run as root, or holds a service account's token"
    for volume in pod.get("volumes", []):
        yield from against_volume(volume, names)
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        yield from (f"{container['name']}: {what}" for what in against_container(container, names))
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes | claims:
                yield f"{container['name']}: mounts {mount['name']}, which is no volume"


def against_volume(volume: Manifest, names: set[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with a volume."""
    if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in names:
        yield f"mounts the ConfigMap {volume['configMap']['name']}, which is not there"
    secret = volume.get("secret")
    if secret is None:
        return
    name = secret["secretName"]
    if name not in SECRETS:
        yield f"mounts the Secret {name}: not one of those that operators make"
    for item in secret.get("items", []):
        if item["key"] not in SECRETS.get(name, set()):
            yield f"mounts {item['key']} of the Secret {name}, which has no such key"


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
    yield from against_environment(container.get("env", []))


def against_environment(variables: list[Manifest]) -> Iterator[str]:
    """What is wrong with a container's own variables."""
    earlier: set[str] = set()
    for variable in variables:
        for name in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
            if name not in earlier:
                yield f"{variable['name']} names {name}, which does not come earlier, so it is not filled in"
        earlier.add(variable["name"])
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
    built = {overlay.name: rendered(overlay) for overlay in sorted(HERE.glob("overlays/*"))}
    built |= {f"{name} with TLS": with_tls(name) for name in TLS}
    wrong = [f"{name}: {problem}" for name, manifests in built.items() for problem in problems(manifests)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
