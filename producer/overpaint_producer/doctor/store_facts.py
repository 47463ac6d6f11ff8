"""What the bucket allows, tried with objects of a name of their own that are deleted again."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import botocore.exceptions as boto

from overpaint_producer.doctor.findings import Unknown
from overpaint_producer.doctor.local_facts import DATA
from overpaint_producer.doctor.redis_facts import is_loopback
from overpaint_producer.weed_ports import grpc_ports, open_to_strangers
from overpaint_shared.errors import StoreError
from overpaint_shared.store_keys import RESULTS

if TYPE_CHECKING:
    from overpaint_shared.settings import Settings
    from overpaint_shared.store import Store

PROBE: Final = "doctor-"
LEFT_OVER: Final = timedelta(minutes=10)
TOKEN: Final = 1


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """One bucket."""

    endpoint: str
    bucket: str
    rights: dict[str, StoreError | None] = field(default_factory=dict)
    """What was tried, in order -> why it failed, None where it worked."""
    conditional: bool | Unknown = True
    """Whether the server refuses to write over an object that is there, when asked to."""
    clock_ahead_s: float | Unknown = 0.0
    """How much this machine's clock is ahead of the server's."""
    versioning: str | Unknown = ""
    lifecycle: tuple[str, ...] | Unknown = ()
    """Prefixes of which the server deletes or moves old objects by itself."""

    open_grpc: tuple[int, ...] | None = None
    """SeaweedFS's own ports that let strangers in; None: it is another server."""

    @property
    def is_private(self) -> bool:
        """The connection is encrypted, or stays on this machine."""
        scheme, _, rest = self.endpoint.partition("://")
        return scheme != "http" or is_loopback(rest)


def gather(settings: "Settings") -> StoreFacts:
    """Try the bucket. Raises StoreError where not even a list can be had."""
    from overpaint_shared.store import Store

    store = Store(settings.store())
    store.ping()
    rights: dict[str, StoreError | None] = {"list": None}
    name, data = f"{PROBE}{uuid.uuid4().hex[:16]}", b"overpaint doctor"
    rights["write"] = _failure(lambda: store.put_result(name, TOKEN, "probe.txt", data, "text/plain"))
    conditional: bool | Unknown = Unknown("nothing could be written")
    if rights["write"] is None:
        rights["read"] = _failure(lambda: store.get(f"{RESULTS}{name}/{TOKEN}/probe.txt", 1024))
        conditional = _refuses_a_second_write(store, name)
    rights["delete"] = _failure(lambda: store.delete_attempt(name, TOKEN))
    _delete_left_over(store)
    return StoreFacts(
        endpoint=store.endpoint,
        bucket=store.settings.bucket,
        rights=rights,
        conditional=conditional,
        clock_ahead_s=_clock_ahead_s(store),
        versioning=_asked(lambda: _versioning(store)),
        lifecycle=_asked(lambda: _lifecycle(store)),
        open_grpc=_open_grpc(store),
    )


def _open_grpc(store: "Store") -> tuple[int, ...] | None:
    answer = store.client.list_objects_v2(Bucket=store.settings.bucket, MaxKeys=1)
    if not answer["ResponseMetadata"]["HTTPHeaders"].get("server", "").startswith("SeaweedFS"):
        return None
    where = urlsplit(store.endpoint)
    port = where.port or (443 if where.scheme == "https" else 80)
    return open_to_strangers(where.hostname or "", grpc_ports(port, DATA / "s3" / "ports.json"))


def _failure(attempt: Callable[[], object]) -> StoreError | None:
    try:
        attempt()
    except StoreError as error:
        return error
    return None


def _refuses_a_second_write(store: "Store", name: str) -> bool:
    failure = _failure(lambda: store.put_result(name, TOKEN, "probe.txt", b"other bytes", "text/plain"))
    return failure is not None


def _delete_left_over(store: "Store") -> None:
    """Delete probes of doctors that were stopped in the middle."""
    found = store.client.list_objects_v2(
        Bucket=store.settings.bucket, Prefix=f"{RESULTS}{PROBE}", MaxKeys=100
    )
    for each in found.get("Contents", []):
        if datetime.now(UTC) - each["LastModified"] > LEFT_OVER:
            with suppress(StoreError):
                store.delete_attempt(each["Key"].split("/")[1], TOKEN)


def _clock_ahead_s(store: "Store") -> float | Unknown:
    began = time.time()
    answer = store.client.list_objects_v2(Bucket=store.settings.bucket, MaxKeys=1)
    middle = (began + time.time()) / 2
    told = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return middle - parsedate_to_datetime(told).timestamp() - 0.5  # told in whole seconds
    except (TypeError, ValueError):
        return Unknown("the server does not tell its time")


def _asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except boto.ClientError as error:
        return Unknown(str(error.response.get("Error", {}).get("Code", "refused")))


def _versioning(store: "Store") -> str:
    return str(store.client.get_bucket_versioning(Bucket=store.settings.bucket).get("Status", ""))


def _lifecycle(store: "Store") -> tuple[str, ...]:
    try:
        found = store.client.get_bucket_lifecycle_configuration(Bucket=store.settings.bucket)
    except boto.ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration":
            return ()
        raise
    rules = [rule for rule in found.get("Rules", []) if rule.get("Status") == "Enabled"]
    return tuple(_prefix(rule) for rule in rules if "Expiration" in rule or "Transitions" in rule)


def _prefix(rule: Any) -> str:
    return str(rule.get("Prefix") or rule.get("Filter", {}).get("Prefix") or "")
