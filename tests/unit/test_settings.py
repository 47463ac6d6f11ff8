"""Settings: where they come from, what they refuse, what they never show."""

import dataclasses
import logging
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from pydantic import SecretStr, ValidationError

from overpaint_producer.local_folder import write_config
from overpaint_shared.errors import SettingsError
from overpaint_shared.queues import make_app
from overpaint_shared.settings import (
    LedgerSettings,
    Limits,
    RedisUrl,
    Settings,
    StoreSettings,
    config_places,
    described,
    environment_variable,
)

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no file: neither in the working folder nor at home."""
    for setting in described():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("OVERPAINT_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def wrong(**overrides: object) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        Settings.load(**overrides)
    return caught.value


def test_without_anything_the_defaults_hold_and_agree_with_the_views() -> None:
    settings = Settings.load()
    assert settings.ledger() == LedgerSettings()
    assert settings.store() == StoreSettings()
    assert settings.limits() == Limits()
    assert settings.owner == "default"
    assert settings.source("window") is None


def test_an_option_beats_the_environment_and_the_environment_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "farm.toml"
    file.write_text('window = 1\nmax_steps = 11\nowner = "file"\n')
    monkeypatch.setenv("OVERPAINT_WINDOW", "2")
    monkeypatch.setenv("OVERPAINT_MAX_STEPS", "22")
    settings = Settings.load(file, window=3, owner=None)
    assert (settings.window, settings.max_steps, settings.owner) == (3, 22, "file")
    assert settings.source("window") == "option"
    assert settings.source("max_steps") == "environment"
    assert settings.source("owner") == f"in {file}"


def test_the_file_is_looked_for_where_the_documentation_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, home = config_places()
    home.parent.mkdir(parents=True)
    home.write_text("window = 1")
    assert Settings.load().window == 1
    here.parent.mkdir()
    here.write_text("window = 2")
    assert Settings.load().window == 2
    named = tmp_path / "named.toml"
    named.write_text("window = 3")
    monkeypatch.setenv("OVERPAINT_CONFIG", str(named))
    assert Settings.load().window == 3
    assert Settings.load(here).window == 2


def test_a_bad_value_names_its_variable_the_value_and_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPAINT_WINDOW", "0")
    (problem,) = wrong().problems
    assert problem.path == "OVERPAINT_WINDOW"
    assert problem.given == '"0"'
    assert problem.allowed == "1 to 100000"


def test_a_bad_value_of_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "farm.toml"
    file.write_text("windov = 3\nlease_s = 'x'")
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    assert f"windov (in {file}): is not a setting. Did you mean window?" in str(caught.value)
    assert f'lease_s (in {file}): "x" is not a number' in str(caught.value)


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "farm.toml"
    with pytest.raises(SettingsError, match=r"farm\.toml: the configuration file cannot be read.*--config"):
        Settings.load(file)
    file.write_text("window = \n")
    with pytest.raises(SettingsError, match="line 1"):
        Settings.load(file)
    file.write_bytes(b"\xff")
    with pytest.raises(SettingsError, match="not TOML"):
        Settings.load(file)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "1e9", "twenty"])
def test_a_time_is_a_finite_number_of_seconds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OVERPAINT_AGE_S", value)
    assert [problem.path for problem in wrong().problems] == ["OVERPAINT_AGE_S"]


def test_times_that_do_not_fit_each_other_are_refused() -> None:
    assert Settings.load(lease_s=10, renew_s=5)
    assert "at most half of lease_s" in str(wrong(lease_s=9.9, renew_s=5))
    assert "at least twice renew_s" in str(wrong(worker_ttl_s=9.9, renew_s=5))


def test_lists_are_written_with_commas_and_sizes_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPAINT_S3_READ_BUCKETS", "photos, scans,")
    monkeypatch.setenv("OVERPAINT_MAX_INPUT_BYTES", "2MiB")
    settings = Settings.load()
    assert settings.store().read_buckets == ("photos", "scans")
    assert settings.limits().max_input_bytes == 2 * 2**20
    assert type(settings.limits().max_input_bytes) is int


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERPAINT_WINDOW", "")
    assert Settings.load().window == LedgerSettings.window


SECRETS = {
    "redis_url": "redis://farm:hunter2@10.0.0.1:6379/0",
    "s3_secret_key": "hunter2",
}


def test_secrets_are_in_no_text_that_settings_give(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.load(**SECRETS)
    logging.getLogger("test").warning("settings: %s %r %s", settings, settings, settings.store())
    texts = [
        repr(settings),
        str(settings),
        f"{settings}",
        repr(settings.store()),
        str(settings.store()),
        repr(settings.redis_url),
        settings.redis_url.shown,
        settings.model_dump_json(),
        repr(settings.model_dump()),
        caplog.text,
    ]
    assert not [text for text in texts if "hunter2" in text]
    assert "10.0.0.1" in settings.redis_url.shown
    assert str(settings.redis_url) == SECRETS["redis_url"]
    secret = settings.store().secret_key
    assert secret is not None
    assert secret.get_secret_value() == "hunter2"


def test_secrets_are_in_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OVERPAINT_REDIS_URL", "http://farm:hunter2@host/")
    monkeypatch.setenv("OVERPAINT_S3_ENDPOINT_URL", "http://farm:hunter2@host/")
    file = tmp_path / "farm.toml"
    file.write_text("s3_secret_key = ['hunter2']")
    with pytest.raises(SettingsError) as caught:
        Settings.load(file)
    assert len(caught.value.problems) == 3
    for text in (str(caught.value), repr(caught.value), str(caught.value.to_json())):
        assert "hunter2" not in text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:p@host/0", "redis://:***@host/0"),
        ("rediss://u:p@ss/w@host", "rediss://u:***@host"),
        ("redis://host/0?password=p&db=1", "redis://host/0?password=***&db=1"),
    ],
)
def test_a_redis_url_hides_its_password_alone(url: str, shown: str) -> None:
    assert RedisUrl(url).shown == shown


@pytest.mark.parametrize("sign", ["/", "?", "#", "[", "]"])
def test_a_password_that_hides_the_host_is_refused_with_how_to_write_it(sign: str) -> None:
    told = str(wrong(redis_url=f"redis://farm:hun{sign}ter2@10.0.0.1:6379/0"))
    assert "in a password write" in told
    assert "ter2" not in told


@pytest.mark.parametrize(
    "url", ["redis://h:99999/0", "redis://h/x", "redis://farm:pw@", "redis://h:port/0", "redis://h/0#x"]
)
def test_a_redis_url_with_a_part_that_cannot_be_read_is_refused(url: str) -> None:
    assert "cannot be read" in str(wrong(redis_url=url))


@pytest.mark.parametrize("password", ["a/b", "a#b?c", "a@b:c", "50%", "%2F", "[x]", "a b"])
def test_any_password_that_is_written_as_a_url_wants_it_reaches_redis_and_celery(password: str) -> None:
    url = Settings.load(redis_url=f"redis://farm:{quote(password, safe='')}@10.0.0.1:6379/0").redis_url
    assert redis.Redis.from_url(url).connection_pool.connection_kwargs["password"] == password
    with make_app(url).connection() as connection:
        assert connection.password == password
    assert quote(password, safe="") not in url.shown


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "http://host",
        "redis://",
        "redis://a b",
        "unix:///run/redis.sock",
        "redis://h/0?password=p",
        "",
    ],
)
def test_what_is_no_redis_url_is_refused(url: str) -> None:
    if url:
        assert "redis://HOST:PORT/DB" in str(wrong(redis_url=url))
    with pytest.raises(ValidationError):
        Settings(redis_url=url)  # type: ignore[arg-type]


def test_what_up_writes_is_read_as_it_was(tmp_path: Path) -> None:
    file, registry = tmp_path / "farm.toml", tmp_path / 'modèles \U0001f3a8 "x"' / "models.toml"
    write_config(file, {"registry": registry, "s3_secret_key": SecretStr("hunter2"), "s3_public_url": None})
    settings = Settings.load(file)
    assert settings.registry == registry
    assert settings.s3_secret_key == SecretStr("hunter2")


def test_settings_and_views_are_frozen() -> None:
    settings = Settings.load()
    with pytest.raises(ValidationError):
        settings.window = 3
    for view in (settings.ledger(), settings.store(), settings.limits()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(view, dataclasses.fields(view)[0].name, 1)


def test_every_setting_is_documented_with_its_variable_and_default() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for setting in described():
        assert setting.description
        row = next((line for line in text.splitlines() if line.startswith(f"| `{setting.name}`")), "")
        assert f"`{setting.variable}`" in row, setting.name
        assert f"`{setting.default}`" in row, (setting.name, setting.default)
        assert setting.variable == environment_variable(setting.name)


def test_the_documentation_names_no_setting_that_is_not_there() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [setting.name for setting in described()]
