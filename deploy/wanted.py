"""Prints what an image needs besides our own code, one requirement a line.

    wanted.py [--extra EXTRA] [NAME ...]

So that images can install it in a layer of its own, before the code is there.
"""

import argparse
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--extra", action="append", default=[])
parser.add_argument("names", nargs="*")
given = parser.parse_args()
project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = [*project["dependencies"], *given.names]
for extra in given.extra:
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
