"""What deploy/ ships fits the programs: every command line parses, every time fits the others.

No container engine is asked: the compose file is read by Compose's own parser, Kubernetes' manifests by
`kubectl kustomize`. That the commands do their work is tests/acceptance/test_compose.py's.
"""

import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from overpaint_producer.cli import cli
from overpaint_shared.errors import EXIT_SERVICE
from overpaint_worker.main import command as overpaint_worker
from tests.compose import new_passwords, read_unit, worker_env

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = Path(sysconfig.get_path("scripts"))
STORING_S = 15
"""What a worker gets beyond its grace to store what is done and give the rest back."""


def compose(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SCRIPTS / "docker-compose", "-f", ROOT / "docker-compose.yml", "--env-file", os.devnull,
         "--profile", "*", "config", "--format", "json"],
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def services(**environment: str) -> dict[str, Any]:
    done = compose(new_passwords() | environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


SERVICES = services()


def worker_host(tmp_path: Path, env: str = "", *, tls: bool = False) -> dict[str, Any]:
    """The services of a host that has a worker alone, as `deploy/worker-env` and `worker.yml` make them."""
    told = worker_env(tmp_path, "10.0.0.1", new_passwords(), env, options=("--tls",) * tls)
    (tmp_path / "worker.env").write_text(told)
    over = ["-f", DEPLOY / "worker.tls.yml"] * tls
    done = subprocess.run(
        [SCRIPTS / "docker-compose", "--env-file", tmp_path / "worker.env", "-f", DEPLOY / "worker.yml",
         *over, "config", "--format", "json"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout)["services"])


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


VALIDATE = module(DEPLOY / "kubernetes" / "validate.py")
OVERLAYS = {path.name: VALIDATE.rendered(path) for path in (DEPLOY / "kubernetes" / "overlays").iterdir()}
WITH_TLS = {name: VALIDATE.with_tls(name) for name in OVERLAYS}


def commands() -> list[tuple[str, list[str]]]:
    """Every command line that something in deploy/ starts."""
    found = [
        (f"compose {name}", [*(service.get("entrypoint") or []), *(service.get("command") or [])])
        for name, service in SERVICES.items()
    ]
    for overlay, manifests in OVERLAYS.items():
        for manifest in manifests:
            pod = manifest.get("spec", {}).get("template", {}).get("spec", {"containers": []})
            found += [
                (f"{overlay} {manifest['metadata']['name']}", [*each["command"], *each.get("args", [])])
                for each in pod["containers"]
            ]
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        line = read_unit(unit)["Service"]["ExecStart"].replace("%i", "0")
        program, *rest = shlex.split(line)
        found.append((unit.name, [Path(program).name, *rest]))
    for image in (DEPLOY / "Dockerfile.producer", DEPLOY / "Dockerfile.worker"):
        (line,) = re.findall(r"^CMD (.*)$", image.read_text(), re.MULTILINE)
        found.append((image.name, json.loads(line)))
    return found


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize(
    ("where", "words"), [(w, c) for w, c in commands() if c and c[0] == "overpaint-worker"], ids=str
)
def test_every_worker_command_parses(where: str, words: list[str]) -> None:
    overpaint_worker.make_context("overpaint-worker", words[1:])


@pytest.mark.parametrize(
    ("where", "words"), [(w, c) for w, c in commands() if c[:1] == ["overpaint"] and len(c) > 1], ids=str
)
def test_every_producer_command_parses(where: str, words: list[str]) -> None:
    if words[1:] == ["--help"]:
        return
    found = cli.get_command(click.Context(cli), words[1])
    assert found is not None
    found.make_context(words[1], words[2:])


@pytest.mark.parametrize(("where", "words"), [(w, c) for w, c in commands() if "flower" in c], ids=str)
def test_flower_knows_its_options_and_cannot_command(where: str, words: list[str]) -> None:
    from flower import options  # noqa: F401  # defines them
    from tornado.options import options as known

    assert words[0] == "celery"
    assert words[1] == "--app=overpaint_producer.monitor"
    given = {word.removeprefix("--").partition("=")[0] for word in words[words.index("flower") + 1 :]}
    assert given <= {name.replace("-", "_") for name in known._options} | set(known._options)
    assert "--read_only=True" in words


def test_each_kind_of_command_is_there() -> None:
    programs = [words[0] for _, words in commands() if words]
    assert programs.count("overpaint-worker") >= 7
    assert programs.count("celery") == 4
    assert {"weed", "overpaint"} <= set(programs)


# How long a worker may take to stop


def grace(words: list[str]) -> float:
    return float(words[words.index("--grace") + 1])


def seconds(text: str) -> float:
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text).groups()  # type: ignore[union-attr]
    return 60 * int(minutes or 0) + int(rest or 0)


def test_whoever_stops_a_worker_waits_for_its_grace_and_a_little_more() -> None:
    waits = {
        f"compose {name}": (seconds(service["stop_grace_period"]), grace(service["command"]))
        for name, service in SERVICES.items()
        if name.startswith("worker-")
    }
    for overlay, manifests in OVERLAYS.items():
        for manifest in manifests:
            if manifest["kind"] == "Deployment" and manifest["metadata"]["name"].endswith("worker"):
                pod = manifest["spec"]["template"]["spec"]
                words = pod["containers"][0]["command"]
                waits[f"{overlay} {manifest['metadata']['name']}"] = (
                    pod["terminationGracePeriodSeconds"],
                    grace(words),
                )
    unit = read_unit(DEPLOY / "systemd" / "overpaint-worker@.service")["Service"]
    waits["systemd"] = (float(unit["TimeoutStopSec"]), grace(shlex.split(unit["ExecStart"])))
    assert len(waits) == 6
    assert {where: wait - given for where, (wait, given) in waits.items()} == dict.fromkeys(waits, STORING_S)


def test_systemd_asks_only_the_worker_to_stop() -> None:
    """Its engine would otherwise be told at once, and the jobs it holds be given back unfinished."""
    for path in (DEPLOY / "systemd").glob("*.service"):
        unit = read_unit(path)["Service"]
        assert unit["KillMode"] == "mixed", path.name
        assert unit["ProtectSystem"] == "strict", path.name
        assert unit["NoNewPrivileges"] == "yes", path.name
        assert unit["User"] != "root", path.name


def test_systemd_gives_no_worker_up_while_a_server_is_away() -> None:
    """Ten starts within an outage of a minute would else be its last."""
    unit = read_unit(DEPLOY / "systemd" / "overpaint-worker@.service")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "on-failure"
    assert str(EXIT_SERVICE) not in unit["Service"]["RestartPreventExitStatus"].split()


# Compose


@pytest.mark.parametrize("name", new_passwords())
def test_a_missing_password_is_refused_with_what_to_do(name: str) -> None:
    refused = compose(new_passwords() | {name: ""})
    assert refused.returncode != 0
    assert name in refused.stderr
    assert "deploy/new-env" in refused.stderr


def test_passwords_are_new_at_each_call_and_no_two_are_alike() -> None:
    made = [*new_passwords().items(), *new_passwords().items()]
    secret = [value for name, value in made if name != "OVERPAINT_S3_ACCESS_KEY"]
    assert len(set(secret)) == len(secret)
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in secret), "they go into URLs as they are"


def test_no_service_can_write_to_its_image_or_gain_rights() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert ":" in service["image"] or service.get("build"), name
        assert not service["image"].endswith(":latest"), name


def test_no_service_wants_a_file_that_compose_cannot_put_there() -> None:
    """Compose copies what configs and secrets hold into the container: not where that is read-only."""
    for name, service in SERVICES.items():
        assert not service.get("configs"), name
        assert not service.get("secrets"), name


def test_a_host_with_a_worker_alone_gets_what_a_worker_may_know(tmp_path: Path) -> None:
    found = worker_host(tmp_path)
    secret = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    told = (tmp_path / "worker.env").read_text()
    kept = {name for name, value in secret.items() if "PASSWORD" in name and value in told}
    assert kept == {"OVERPAINT_REDIS_WORKER_PASSWORD"}
    assert found["common"]["deploy"]["replicas"] == 0
    worker = found["gpu"]
    password = secret["OVERPAINT_REDIS_WORKER_PASSWORD"]
    assert worker["environment"]["OVERPAINT_REDIS_URL"] == f"redis://worker:{password}@10.0.0.1:6379/0"
    assert worker["environment"]["OVERPAINT_S3_ENDPOINT_URL"] == "http://10.0.0.1:8333"
    assert worker["environment"]["OVERPAINT_S3_SECRET_KEY"] == secret["OVERPAINT_S3_SECRET_KEY"]
    assert {volume["source"] for volume in worker["volumes"]} == {"/srv/models", "hashes"}
    assert {port["host_ip"] for port in worker["ports"]} == {"127.0.0.1"}
    assert not worker.get("depends_on")


def test_a_host_with_a_worker_alone_uses_the_s3_server_that_the_farm_uses(tmp_path: Path) -> None:
    found = worker_host(tmp_path, "OVERPAINT_S3_ENDPOINT_URL=\nOVERPAINT_S3_BUCKET=mine\n")["gpu"]
    assert found["environment"]["OVERPAINT_S3_ENDPOINT_URL"] == "", "Amazon's own"
    assert found["environment"]["OVERPAINT_S3_BUCKET"] == "mine"


CA_FILE = "/etc/overpaint/tls/ca.crt"


def as_systemd_reads(tmp_path: Path) -> dict[str, str]:
    """A host's `worker.env`, which its unit reads as it is."""
    return dict(line.split("=", 1) for line in (tmp_path / "worker.env").read_text().splitlines())


def test_a_host_with_a_worker_alone_speaks_tls_if_asked_to_in_a_container_and_under_systemd(
    tmp_path: Path,
) -> None:
    worker = worker_host(tmp_path, tls=True)["gpu"]
    names = ("REDIS_URL", "REDIS_CA_FILE", "S3_ENDPOINT_URL", "S3_CA_FILE")
    for env in (as_systemd_reads(tmp_path), worker["environment"]):
        redis_url, redis_ca, s3_url, s3_ca = (env[f"OVERPAINT_{name}"] for name in names)
        assert re.fullmatch(r"rediss://worker:[0-9a-f]{48}@10\.0\.0\.1:6379/0", redis_url)
        assert (s3_url, redis_ca, s3_ca) == ("https://10.0.0.1:8333", CA_FILE, CA_FILE)
    mounted = {volume["target"]: volume["source"] for volume in worker["volumes"]}
    assert mounted[str(Path(CA_FILE).parent)] == str(Path(CA_FILE).parent)


def test_a_host_with_tls_may_use_an_s3_server_that_the_system_trusts(tmp_path: Path) -> None:
    elsewhere = "OVERPAINT_S3_ENDPOINT_URL=https://s3.example\nOVERPAINT_S3_CA_FILE=\n"
    worker = worker_host(tmp_path, elsewhere, tls=True)["gpu"]
    for env in (as_systemd_reads(tmp_path), worker["environment"]):
        assert env["OVERPAINT_S3_ENDPOINT_URL"] == "https://s3.example"
        assert env["OVERPAINT_S3_CA_FILE"] == ""
        assert env["OVERPAINT_REDIS_CA_FILE"] == CA_FILE


def test_without_tls_a_workers_host_is_told_of_no_authority(tmp_path: Path) -> None:
    worker_host(tmp_path)
    assert "CA_FILE" not in (tmp_path / "worker.env").read_text()


def test_a_worker_is_the_same_alone_and_in_the_whole_farm(tmp_path: Path) -> None:
    alone, whole = worker_host(tmp_path)["gpu"], SERVICES["worker-gpu"]
    for key in ("command", "read_only", "cap_drop", "security_opt", "stop_grace_period", "shm_size", "uts"):
        assert alone[key] == whole[key], key
    assert alone["deploy"]["resources"] == whole["deploy"]["resources"]


def test_only_this_machine_reaches_the_ports_unless_asked_otherwise() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name


BYTES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "kb": 2**10,
    "mb": 2**20,
    "gb": 2**30,
    "K": 2**10,
    "M": 2**20,
}
BYTES |= {"G": 2**30, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
"""As Valkey, systemd and Kubernetes write sizes."""


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * BYTES[unit]


def test_every_service_has_a_limit_of_memory_swap_and_processes() -> None:
    for name, service in SERVICES.items():
        assert int(service["mem_limit"]) == int(service["memswap_limit"]) >= 2**27, name
        assert 64 <= int(service["pids_limit"]) <= 4096, name
        if name != "cli":
            assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
    given = services(
        OVERPAINT_GPU_MEMORY_LIMIT="200g",
        OVERPAINT_CPU_MEMORY_LIMIT="8g",
        OVERPAINT_S3_MEMORY_LIMIT="4g",
        OVERPAINT_REDIS_MEMORY_LIMIT="6g",
    )
    told = {name: int(given[name]["mem_limit"]) >> 30 for name in ("worker-gpu", "worker-cpu", "s3", "redis")}
    assert told == {"worker-gpu": 200, "worker-cpu": 8, "s3": 4, "redis": 6}
    for path in (DEPLOY / "systemd").glob("*.service"):
        unit = read_unit(path)["Service"]
        assert size(unit["MemoryMax"]) >= 2**29, path.name
        assert unit["MemorySwapMax"] == "0", path.name
        assert int(unit["TasksMax"]) >= 64, path.name


def test_an_engine_or_a_copy_of_redis_that_takes_too_much_memory_does_not_end_its_service() -> None:
    """systemd stops the whole unit by default when one of its processes is ended for want of memory."""
    for name in ("worker@", "valkey"):
        assert (
            read_unit(DEPLOY / "systemd" / f"overpaint-{name}.service")["Service"]["OOMPolicy"] == "continue"
        )


def test_redis_gets_twice_the_memory_that_it_may_fill() -> None:
    """While the append-only file is rewritten, what is changed meanwhile is there twice."""
    words = {"compose": [*SERVICES["redis"]["entrypoint"], *SERVICES["redis"]["command"]]}
    limits = {"compose": int(SERVICES["redis"]["mem_limit"])}
    for overlay, manifests in OVERLAYS.items():
        (pod,) = [
            each["spec"]["template"]["spec"]
            for each in manifests
            if each["kind"] == "StatefulSet" and each["metadata"]["name"] == "redis"
        ]
        words[overlay] = pod["containers"][0]["command"]
        limits[overlay] = size(pod["containers"][0]["resources"]["limits"]["memory"])
    unit = read_unit(DEPLOY / "systemd" / "overpaint-valkey.service")["Service"]
    words["systemd"], limits["systemd"] = shlex.split(unit["ExecStart"]), size(unit["MemoryMax"])
    for where, argv in words.items():
        assert 2 * size(argv[argv.index("--maxmemory") + 1]) <= limits[where], where


def test_tls_changes_no_word_of_seaweedfs_but_adds_its_certificate() -> None:
    over = yaml.safe_load((DEPLOY / "compose.tls.yml").read_text())["services"]["s3"]["command"]
    text = (ROOT / "docker-compose.yml").read_text().replace("!reset ", "")  # Compose's own tag
    base = yaml.safe_load(text)["services"]["s3"]["command"]
    assert over == [*base, "-s3.cert.file=/tls/server.crt", "-s3.key.file=/tls/server.key"]


def test_only_who_needs_it_shares_a_network_with_a_store() -> None:
    members: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for network in service.get("networks") or ():
            members.setdefault(network, set()).add(name)
    workers = {"worker-cpu", "worker-gpu"}
    assert members["store"] == {"s3", "cli", *workers}
    assert members["ledger"] == {"redis", "cli", "flower", "metrics", *workers}
    assert members["watch"] == {"prometheus", "grafana", "metrics", *workers}
    assert SERVICES["s3-keys"]["network_mode"] == "none"


def test_seaweedfs_is_never_started_without_its_keys() -> None:
    s3 = SERVICES["s3"]
    assert s3["command"][0] == "-config_dir=/keys"
    assert s3["depends_on"]["s3-keys"]["condition"] == "service_completed_successfully"
    (keys,) = [volume for volume in s3["volumes"] if volume["target"] == "/keys"]
    assert keys["read_only"]
    assert keys["source"] in {volume["source"] for volume in SERVICES["s3-keys"]["volumes"]}
    assert SERVICES["s3-keys"]["command"][-2:] == ["/keys", "1000:1000"], "the user of SeaweedFS's image"
    (pod,) = [
        each["spec"]["template"]["spec"]
        for each in OVERLAYS["one-gpu"]
        if each["kind"] == "StatefulSet" and each["metadata"]["name"] == "s3"
    ]
    assert pod["containers"][0]["command"][:2] == ["weed", "-config_dir=/keys"]
    made_by = pod["initContainers"][0]
    assert made_by["command"][-1] == "/keys"
    assert {"name": "keys", "mountPath": "/keys"} in made_by["volumeMounts"]


def test_each_service_gets_the_password_of_its_role_alone() -> None:
    mine = new_passwords()
    given = services(**mine)
    roles = {name: "WORKER" for name in given if name.startswith("worker-")}
    roles |= {"flower": "MONITOR", "metrics": "MONITOR", "cli": "PRODUCER"}
    for name, service in given.items():
        held = {
            role
            for role in ("PRODUCER", "WORKER", "MONITOR", "OPERATOR")
            if mine[f"OVERPAINT_REDIS_{role}_PASSWORD"] in json.dumps(service)
        }
        wanted = (
            {"PRODUCER", "WORKER", "MONITOR", "OPERATOR"} if name == "redis" else {roles.get(name)} - {None}
        )
        assert held == wanted, name


def test_another_s3_server_is_used_by_environment_alone() -> None:
    other = services(
        OVERPAINT_S3_REPLICAS="0",
        OVERPAINT_S3_ENDPOINT_URL="",
        OVERPAINT_S3_REGION="eu-central-1",
        OVERPAINT_S3_BUCKET="mine",
    )
    assert other["s3"]["deploy"]["replicas"] == 0
    for name in ("worker-cpu", "worker-gpu", "cli"):
        environment = other[name]["environment"]
        assert environment["OVERPAINT_S3_ENDPOINT_URL"] == "", "Amazon's own"
        assert environment["OVERPAINT_S3_BUCKET"] == "mine"
        assert environment["OVERPAINT_S3_REGION"] == "eu-central-1"


def test_a_laptop_needs_no_gpu_and_no_models() -> None:
    done = subprocess.run(
        [SCRIPTS / "docker-compose", "-f", ROOT / "docker-compose.yml", "--env-file", os.devnull,
         "--profile", "cpu", "config", "--format", "json"],
        env={"PATH": os.environ["PATH"]} | new_passwords(),
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    names = json.loads(done.stdout)["services"]
    assert set(names) == {
        "redis",
        "s3-keys",
        "s3",
        "worker-cpu",
        "flower",
        "metrics",
        "prometheus",
        "grafana",
    }
    assert "nvidia" not in done.stdout
    assert {volume["type"] for volume in names["worker-cpu"]["volumes"]} == {"volume"}
    assert names["worker-cpu"]["environment"]["OVERPAINT_REGISTRY"] == "", "the worker's own miniatures"
    given = services(OVERPAINT_MODELS_DIR="/srv/models")["worker-cpu"]
    assert given["environment"]["OVERPAINT_REGISTRY"] == "/models/models.toml"
    assert ("/srv/models", "/models") in {(each["source"], each["target"]) for each in given["volumes"]}


def test_the_producers_image_has_no_weights() -> None:
    """Its own list of what is not sent to the builder is the common one, and the miniatures."""
    common = (ROOT / ".dockerignore").read_text()
    own = (DEPLOY / "Dockerfile.producer.dockerignore").read_text()
    assert own == common + "worker/overpaint_worker/miniatures\n"


def test_files_that_services_mount_are_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), (name, volume["source"])


def test_images_get_every_file_they_copy() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for image in DEPLOY.glob("Dockerfile.*"):
        for line in re.findall(r"^COPY (.*)$", image.read_text(), re.MULTILINE):
            *sources, _ = [word for word in line.split() if not word.startswith("--")]
            assert set(sources) <= allowed, (image.name, sources)
            assert all(list(ROOT.glob(source)) for source in sources)


# Kubernetes


@pytest.mark.parametrize("built", [OVERLAYS, WITH_TLS], ids=["plain", "with TLS"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_holds_against_closed_schemas_and_sense(overlay: str, built: dict[str, Any]) -> None:
    assert list(VALIDATE.problems(built[overlay])) == []


def changed(kind: str, *path: str | int, to: object) -> list[dict[str, Any]]:
    """The larger overlay with one value of the first manifest of a kind set to another."""
    manifests = copy.deepcopy(OVERLAYS["many-gpus"])
    at: Any = next(each for each in manifests if each["kind"] == kind)
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return manifests


POD = ("spec", "template", "spec")
LATER = [{"name": "URL", "value": "redis://$(PASSWORD)@redis"}, {"name": "PASSWORD", "value": "x"}]
NO_SECRET = [{"name": "tmp", "secret": {"secretName": "overpaint-tls"}}]
NO_KEY = [
    {"name": "tmp", "secret": {"secretName": "overpaint-redis-tls", "items": [{"key": "ca", "path": "ca"}]}}
]


@pytest.mark.parametrize(
    ("manifests", "said"),
    [
        (changed("Deployment", *POD, "containerz", to=[]), "containerz"),
        (changed("Deployment", "spec", "replicas", to="one"), "one"),
        (changed("ScaledObject", "spec", "minReplicas", to=1), "minReplicas"),
        (changed("ScaledObject", "spec", "scaleTargetRef", to={"name": "gone"}), "gone"),
        (changed("Deployment", *POD, "containers", 0, "image", to="overpaint-worker"), "no tag"),
        (changed("Deployment", *POD, "containers", 0, "securityContext", to={}), "writable"),
        (changed("Deployment", *POD, "securityContext", to={}), "root"),
        (changed("Deployment", *POD, "containers", 0, "env", to=LATER), "not filled in"),
        (changed("Deployment", *POD, "volumes", to=NO_SECRET), "mounts the Secret overpaint-tls"),
        (changed("Deployment", *POD, "volumes", to=NO_KEY), "no such key"),
        (changed("Deployment", *POD, "volumes", to=[]), "mounts tmp, which is no volume"),
    ],
    ids=lambda value: value if isinstance(value, str) else "changed",
)
def test_what_is_wrong_in_a_manifest_is_found(manifests: list[dict[str, Any]], said: str) -> None:
    assert any(said in problem for problem in VALIDATE.problems(manifests))


def containers(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The first container of each pod, with the name of what makes it, and the pod."""
    for each in manifests:
        if pod := each["spec"].get("template", {}).get("spec") if "spec" in each else None:
            yield each["metadata"]["name"], pod["containers"][0], pod


def secret_files(container: dict[str, Any], pod: dict[str, Any]) -> dict[str, str]:
    """The files that a container gets out of Secrets, and whose they are."""
    found: dict[str, str] = {}
    secrets = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
    for mount in container["volumeMounts"]:
        if secret := secrets.get(mount["name"]):
            keys = {item["path"] for item in secret.get("items", [])} or VALIDATE.SECRETS[
                secret["secretName"]
            ]
            found |= {f"{mount['mountPath']}/{key}": secret["secretName"] for key in keys}
    return found


@pytest.mark.parametrize("overlay", WITH_TLS)
def test_with_tls_every_client_in_kubernetes_checks_the_servers_and_none_gets_their_keys(
    overlay: str,
) -> None:
    manifests = WITH_TLS[overlay]
    (shared,) = [
        each["data"]
        for each in manifests
        if each["metadata"]["name"].startswith("overpaint-") and "data" in each
    ]
    names = set()
    for name, container, pod in containers(manifests):
        env = {each["name"]: each.get("value") for each in container["env"]}
        files = secret_files(container, pod)
        if name in {"redis", "s3"}:
            continue
        names.add(name)
        assert env["OVERPAINT_REDIS_URL"].startswith("rediss://"), name
        assert files.pop(env["OVERPAINT_REDIS_CA_FILE"]) == "overpaint-redis-tls", name
        if name == "worker":
            assert shared["OVERPAINT_S3_ENDPOINT_URL"] == "https://s3:8333"
            assert files.pop(shared["OVERPAINT_S3_CA_FILE"]) == "overpaint-s3-tls"
        assert files == {}, name
    workers = {"worker"} if overlay == "one-gpu" else {"sd15-worker", "sdxl-worker"}
    assert names == {"flower", "metrics"} | workers
    assert ("OVERPAINT_S3_CA_FILE" in shared) == (overlay == "one-gpu"), (
        "S3 elsewhere is the system's to trust"
    )


@pytest.mark.parametrize("overlay", WITH_TLS)
def test_with_tls_the_servers_in_kubernetes_and_their_probes_find_their_certificates(overlay: str) -> None:
    servers = {
        name: (one, pod) for name, one, pod in containers(WITH_TLS[overlay]) if name in {"redis", "s3"}
    }
    redis, pod = servers.pop("redis")
    files = secret_files(redis, pod)
    start = (DEPLOY / "valkey" / "start.sh").read_text()
    given = {each["name"]: each["value"] for each in redis["env"] if "_TLS_" in each["name"]}
    assert {given[f"OVERPAINT_REDIS_TLS_{part}"] for part in ("CERT", "KEY", "CA")} == set(files)
    assert "for part in CERT KEY CA" in start
    for probe in ("readinessProbe", "livenessProbe"):
        plain, tls = (
            each[1][probe]
            for each in (*containers(OVERLAYS[overlay]), *containers(WITH_TLS[overlay]))
            if each[0] == "redis"
        )
        words = tls["exec"]["command"][-1]
        assert f"valkey-cli --tls --cacert {given['OVERPAINT_REDIS_TLS_CA']} " in words
        other = copy.deepcopy(tls)
        other["exec"]["command"][-1] = re.sub(r"--tls --cacert \S+ ", "", words)
        assert other == plain, "the same question, asked with the same patience"
    for s3, pod in servers.values():
        files = secret_files(s3, pod)
        told = dict(each.split("=", 1) for each in s3["args"] if "=" in each)
        assert {told["-s3.cert.file"], told["-s3.key.file"]} <= set(files)
        assert {s3[probe]["httpGet"]["scheme"] for probe in ("readinessProbe", "livenessProbe")} == {"HTTPS"}


def test_workers_are_scaled_on_what_the_ledger_says_and_never_to_none() -> None:
    from overpaint_producer import exporter

    told = Path(exporter.__file__).read_text()
    scalers = [each for each in OVERLAYS["many-gpus"] if each["kind"] == "ScaledObject"]
    assert len(scalers) == 2
    for scaler in scalers:
        (trigger,) = scaler["spec"]["triggers"]
        series = set(re.findall(r"overpaint_\w+", trigger["metadata"]["query"]))
        assert series
        assert all(f'"{name}"' in told for name in series), series
        assert scaler["spec"]["minReplicaCount"] >= 1, "a model that nobody offers is refused at submit"


def test_every_model_class_has_a_budget_for_disruptions() -> None:
    manifests = OVERLAYS["many-gpus"]
    budgets = {
        each["metadata"]["name"]: each["spec"]["selector"]["matchLabels"]
        for each in manifests
        if each["kind"] == "PodDisruptionBudget"
    }
    for each in manifests:
        if each["kind"] == "Deployment" and each["metadata"]["name"].endswith("worker"):
            labels = each["spec"]["template"]["metadata"]["labels"]
            assert budgets[each["metadata"]["name"]].items() <= labels.items()
            others = [name for name, wanted in budgets.items() if wanted.items() <= labels.items()]
            assert others == [each["metadata"]["name"]], "two budgets for one pod stop every drain"


def test_no_secret_is_in_the_repository() -> None:
    for path in (DEPLOY / "kubernetes").rglob("*.yaml"):
        assert all(each.get("kind") != "Secret" for each in yaml.safe_load_all(path.read_text()) if each), (
            path
        )
