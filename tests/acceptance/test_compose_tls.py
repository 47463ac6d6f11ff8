"""The compose file with TLS over it, as processes with certificates of `deploy/tls/make-ca`.

Redis is Debian's, since Valkey's wheel is built without TLS; the options are the same.
"""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flower.utils.broker import Broker
from kombu.exceptions import OperationalError
from PIL import Image

from overpaint_producer.client import Farm
from overpaint_producer.services import free_ports
from overpaint_shared.errors import LedgerUnreachable, SettingsError, StoreError, StoreUnreachable
from overpaint_shared.queues import make_app
from overpaint_shared.settings import Settings
from overpaint_shared.store import Store
from tests.compose import ROOT, Compose, new_passwords
from tests.tls_redis import tls_redis
from tests.waiting import wait_until

NO_NAME = "127.1"
"""Another way to write 127.0.0.1, which no certificate names."""
Load = Callable[..., Settings]


def authority(folder: Path) -> Path:
    subprocess.run([ROOT / "deploy" / "tls" / "make-ca", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    folder = tmp_path_factory.mktemp("tls")
    given = new_passwords() | {"OVERPAINT_TLS_DIR": str(authority(folder / "authority"))}
    compose = Compose(folder / "farm", given, ROOT / "deploy" / "compose.tls.yml")
    programs = tls_redis()
    compose.replaced["valkey-server"] = str(programs / "redis-server")
    compose.replaced["valkey-cli"] = f"{programs / 'redis-cli'} -p {compose.ports['redis']}"
    compose.config["services"]["redis"]["environment"]["OVERPAINT_REDIS_TLS_PORT"] = str(
        compose.ports["redis"]
    )
    try:
        compose.start_redis()
        compose.start_s3()
        wait_until(lambda: compose.healthy("redis"), within_s=30, what="Redis' health check")
        wait_until(compose.stores, within_s=60, what="S3 takes an object")
        yield compose
    finally:
        compose.end()


@pytest.fixture
def load(farm: Compose) -> Load:
    """The command line's settings in the compose file, changed as a test says."""

    def made(**changes: Any) -> Settings:
        env = farm.env("cli")
        names = [name for name in Settings.model_fields if env.get(f"OVERPAINT_{name.upper()}")]
        given = {name: env[f"OVERPAINT_{name.upper()}"] for name in names} | changes
        return Settings.load(**{name: value for name, value in given.items() if value is not None})

    return made


def test_a_job_is_rendered_with_everything_encrypted(farm: Compose, load: Load, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "picture.png")
    job = {
        "version": 1,
        "model": "mini",
        "source": {"image": str(tmp_path / "picture.png")},
        "method": {"kind": "img2img"},
        "prompt": "a lake",
        "sampling": {"seed": 1, "steps": 4},
    }
    (farm.ports["worker"],) = free_ports(1)
    worker = farm.start("worker-cpu")
    for name in ("flower", "metrics"):
        farm.start(name)
    settings = load()
    assert settings.redis_url.startswith("rediss://")
    assert (settings.s3_endpoint_url or "").startswith("https://")
    with Farm(settings) as client:
        wait_until(lambda: client.workers() or not worker.alive, within_s=120, what="the worker is listed")
        queued = client.submit(job)
        queued.wait(120)
        assert queued.image().size == (64, 64)
    assert farm.healthy("s3")
    for name in ("flower", "metrics"):
        wait_until(lambda name=name: farm.healthy(name), within_s=60, what=f"{name}'s health check")
    app = make_app(settings.redis_url)
    lengths = Broker(app.conf.broker_url, broker_use_ssl=app.conf.broker_use_ssl).queues(["m.mini"])
    assert asyncio.run(lengths) == [{"name": "m.mini", "messages": 0}], "Flower reads the queues"


@pytest.mark.parametrize("why", ["another authority", "the system's authorities", "another name"])
def test_a_server_that_is_not_who_it_should_be_is_refused(load: Load, tmp_path: Path, why: str) -> None:
    good = load()
    redis_url = str(good.redis_url).partition("?")[0]
    changes: dict[str, Any] = {"redis_ca_file": None, "s3_ca_file": None}
    if why == "another authority":
        other = authority(tmp_path / "other") / "clients" / "ca.crt"
        changes = {"redis_ca_file": other, "s3_ca_file": other}
    if why == "another name":
        changes = {
            "redis_url": redis_url.replace("@127.0.0.1:", f"@{NO_NAME}:"),
            "s3_endpoint_url": (good.s3_endpoint_url or "").replace("127.0.0.1", NO_NAME),
        }
    settings = load(**changes)
    with (
        Farm(settings) as client,
        pytest.raises(LedgerUnreachable, match="certificate that is not trusted") as no,
    ):
        client.workers()
    assert "OVERPAINT_REDIS_CA_FILE" in str(no.value.fix)
    with pytest.raises(StoreUnreachable, match="is not trusted") as refused:
        Store(settings.store()).has_input("default", "0" * 64)
    assert "OVERPAINT_S3_CA_FILE" in str(refused.value.fix)
    with (
        make_app(settings.redis_url).connection() as celery,
        pytest.raises(OperationalError, match="VERIFY_FAILED"),
    ):
        celery.ensure_connection(max_retries=1, interval_start=0)


def test_a_client_without_tls_gets_nothing(load: Load) -> None:
    good = load()
    plain = load(
        redis_url=str(good.redis_url).partition("?")[0].replace("rediss:", "redis:"),
        s3_endpoint_url=(good.s3_endpoint_url or "").replace("https:", "http:"),
        redis_ca_file=None,
        s3_ca_file=None,
    )
    with Farm(plain) as client, pytest.raises(LedgerUnreachable):
        client.workers()
    with pytest.raises(StoreError):
        Store(plain.store()).has_input("default", "0" * 64)


def test_an_authority_for_a_server_without_tls_is_refused(load: Load) -> None:
    with pytest.raises(SettingsError, match="redis_ca_file: is for TLS, and redis_url names a server"):
        load(redis_url="redis://127.0.0.1:6379/0")
    with pytest.raises(SettingsError, match="s3_ca_file: is for TLS, and s3_endpoint_url names"):
        load(s3_endpoint_url="http://127.0.0.1:8333")


def test_a_file_that_holds_no_certificate_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    for file in ("ca.crt", "absent"):
        with pytest.raises(SettingsError, match="is not a file of certificates"):
            load(redis_ca_file=tmp_path / file)
