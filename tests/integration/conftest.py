"""A ledger on the test run's Redis."""

import pytest

from overpaint_shared.ledger import (
    Ledger,
)
from tests.integration.ledgers import ledger


@pytest.fixture
def books(redis_url: str) -> Ledger:
    """Whose reaper acts at once."""
    return ledger(redis_url)
