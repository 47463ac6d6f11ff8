"""Runs a real worker as tests want it: its engine's program is another, everything else as
`overpaint-worker` does.

With `argv` the worker is started by that command line, as typed; without, by `WorkerOptions`.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from overpaint_shared.settings import Settings
from overpaint_worker import logs, main, node
from overpaint_worker.engine_process import Launch
from overpaint_worker.options import WorkerOptions


def typed(argv: list[str], stage_s: float | None = None, **fixed: Any) -> None:
    """Run the command, with options that its command line has not; `stage_s`: how long a picture may take."""
    if passed := fixed.pop("engine_env", None):
        argv = [*argv, "--engine-env", ",".join(passed)]
    if stage_s is not None:
        node.Launch = partial(Launch, cpu_stage_s=stage_s)  # type: ignore[misc,assignment]
    main.WorkerOptions = partial(WorkerOptions, **fixed)  # type: ignore[misc,assignment]
    sys.argv = ["overpaint-worker", *argv]
    main.main()


def made(given: dict[str, Any]) -> None:
    """Run a worker with these options."""
    logs.configure(as_json=True)
    if (stage_s := given.pop("stage_s", None)) is not None:
        node.Launch = partial(Launch, cpu_stage_s=stage_s)  # type: ignore[misc,assignment]
    given["registry"] = Path(given["registry"])
    given["models"] = tuple(given["models"])
    main.run(WorkerOptions(**given), Settings.load())


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    for name in ("warm", "engine", "engine_env"):
        if name in asked:
            asked[name] = tuple(asked[name])
    if "argv" in asked:
        typed(**asked)
    else:
        made(asked)
