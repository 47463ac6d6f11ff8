"""Settings of the farm, read once at the edge and passed on as value objects.

A value comes from the first that has it: an option of the command, the environment (`OVERPAINT_<NAME>`), the
configuration file (TOML), the default. `Settings.load` is the only reader; `ledger()`, `store()` and
`limits()` give each part the frozen values it needs.
"""

import os
import re
import ssl
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_serializer,
    model_validator,
)

from overpaint_shared.errors import Problem, SettingsError, shorten
from overpaint_shared.explain import problems
from overpaint_shared.setting_views import Checksums, LedgerSettings, Limits, RedisUrl, StoreSettings
from overpaint_shared.spec.fields import Name, refuse, value_error

__all__ = [
    "Checksums",
    "LedgerSettings",
    "Limits",
    "RedisUrl",
    "Setting",
    "Settings",
    "StoreSettings",
    "config_places",
    "described",
    "environment_variable",
]

ENV_PREFIX: Final = "OVERPAINT_"
CONFIG_VARIABLE: Final = "OVERPAINT_CONFIG"
SECRETS: Final = frozenset(
    {"redis_url", "s3_endpoint_url", "s3_public_url", "s3_access_key", "s3_secret_key"}
)
"""Settings whose values may hold a secret (a URL its password): no error shows them."""


def _http_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^/\s@]+(/[^\s@]*)?", url):
        raise value_error("is not a URL of a server", allowed="http://HOST:PORT or https://HOST")
    return url


def _split(value: object) -> object:
    """A list in the environment is written with commas."""
    if isinstance(value, str):
        return tuple(part for part in (part.strip() for part in value.split(",")) if part)
    return value


def _ca_file(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one: a file that holds no certificate
        why = error.strerror or "it holds no certificate"
        raise value_error(
            f"is not a file of certificates: {why}", allowed="a readable file in PEM format"
        ) from None
    return path.resolve()


CaFile = Annotated[Path, AfterValidator(_ca_file)]
Bucket = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]
Seconds = Annotated[float, Field(ge=0.1, le=10_000_000, allow_inf_nan=False)]
KeptSeconds = Annotated[int, Field(ge=60, le=315_360_000)]


class Settings(BaseModel):
    """All settings of the farm; frozen. Read them with `Settings.load`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    _sources: Mapping[str, str] = PrivateAttr(default_factory=dict)

    redis_url: RedisUrl = Field(
        RedisUrl("redis://127.0.0.1:6379/0"), description="Redis, where job records and queues live."
    )
    redis_ca_file: CaFile | None = Field(
        None, description="File of the authority (PEM) that signed Redis' certificate; absent: the system's."
    )
    s3_endpoint_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        StoreSettings.endpoint_url, description="Address of the S3 server; absent: Amazon's own."
    )
    s3_public_url: Annotated[str, AfterValidator(_http_url)] | None = Field(
        StoreSettings.public_url,
        description="Address of the S3 server in signed links, if people reach it by another one.",
    )
    s3_bucket: Bucket = Field(StoreSettings.bucket, description="Bucket of inputs and results.")
    s3_access_key: str | None = Field(
        StoreSettings.access_key, description="Access key; absent: boto3's own chain of credentials."
    )
    s3_secret_key: SecretStr | None = Field(StoreSettings.secret_key, description="Secret key.")
    s3_region: str = Field(StoreSettings.region, min_length=1, description="Region of the bucket.")
    s3_checksums: Checksums = Field(
        StoreSettings.checksums,
        description="When to send the newer S3 checksums; `when_required` suits servers other than Amazon's.",
    )
    s3_timeout_s: float = Field(
        StoreSettings.timeout_s,
        ge=6,
        le=3600,
        description="Seconds for which a call to an S3 server that does not answer is tried.",
    )
    s3_read_buckets: Annotated[tuple[Bucket, ...], BeforeValidator(_split)] = Field(
        StoreSettings.read_buckets,
        description="Buckets that `s3://bucket/key` pictures may name; with commas in the environment.",
    )
    s3_ca_file: CaFile | None = Field(
        StoreSettings.ca_file,
        description="File of the authority (PEM) that signed the S3 server's certificate; "
        "absent: the system's.",
    )
    owner: Name = Field("default", description="Whose jobs these are: scopes tokens, inputs and fair share.")
    registry: Path | None = Field(
        None, description="The worker's model registry, a `models.toml`; absent: the shipped miniatures."
    )

    lease_s: Seconds = Field(
        LedgerSettings.lease_s,
        description="A job whose worker is silent this many seconds is given to another.",
    )
    renew_s: Seconds = Field(
        LedgerSettings.renew_s, description="Seconds between a worker's renewals; at most half of `lease_s`."
    )
    reap_s: Seconds = Field(
        LedgerSettings.reap_s, description="Seconds between two looks for abandoned jobs."
    )
    reap_grace_s: Seconds = Field(
        LedgerSettings.reap_grace_s,
        description="Seconds before a waiting job without a message gets a new one.",
    )
    window: int = Field(
        LedgerSettings.window,
        ge=1,
        le=100_000,
        description="Messages that one owner may have waiting per model and priority class (fair share).",
    )
    max_crashes: int = Field(
        LedgerSettings.max_crashes, ge=0, le=100, description="Engine crashes of a job before it is dead."
    )
    max_lost_hosts: int = Field(
        LedgerSettings.max_lost_hosts,
        ge=0,
        le=100,
        description="Lost workers of a job within an hour before it is dead.",
    )
    keep_done_s: KeptSeconds = Field(
        LedgerSettings.keep_done_s, description="Seconds that the record of a done job is kept."
    )
    keep_failed_s: KeptSeconds = Field(
        LedgerSettings.keep_failed_s,
        description="Seconds that the record of a failed, cancelled or dead job is kept.",
    )
    worker_ttl_s: Seconds = Field(
        LedgerSettings.worker_ttl_s, description="Seconds after which a silent worker is no longer listed."
    )
    age_s: Seconds = Field(
        LedgerSettings.age_s, description="A job that waits this many seconds moves up one priority class."
    )
    unable_after_s: Seconds = Field(
        LedgerSettings.unable_after_s,
        description="A job that no live worker can render fails after this many seconds.",
    )

    max_input_bytes: ByteSize = Field(
        ByteSize(Limits.max_input_bytes),
        ge=1,
        description="Bytes of one input picture, checked before decoding.",
    )
    max_job_bytes: ByteSize = Field(
        ByteSize(Limits.max_job_bytes), ge=1, description="Bytes of all input pictures of one job together."
    )
    max_decoded_bytes: ByteSize = Field(
        ByteSize(Limits.max_decoded_bytes),
        ge=1,
        description="Bytes that all input pictures of one job take when they are decoded, checked before.",
    )
    max_pixels: int = Field(
        Limits.max_pixels, ge=64, description="Pixels of one input picture, checked before decoding."
    )
    max_frames: int = Field(Limits.max_frames, ge=1, description="Frames of one input picture.")
    max_steps: int = Field(Limits.max_steps, ge=1, le=10_000, description="Sampling steps of one job.")
    max_output_pixels: int = Field(
        Limits.max_output_pixels, ge=64, description="Pixels of a job's canvas and of its result."
    )

    @field_serializer("redis_url", when_used="json")
    def _hide_password(self, url: RedisUrl) -> str:
        return url.shown

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        if self.renew_s * 2 > self.lease_s:
            raise refuse(
                _unfit("renew_s", self.renew_s, f"at most half of lease_s, which is {self.lease_s:g}")
            )
        if self.worker_ttl_s < self.renew_s * 2:
            raise refuse(
                _unfit(
                    "worker_ttl_s", self.worker_ttl_s, f"at least twice renew_s, which is {self.renew_s:g}"
                )
            )
        return self

    @model_validator(mode="after")
    def _trust(self) -> Self:
        """Put the authority into the URL, which is what every client of Redis gets."""
        for name, url in (("redis_ca_file", self.redis_url), ("s3_ca_file", self.s3_endpoint_url)):
            if getattr(self, name) and (url or "").startswith(("redis:", "http:")):
                shown = name.replace("ca_file", "url" if name.startswith("redis") else "endpoint_url")
                raise refuse(_plain_text(name, shown))
        if self.redis_ca_file:
            self.__dict__["redis_url"] = self.redis_url.trusting(self.redis_ca_file)
        return self

    @classmethod
    def load(cls, config: Path | None = None, **overrides: Any) -> Self:
        """Read the settings. Raises SettingsError, which names the variable or the line to mend.

        `config` is the TOML file; absent: `OVERPAINT_CONFIG`, else the first of `CONFIG_PLACES` that exists.
        `overrides` are options of a command; those that are None count as not given.
        """
        named = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
        file = named or next((place for place in config_places() if place.is_file()), None)
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for source, found in (
            (f"in {file}", _from_file(file) if file else {}),
            ("environment", _from_environment(cls.model_fields)),
            ("option", {name: value for name, value in overrides.items() if value is not None}),
        ):
            values |= found
            sources |= dict.fromkeys(found, source)
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error, sources) from None
        settings._sources = sources  # noqa: SLF001 - our own
        return settings

    def source(self, name: str) -> str | None:
        """Where a setting's value was given: "option", "environment", "in FILE", or None for the default."""
        return self._sources.get(name)

    def ledger(self) -> LedgerSettings:
        """What the ledger needs."""
        return LedgerSettings(**{field.name: getattr(self, field.name) for field in fields(LedgerSettings)})

    def store(self) -> StoreSettings:
        """What the store needs."""
        names = [field.name for field in fields(StoreSettings)]
        return StoreSettings(**{name: getattr(self, f"s3_{name}") for name in names})

    def limits(self) -> Limits:
        """What one job may ask for."""
        return Limits(**{field.name: int(getattr(self, field.name)) for field in fields(Limits)})


def environment_variable(name: str) -> str:
    """The variable that sets a setting: `lease_s` is `OVERPAINT_LEASE_S`."""
    return ENV_PREFIX + name.upper()


def config_places() -> tuple[Path, ...]:
    """Where the configuration file is looked for when none is named, first to last."""
    return (Path("overpaint-data/farm.toml"), Path.home() / ".config" / "overpaint" / "farm.toml")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What help and documentation say of one setting."""

    name: str
    variable: str
    default: str
    description: str


def described() -> list[Setting]:
    """Every setting, in order, for help texts."""
    return [
        Setting(
            name=name,
            variable=environment_variable(name),
            default=_shown(field.default),
            description=field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]


def _shown(default: object) -> str:
    if default is None or default == ():
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _from_environment(names: Mapping[str, Any]) -> dict[str, str]:
    """What is set; an empty variable counts as not set."""
    found = {name: os.environ.get(environment_variable(name), "") for name in names}
    return {name: value for name, value in found.items() if value}


def _from_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"the configuration file cannot be read: {error.strerror}",
            field=str(file),
            value=str(file),
            fix=f"name a TOML file by --config or {CONFIG_VARIABLE}, or neither",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the configuration file is not TOML: {error}", field=str(file), fix="mend that line"
        ) from error


def _explain(error: ValidationError, sources: Mapping[str, str]) -> SettingsError:
    found = problems(error, Settings, show=_masked)
    return SettingsError("the settings are wrong:", [_located(problem, sources) for problem in found])


def _masked(loc: Sequence[int | str], value: object) -> str:
    """A given value for people; of secrets only that there is one."""
    name = str(loc[0]) if loc else ""
    return "the value" if name in SECRETS else shorten(value, 80)


def _located(problem: Problem, sources: Mapping[str, str]) -> Problem:
    """The problem, with its path naming the variable, the file's line or the option that must change."""
    name = re.split(r"[.\[]", problem.path)[0]
    source = sources.get(name, "environment")
    if source == "environment":
        path = environment_variable(name)
    else:
        path = problem.path if source == "option" else f"{problem.path} ({source})"
    message = problem.message.replace("a key that is known here", "a setting")
    return replace(problem, path=path, message=message)


def _plain_text(name: str, url: str) -> Problem:
    return Problem(
        path=name,
        message=f"is for TLS, and {url} names a server without it",
        given="a file",
        allowed=f"{url} with rediss:// or https://, or no {name}",
    )


def _unfit(name: str, value: float, allowed: str) -> Problem:
    return Problem(
        path=name, message=f"{value:g} does not fit the other times", given=f"{value:g}", allowed=allowed
    )
