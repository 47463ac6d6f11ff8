"""Prints the part of requirements.lock that an image needs: pins, markers and hashes.

    wanted.py [--extra EXTRA] [NAME ...]

For `pip install --no-deps --require-hashes`, in a layer of its own, before our code is there. Which package
needs which is read from the lock's own comments (`# via ...`). torch has a lock of its own.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

OWN_LOCK = {"torch"}


def named(requirement: str) -> str:
    """The normal form of a requirement's name: `Boto3-stubs[s3]>=1` is `boto3-stubs`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


def locked(text: str) -> dict[str, tuple[str, set[str]]]:
    """For each package of the lock its own lines, and the names of those that need it."""
    found = {}
    for entry in re.findall(r"^[^\s#].*\n(?:^\s.*\n)*", text, re.MULTILINE):
        lines = entry.splitlines()
        pin = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        via = {
            named(line.lstrip(" #").removeprefix("via ")) for line in lines if line.lstrip().startswith("#")
        }
        found[named(entry)] = (pin, via)
    return found


def closure(roots: set[str], packages: dict[str, tuple[str, set[str]]]) -> list[str]:
    """The names of `roots` and of all that they need, sorted."""
    wanted: set[str] = set()
    while roots - wanted:
        wanted |= roots
        roots = {name for name, (_, via) in packages.items() if via & wanted}
    return sorted(wanted)


def main() -> None:
    """Print the pins; exit 1 if the lock lacks one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *given.names]
    for extra in given.extra:
        asked += project["optional-dependencies"][extra]
    packages = locked(Path("requirements.lock").read_text(encoding="utf-8"))
    wanted = closure({named(each) for each in asked} - OWN_LOCK, packages)
    missing = [name for name in wanted if name not in packages]
    if missing:
        sys.exit(f"requirements.lock lacks {', '.join(missing)}; run deploy/lock")
    print("\n".join(packages[name][0] for name in wanted))


if __name__ == "__main__":
    main()
