"""What Redis' errors become. The words are those of Redis 7, whose clients take the first one off some."""

import pytest
from redis._parsers.base import BaseParser

from overpaint_shared.errors import LedgerFull, LedgerUnreachable
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


def test_a_command_that_is_wrong_is_a_defect_of_ours_and_stays_what_it_is() -> None:
    wrong = BaseParser.parse_error("WRONGTYPE Operation against a key holding the wrong kind of value")
    with pytest.raises(type(wrong), match="WRONGTYPE"), typed_errors("redis://host:6379/0"):
        raise wrong
