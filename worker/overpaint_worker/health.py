"""`python -m overpaint_worker.health`: whether a worker of this host is in the ledger, for containers.

Listed is who has its engine up and said so within `worker_ttl_s`. Without Redis nobody is: do not let this
end workers, which render on while Redis is away.
"""

import socket
import sys

from overpaint_shared.errors import OverpaintError
from overpaint_shared.ledger import Ledger
from overpaint_shared.settings import Settings


def problem(settings: Settings, host: str) -> str | None:
    """Why `host` has no worker that takes jobs; None if it has one."""
    ledger = Ledger.connect(settings.redis_url, settings.ledger())
    try:
        if any(worker.host == host for worker in ledger.workers()):
            return None
    finally:
        ledger.close()
    return f"no worker of {host} is listed"


def main() -> None:
    """Exit with 1 and a line for people unless all is well."""
    try:
        found = problem(Settings.load(), socket.gethostname())
    except OverpaintError as error:
        found = str(error)
    if found:
        sys.exit(f"overpaint-worker: {found}")


if __name__ == "__main__":
    main()
