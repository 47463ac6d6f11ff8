"""The frozen values that `Settings` hands to each part of the farm."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, urlsplit

from pydantic import GetCoreSchemaHandler, SecretStr
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from overpaint_shared.spec.fields import value_error

Checksums = Literal["when_required", "when_supported"]


class RedisUrl(str):
    """A Redis URL; its `repr` and `shown` hide the password, `str()` does not (clients need it)."""

    __slots__ = ()

    @classmethod
    def parse(cls, url: str) -> Self:
        """The URL, if it is one that redis-py and Celery both take; else pydantic's error in our words."""
        allowed = "redis://HOST:PORT/DB, redis://USER:PASSWORD@HOST:PORT/DB, or rediss://..."
        if not re.fullmatch(r"rediss?://\S+", url) or re.search(r"[?&](username|password)=", url):
            raise value_error("is not a Redis URL that Celery takes", allowed=allowed)
        if not _is_whole(url):
            if "@" in url:
                allowed += "; in a password write / as %2F, ? as %3F, # as %23, [ as %5B, ] as %5D, % as %25"
            raise value_error(
                "is not a Redis URL: its host, port or database cannot be read", allowed=allowed
            )
        return cls(url)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(cls.parse, handler(str))

    @property
    def shown(self) -> str:
        """The URL for people and logs: the password is replaced by `***`."""
        hidden = re.sub(r"(://[^/@:]*):.*@", r"\1:***@", self)
        return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)

    def __repr__(self) -> str:
        return repr(self.shown)

    def trusting(self, ca_file: Path) -> "RedisUrl":
        """The URL with the file of the authority that clients trust, unless it names one."""
        if "ssl_ca_certs=" in self:
            return self
        return RedisUrl(f"{self}{'&' if '?' in self else '?'}ssl_ca_certs={quote(str(ca_file))}")

    @property
    def tls(self) -> dict[str, Any] | None:
        """What Celery and Flower need beside a `rediss://` URL: without it they check no certificate."""
        if not self.startswith("rediss:"):
            return None
        ca = parse_qs(urlsplit(self).query).get("ssl_ca_certs")
        checked: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
        return checked | ({"ssl_ca_certs": ca[0]} if ca else {})


def _is_whole(url: str) -> bool:
    """Whether all parts of a Redis URL can be told apart; a password with `/`, `?` or `#` hides the host."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a port that is no number, or brackets
        return False
    rest = parts.path + parts.query + parts.fragment
    return bool(host and re.fullmatch(r"/?[0-9]*", parts.path) and "@" not in rest and not parts.fragment)


@dataclass(frozen=True, kw_only=True)
class LedgerSettings:
    """How the ledger counts time and failures. All `_s` are seconds."""

    lease_s: float = 20.0
    renew_s: float = 5.0
    reap_s: float = 3.0
    reap_grace_s: float = 15.0
    window: int = 64
    max_crashes: int = 3
    max_lost_hosts: int = 6
    keep_done_s: int = 86_400
    keep_failed_s: int = 604_800
    worker_ttl_s: float = 15.0
    age_s: float = 600.0
    unable_after_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Where pictures are kept. Without keys, boto3's own chain of credentials is asked."""

    endpoint_url: str | None = None
    public_url: str | None = None
    bucket: str = "overpaint"
    access_key: str | None = None
    secret_key: SecretStr | None = None
    region: str = "us-east-1"
    checksums: Checksums = "when_required"
    read_buckets: tuple[str, ...] = ()
    timeout_s: float = 60.0
    ca_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an operator lets one job ask for."""

    max_input_bytes: int = 64 * 2**20
    max_job_bytes: int = 256 * 2**20
    max_decoded_bytes: int = 2**30
    max_pixels: int = 64_000_000
    max_frames: int = 1
    max_steps: int = 1000
    max_output_pixels: int = 2**25
