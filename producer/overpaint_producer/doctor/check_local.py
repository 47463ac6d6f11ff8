"""Checks of this machine."""

from collections.abc import Iterator
from typing import Final

from overpaint_producer.doctor.findings import Finding, ok, size, warn, wrong
from overpaint_producer.doctor.local_facts import ConfigFile, LocalFacts

MIB: Final = 1 << 20
FEW, TOO_FEW = 1024 * MIB, 128 * MIB
LITTLE, TOO_LITTLE = 512 * MIB, 64 * MIB
OTHERS: Final = 0o077
WRITE: Final = 0o022


def check(facts: LocalFacts) -> Iterator[Finding]:
    """All checks of this machine."""
    yield packages(facts)
    yield from settings(facts)
    for folder, (free, _) in facts.disks.items():
        yield disk(folder, free)
    yield from memory(facts)


def packages(facts: LocalFacts) -> Finding:
    """What is installed."""
    there = ", ".join(f"{name} {version}" for name, version in facts.packages.items())
    if facts.unmet:
        return wrong(
            "local.packages",
            f"these packages are missing or of another version: {', '.join(facts.unmet)}",
            "install overpaint anew, with the versions of requirements.lock",
        )
    return ok("local.packages", f"overpaint {facts.version}, Python {facts.python}, {there}")


def settings(facts: LocalFacts) -> Iterator[Finding]:
    """Where they come from."""
    for note in facts.misspelt:
        yield warn("local.settings", note, "mend its name, or unset it")
    if not facts.misspelt:
        yield ok("local.settings", "no variable is almost a setting")
    if facts.config is not None:
        yield config(facts.config)


def config(file: ConfigFile) -> Finding:
    """Nobody else reads or writes the configuration file."""
    if file.mode & OTHERS and file.secrets:
        secrets = ", ".join(file.secrets)
        return wrong(
            "local.config",
            f"others of this machine may read {file.path} (mode {file.mode:04o}), which holds {secrets}",
            f"chmod 600 {file.path}, and change the passwords if others use this machine",
        )
    if file.mode & WRITE:
        return wrong(
            "local.config",
            f"others of this machine may write {file.path} (mode {file.mode:04o})",
            f"chmod 600 {file.path}",
        )
    return ok("local.config", f"{file.path} has mode {file.mode:04o}")


def disk(folder: str, free: int) -> Finding:
    """Room for files."""
    told = f"{size(free)} are free in {folder}"
    if free >= FEW:
        return ok("local.disk", told)
    return (warn if free >= TOO_FEW else wrong)("local.disk", told, "free disk space")


def memory(facts: LocalFacts) -> Iterator[Finding]:
    """Room for programs."""
    if facts.memory is None:
        return
    told = f"{size(facts.memory[0])} of memory are available"
    if facts.memory[0] >= LITTLE:
        yield ok("local.memory", told)
    else:
        yield (warn if facts.memory[0] >= TOO_LITTLE else wrong)("local.memory", told, "end other programs")
