"""What the exporters say, scraped from a real worker and ledger; dashboard and rules ask for nothing else."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from overpaint_producer import exporter
from overpaint_shared.errors import SettingsError
from overpaint_shared.ledger import JobState, Ledger
from overpaint_shared.setting_views import LedgerSettings
from overpaint_worker.metrics import Metrics
from tests import fake_engine
from tests.waiting import wait_until
from tests.workers import REPOSITORY, TestFarm, WorkerProcess

DASHBOARD = REPOSITORY / "deploy" / "grafana" / "overpaint.json"
RULES = REPOSITORY / "deploy" / "prometheus" / "alerts.yml"
DOCS = REPOSITORY / "docs" / "metrics.md"
SERIES = re.compile(r"\boverpaint_[a-z_]+")
BASE_UNITS = ("_seconds", "_bytes", "_total", "_info")

_told: list[tuple[str, str]] = []
"""What `rendered` scraped: once for all tests of this file."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, tuple(sorted(labels.items()))))


def scrape(worker: WorkerProcess) -> str:
    address = str(worker.until("metrics.serving")["address"])
    with urllib.request.urlopen(address, timeout=10) as reply:  # noqa: S310  # our own
        return str(reply.read().decode())


@pytest.fixture
def rendered(farm: TestFarm) -> tuple[str, str]:
    """The text of both exporters, of a farm that has done, failed and cancelled jobs, and given some back."""
    if not _told:
        _told.append(_scraped(farm))
    return _told[0]


def _scraped(farm: TestFarm) -> tuple[str, str]:
    worker = farm.start(models=("tiny", "torn"), metrics_port=0, warm=["tiny"]).ready()
    done = farm.submit(*[farm.spec(steps=4) for _ in range(3)])
    (failed,) = farm.submit(farm.spec(do="fail"))
    (long,) = farm.submit(farm.long())
    farm.stepping(long)
    farm.ledger.cancel(long)
    farm.all_ended([*done, failed, long])
    (unable,) = farm.submit(farm.spec(do="unable"))
    farm.until(unable, JobState.FAILED)
    wait_until(
        lambda: value(samples(scrape(worker)), "overpaint_engine_rows_total"), what="the engine's word"
    )
    return scrape(worker), exporter.text(farm.ledger)


def test_a_worker_tells_what_its_jobs_did_and_where_their_time_went(rendered: tuple[str, str]) -> None:
    found = samples(rendered[0])

    def ended(outcome: str) -> float | None:
        return value(found, "overpaint_attempts_ended_total", model="tiny", method="img2img", outcome=outcome)

    assert (ended("done"), ended("failed"), ended("cancelled")) == (3, 1, 1)
    released = ended("released")
    assert released is not None
    assert released == value(found, "overpaint_job_releases_total", reason="unable")
    assert value(found, "overpaint_attempts_total") == 5 + released
    assert value(found, "overpaint_job_cancels_total") == 1
    for stage, jobs in (("wait", 5 + released), ("fetch", 5 + released), ("store", 3), ("commit", 5)):
        assert value(found, "overpaint_job_stage_seconds_count", stage=stage) == jobs, stage
    steps, rows = value(found, "overpaint_engine_steps_total"), value(found, "overpaint_engine_rows_total")
    passes = value(found, "overpaint_engine_passes_total")
    assert steps is not None and rows is not None and passes is not None  # noqa: PT018
    assert steps >= 3 * 4
    assert rows >= 2 * steps  # guidance takes two rows a step
    assert 0 < passes <= steps + 2
    assert value(found, "overpaint_model_load_seconds_count", model="tiny") == 1
    assert value(found, "overpaint_model_load_seconds_count", model="torn") == 0, "told before the first"
    assert value(found, "overpaint_model_load_seconds_sum", model="tiny") == 0.5
    assert value(found, "overpaint_model_loaded", model="tiny") == 1
    assert value(found, "overpaint_device_memory_total_bytes") == 1
    assert value(found, "overpaint_worker_engine_up") == 1


def test_the_farm_tells_its_jobs_by_state_model_and_method(rendered: tuple[str, str]) -> None:
    found = samples(rendered[1])
    for state, jobs in (("done", 3), ("failed", 2), ("cancelled", 1)):
        assert value(found, "overpaint_jobs", state=state, model="tiny", method="") == jobs
        assert value(found, "overpaint_job_transitions_total", state=state, model="tiny", method="") == jobs
    dead = value(found, "overpaint_job_transitions_total", state="dead", model="tiny", method="")
    assert dead == 0, "told before the first, or no rate would see it"
    assert value(found, "overpaint_queue_depth", model="tiny") == 0
    assert value(found, "overpaint_queue_oldest_age_seconds", model="tiny") == 0
    assert value(found, "overpaint_workers_serving", model="tiny") == 1
    assert value(found, "overpaint_ledger_up") == 1


def test_a_queue_is_told_over_all_priorities(farm: TestFarm) -> None:
    for priority in (0, 5, 9):
        farm.submit(farm.spec(), priority=priority)
    found = samples(exporter.text(farm.ledger))
    assert value(found, "overpaint_queue_depth", model="tiny") == 3
    oldest = value(found, "overpaint_queue_oldest_age_seconds", model="tiny")
    assert oldest is not None
    assert 0 < oldest < 60


def asked() -> dict[str, set[str]]:
    """The series that dashboard and rules ask for, by where they do."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = {
        f"panel {panel['title']}": {
            series for target in panel.get("targets", ()) for series in SERIES.findall(target["expr"])
        }
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }
    rules = {
        f"rule {rule['alert']}": set(SERIES.findall(rule["expr"]))
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
    }
    return panels | rules


def test_every_series_of_the_dashboard_and_of_the_rules_is_exported(rendered: tuple[str, str]) -> None:
    exported = {name for text in rendered for name, _ in samples(text)}
    wanted = asked()
    assert len(wanted) > 30
    assert {where: missing for where, series in wanted.items() if (missing := series - exported)} == {}


def labels_asked() -> set[tuple[str, str]]:
    """Each series with each label that a selector, or a `by` around it, names."""
    exprs = [t["expr"] for p in json.loads(DASHBOARD.read_text())["panels"] for t in p.get("targets", ())]
    exprs += [r["expr"] for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]]
    found = set()
    for expr in exprs:
        for series, selector in re.findall(r"\b(overpaint_[a-z_]+)\{([^}]*)\}", expr):
            found |= {(series, label) for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector)}
        for labels, inside in re.findall(r"by \(([^)]*)\) \((?:\w+\()?(overpaint_[a-z_]+)", expr):
            found |= {(inside, label.strip()) for label in labels.split(",")}
    return found - {(series, label) for series, label in found if label in {"job", "instance"}}


def test_every_label_that_is_asked_for_is_exported(rendered: tuple[str, str]) -> None:
    exported = {(name, label) for text in rendered for name, labels in samples(text) for label, _ in labels}
    wanted = labels_asked()
    assert ("overpaint_job_transitions_total", "state") in wanted
    assert wanted - exported == set()


def test_names_and_units_follow_the_conventions(rendered: tuple[str, str]) -> None:
    families = [f for text in rendered for f in text_string_to_metric_families(text)]
    ours = [family for family in families if family.name.startswith("overpaint_")]
    assert len(ours) == len(families) > 25
    for family in ours:
        assert family.documentation.endswith("."), family.name
        names = {sample.name for sample in family.samples}
        assert (family.type == "counter") == any(name.endswith("_total") for name in names), family.name
        assert not re.search(r"_(ms|milliseconds|minutes|mib|gib|percent)\b", family.name)
        assert family.type != "histogram" or family.name.endswith("_seconds")


def test_every_series_is_documented_and_no_other(rendered: tuple[str, str]) -> None:
    told = set(re.findall(r"^\| `(overpaint_[a-z_]+)", DOCS.read_text(), re.MULTILINE))
    exported = {re.sub(r"_(bucket|count|sum)$", "", name) for text in rendered for name, _ in samples(text)}
    assert told == exported


def test_every_alert_is_documented_and_no_other() -> None:
    told = set(re.findall(r"^\| `(Overpaint\w+)`", DOCS.read_text(), re.MULTILINE))
    assert told == {
        rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }


@pytest.mark.parametrize("name", ["prometheus.yml", "compose.yml"])
def test_prometheus_reads_the_rules_and_scrapes_the_jobs_that_they_name(name: str) -> None:
    config = yaml.safe_load((RULES.parent / name).read_text())
    assert config["rule_files"] == [RULES.name]
    jobs = {scraped["job_name"] for scraped in config["scrape_configs"]}
    assert jobs == set(re.findall(r'job="([^"]+)"', RULES.read_text()))


def test_without_redis_the_exporter_says_that_it_is_away() -> None:
    away = Ledger.connect("redis://127.0.0.1:1/0", LedgerSettings())
    assert samples(exporter.text(away)) == {("overpaint_ledger_up", ()): 0}


def test_a_port_in_use_is_told_as_a_setting(farm: TestFarm) -> None:
    port = exporter.serve(farm.ledger, "127.0.0.1", 0)
    with pytest.raises(SettingsError, match=str(port)):
        exporter.serve(farm.ledger, "127.0.0.1", port)
    node: Any = object()
    with pytest.raises(SettingsError) as caught:
        Metrics().serve(node, "127.0.0.1", port)
    assert caught.value.field == "--metrics-port"


def test_metrics_are_not_served_unasked(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, JobState.DONE)
    assert worker.said("metrics.serving") == []


# A warm start


def test_a_worker_takes_no_job_before_its_models_are_loaded(farm: TestFarm) -> None:
    (job_id,) = farm.submit(farm.spec())
    worker = farm.start(warm=["tiny"], environment={fake_engine.LOAD_S: "0.5"})
    farm.until(job_id, JobState.DONE)
    order = [line["action"] for line in worker.lines if line.get("action") in {"model.loaded", "job.claimed"}]
    assert order == ["model.loaded", "job.claimed"]


def test_a_model_that_cannot_be_loaded_does_not_keep_the_worker_from_the_others(farm: TestFarm) -> None:
    worker = farm.start(
        models=("tiny", "torn"), warm=["torn", "tiny"], environment={fake_engine.UNLOADABLE: "torn"}
    )
    (job_id,) = farm.submit(farm.spec())
    farm.until(job_id, JobState.DONE)
    assert [line["model"] for line in worker.said("model.not_loaded")] == ["torn"]


def test_a_worker_says_what_it_renders_and_how_fast(farm: TestFarm) -> None:
    farm.start().ready()
    (job_id,) = farm.submit(farm.long(step_s=0.05))
    farm.stepping(job_id)
    found = wait_until(lambda: [w for w in farm.ledger.workers() if w.jobs and w.steps_per_s])[0]
    assert (found.jobs, found.warm, found.running) == ((job_id,), ("tiny",), 1)
    assert found.steps_per_s is not None
    assert 0 < found.steps_per_s <= 40


def test_every_line_about_a_job_names_job_attempt_token_and_worker(farm: TestFarm) -> None:
    worker = farm.start().ready()
    (job_id, long) = farm.submit(farm.spec(), farm.long())
    farm.until(job_id, JobState.DONE)
    farm.stepping(long)
    farm.ledger.cancel(long)
    farm.until(long, JobState.CANCELLED)
    lines = [line for line in worker.lines if str(line.get("action", "")).startswith("job.")]
    assert {str(line["action"]) for line in lines} >= {
        "job.claimed",
        "job.done",
        "job.cancelling",
        "job.cancelled",
    }
    for line in lines:
        assert {"job", "attempt", "token", "worker"} <= line.keys(), line
        assert line["worker"] == farm.job(job_id).worker_name
    for action in ("job.claimed", "job.done"):  # one line for one change
        assert len(worker.said(action, job=job_id)) == 1


def test_a_dashboard_can_be_imported() -> None:
    dashboard = json.loads(Path(DASHBOARD).read_text())
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", ()))
