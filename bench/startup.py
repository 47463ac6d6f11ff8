"""CPU seconds of `overpaint --help`, and how many times a bare `python -c pass` that is.

    python bench/startup.py [--runs 10] [--json]

User and system time of the child, from the operating system; the median of the runs. The ratio says more
than the seconds on a machine that does other things, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

OVERPAINT = Path(sysconfig.get_path("scripts")) / "overpaint"
TARGET_S = 0.5


def cpu_s(command: list[str]) -> float:
    """User and system seconds of one run."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime + usage.ru_stime


def median_s(command: list[str], runs: int) -> float:
    """The median of several runs, after one that fills the caches."""
    cpu_s(command)
    return statistics.median(cpu_s(command) for _ in range(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bare = median_s([sys.executable, "-c", "pass"], options.runs)
    measured = {
        name: median_s([str(OVERPAINT), *argv], options.runs)
        for name, argv in (
            ("--help", ["--help"]),
            ("submit --help", ["submit", "--help"]),
            ("version", ["version"]),
        )
    }
    if options.json:
        print(json.dumps({"bare_s": bare, "target_s": TARGET_S, "cpu_s": measured}))
        return
    print(f"{'python -c pass':26} {bare:6.3f} s")
    for name, seconds in measured.items():
        print(f"{'overpaint ' + name:26} {seconds:6.3f} s   {seconds / bare:4.1f} x")
    print(f"target for --help: under {TARGET_S} s of CPU")


if __name__ == "__main__":
    main()
