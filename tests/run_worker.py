"""Runs a real worker as tests want it: its engine's program is another, everything else as
`overpaint-worker` does.
"""

import json
import sys
from pathlib import Path

from overpaint_shared.settings import Settings
from overpaint_worker import logs
from overpaint_worker.main import run
from overpaint_worker.options import WorkerOptions

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    logs.configure(as_json=True)
    given["registry"] = Path(given["registry"])
    given["models"] = tuple(given["models"])
    given["warm"] = tuple(given.get("warm", ()))
    if "engine" in given:
        given["engine"] = tuple(given["engine"])
    run(WorkerOptions(**given), Settings.load())
