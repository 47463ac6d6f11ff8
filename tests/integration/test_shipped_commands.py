"""What each role of the farm as shipped can do with the library and each command that asks the farm."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from overpaint_producer import garbage
from overpaint_producer.cli import COMMANDS, run
from overpaint_producer.client import Farm
from overpaint_shared.errors import LedgerUnreachable
from tests.acceptance.commands import environment
from tests.integration.hand import job, png, working
from tests.shipped import ROLES, Shipped

DATA = Path(__file__).parents[1] / "data"
AT_ONCE = timedelta(seconds=-5)


@pytest.mark.parametrize("role", ["producer", "operator", "worker"])
def test_these_roles_collect_garbage(shipped: Shipped, role: str) -> None:
    with (
        Farm.connect(shipped.settings("producer")) as producer,
        Farm.connect(shipped.settings("worker")) as worker,
        Farm.connect(shipped.settings(role)) as farm,
        working(worker),
    ):
        kept, orphan = (producer.store.put_input("default", png() + each) for each in (b"1", b"2"))
        producer.submit(job(source={"image": f"sha256:{kept}"}))
        found = garbage.find(farm.ledger, farm.store, min_age=AT_ONCE)
        assert [each.name for each in found if garbage.delete(farm.store, each)] == [
            f"inputs/default/{orphan}"
        ]
        assert producer.store.has_input("default", kept)
    assert shipped.redis.denied() == set()


def test_the_monitor_may_not_collect_garbage(shipped: Shipped) -> None:
    with Farm.connect(shipped.settings("monitor")) as farm:
        farm.store.put_input("default", png())
        with pytest.raises(LedgerUnreachable, match="denies its user a command"):
            list(garbage.find(farm.ledger, farm.store, min_age=AT_ONCE))


@dataclass
class Jobs:
    """One job of each kind, by its id; `spare` waits, too."""

    queued: str
    spare: str
    done: str
    failed: str
    dead: str
    folder: Path
    """Where commands are typed."""


@pytest.fixture
def jobs(shipped: Shipped, tmp_path: Path) -> Iterator[Jobs]:
    (tmp_path / "photo.png").write_bytes(png())
    (tmp_path / "job.json").write_text(json.dumps(job()))
    (tmp_path / "workflow.json").write_bytes((DATA / "workflows" / "img2img.json").read_bytes())
    producer, worker = (Farm.connect(shipped.settings(role)) for role in ("producer", "worker"))
    with producer, worker, working(worker) as hand:
        made = Jobs(*(producer.submit(job(), folder=tmp_path).id for _ in range(5)), folder=tmp_path)
        hand.render(made.done)
        hand.fail(made.failed, {"code": "bad_input", "message": "broken"})
        while (found := producer.ledger.job(made.dead)) and found.state.value != "dead":
            hand.crash(made.dead, hand.claim(made.dead).token)
        yield made


PRODUCERS = ("producer", "worker", "operator")
WORKERS = ("worker", "operator")
MAY = {
    "submit job.json": PRODUCERS,
    "status {done}": ROLES,
    "watch {done}": PRODUCERS,
    "get {done} --out out": PRODUCERS,
    "cancel {spare}": PRODUCERS,
    "jobs": PRODUCERS,
    "replay {failed}": PRODUCERS,
    "dead": ROLES,
    "dead list --all-owners": ROLES,
    "dead show {dead}": PRODUCERS,
    "dead replay {dead}": PRODUCERS,
    "dead discard {dead} --yes": WORKERS,
    "convert workflow.json --farm --model-map v1-5-pruned-emaonly.safetensors=tiny": ROLES,
    "workers": ROLES,
    "queues": ROLES,
    "why {queued}": PRODUCERS,
    "metrics --once": ROLES,
    "doctor": ROLES,
    "quota": PRODUCERS,
    "quota ann --max-queued 9": WORKERS,
    "audit": WORKERS,
}
"""Command -> who may."""
NOT_OF_THE_FARM = {"validate", "schema", "up", "version"}
QUIETLY = {("producer", "metrics --once"): {"producer: op:quarantine"}}
"""What a command does without when it may not see it."""


def test_each_command_that_asks_the_farm_is_in_the_table() -> None:
    assert {line.split()[0] for line in MAY} | NOT_OF_THE_FARM | {"gc"} == set(COMMANDS)


@pytest.mark.parametrize("line", MAY)
@pytest.mark.parametrize("role", ROLES)
def test_a_role_runs_the_commands_that_are_its_own_and_is_told_of_the_others(
    shipped: Shipped, jobs: Jobs, role: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(shipped.settings(role)).items():
            patch.setenv(name, value)
        patch.chdir(jobs.folder)
        code = run(line.format(**vars(jobs)).split())
    said = capfd.readouterr()
    if role in MAY[line]:
        assert code == 0, said
        assert "denies" not in said.out + said.err
        assert shipped.redis.denied() == QUIETLY.get((role, line), set())
    else:
        assert code == 3, said
        assert "docs/security.md" in said.err or "operator" in said.err
