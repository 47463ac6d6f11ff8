"""What each role of the farm as shipped can do with the library and the commands that run a farm."""

from datetime import timedelta

import pytest

from overpaint_producer import garbage
from overpaint_producer.client import Farm
from overpaint_shared.errors import LedgerUnreachable
from tests.integration.hand import job, png, working
from tests.shipped import Shipped

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
    with shipped.redis.client() as client:
        client.acl_log_reset()
