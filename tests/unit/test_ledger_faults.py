"""What Redis' errors become. The words are those of Redis 7, whose clients take the first one off some."""

import pytest
from redis._parsers.base import BaseParser

from overpaint_shared.errors import LedgerDamaged, LedgerFull, LedgerUnreachable
from overpaint_shared.ledger.events import Events
from overpaint_shared.ledger.faults import typed, typed_errors


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("READONLY You can't write against a read only replica.", LedgerUnreachable, "read-only replica"),
        ("NOREPLICAS Not enough good replicas to write.", LedgerUnreachable, "takes no writes"),
        ("BUSY Redis is busy running a script.", LedgerUnreachable, "takes no writes"),
        ("MASTERDOWN Link with MASTER is down.", LedgerUnreachable, "takes no writes"),
        ("LOADING Redis is loading the dataset in memory", LedgerUnreachable, "does not answer"),
        ("CLUSTERDOWN The cluster is down", LedgerUnreachable, "Cluster"),
        ("OOM command not allowed when used memory > 'maxmemory'.", LedgerFull, "maxmemory"),
        ("MISCONF Errors writing to the AOF file", LedgerFull, "disk"),
    ],
)
def test_what_a_server_cannot_do_now_is_an_expected_failure(
    line: str, kind: type[Exception], words: str
) -> None:
    error = typed(BaseParser.parse_error(line), "redis://host:6379/0")
    assert isinstance(error, kind)
    assert words in str(error)


class Silent:
    """A client whose server takes a subscription and says nothing."""

    closed = False

    def pubsub(self, **_: bool) -> "Silent":
        return self

    def subscribe(self, channel: str) -> None: ...

    def get_message(self, timeout: float) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_subscription_that_is_never_confirmed_is_an_expected_failure_and_leaves_nothing_open() -> None:
    client = Silent()
    with (
        pytest.raises(LedgerUnreachable, match="confirm"),
        Events(client, "redis://host:6379/0", "ann", None),
    ):
        pass
    assert client.closed


def test_a_command_that_is_wrong_is_a_defect_of_ours_and_stays_what_it_is() -> None:
    wrong = BaseParser.parse_error("ERR wrong number of arguments for 'get' command")
    with pytest.raises(type(wrong), match="wrong number"), typed_errors("redis://host:6379/0"):
        raise wrong


def test_a_key_of_another_type_is_told_as_damage_that_a_worker_mends() -> None:
    wrong = BaseParser.parse_error("WRONGTYPE Operation against a key holding the wrong kind of value")
    with pytest.raises(LedgerDamaged, match="a worker's reaper"), typed_errors("redis://host:6379/0"):
        raise wrong
