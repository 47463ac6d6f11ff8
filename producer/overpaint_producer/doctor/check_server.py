"""Checks of the Redis server: version, persistence, memory, role, clock."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

from overpaint_producer.doctor.findings import Finding, Unknown, duration, ok, size, skipped, warn, wrong
from overpaint_producer.doctor.redis_facts import RedisFacts

# The first version of each line without CVE-2025-49844, -46817, -46818 and -46819, by which somebody who may
# run scripts runs code in the server or reads its memory. Lines that are missing were never mended.
MENDED: Final[Mapping[str, tuple[tuple[int, int, int], ...]]] = {
    "Redis": ((6, 2, 20), (7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 2)),
    "Valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4)),
}
OLDEST: Final = (6, 2)
FULL: Final = 0.95
NEARLY_FULL: Final = 0.8
SLOW_S, TOO_SLOW_S = 0.05, 1.0
SKEW_S, TOO_MUCH_SKEW_S = 2.0, 60.0


def check(facts: RedisFacts) -> Iterator[Finding]:
    """All checks of the server."""
    yield ok("redis.reachable", f"{facts.name} answers at {facts.address}")
    yield version(facts)
    yield role(facts)
    yield cluster(facts)
    yield from persistence(facts)
    yield policy(facts)
    yield memory(facts)
    yield latency(facts)
    yield clock(facts)
    yield encryption(facts)
    yield scripts(facts)


def version(facts: RedisFacts) -> Finding:
    """Known holes."""
    kind, text = facts.name.split(" ", 1)
    numbers = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    if len(numbers) < 3:
        return warn("redis.version", f"{facts.name} has no version that is known here", "see its vendor")
    if numbers[:2] < OLDEST:
        return wrong(
            "redis.version", f"{facts.name} is too old for the ledger", "use Valkey 8, or Redis 6.2 on"
        )
    mended = MENDED[kind]
    line = next((each for each in mended if each[:2] == numbers[:2]), None)
    if numbers > mended[-1] or (line is not None and numbers >= line):
        return ok("redis.version", f"{facts.name} has none of the holes that are known here")
    good = ", ".join(".".join(map(str, each)) for each in mended)
    return warn(
        "redis.version",
        f"{facts.name} has known holes: who may run scripts can run code in the server (CVE-2025-49844)",
        f"use {kind} {good} or newer; a distribution may have mended its own build under the old number",
    )


def role(facts: RedisFacts) -> Finding:
    """A replica takes no writes."""
    if facts.info.get("role") == "slave":
        where = f"{facts.info.get('master_host')}:{facts.info.get('master_port')}"
        return wrong(
            "redis.role",
            f"this server is a replica of {where} and takes no writes",
            "point OVERPAINT_REDIS_URL at the primary",
        )
    replicas = int(facts.info.get("connected_slaves", 0))
    return ok("redis.role", f"it is a primary with {replicas} replicas" if replicas else "it is a primary")


def cluster(facts: RedisFacts) -> Finding:
    """Redis Cluster is not supported."""
    if facts.info.get("redis_mode") == "cluster" or int(facts.info.get("cluster_enabled", 0)):
        return wrong("redis.cluster", "cluster mode is on, which is not supported", "use one primary")
    return ok("redis.cluster", "cluster mode is off")


def persistence(facts: RedisFacts) -> Iterator[Finding]:
    """What is acknowledged must be on disk."""
    info = facts.info
    if not int(info.get("aof_enabled", 0)):
        yield wrong(
            "redis.appendonly",
            "the append-only file is off: a restart of Redis loses jobs",
            "CONFIG SET appendonly yes, and write `appendonly yes` into its configuration",
        )
        return
    yield ok("redis.appendonly", "the append-only file is on")
    yield _fsync(facts.config)
    if info.get("aof_last_write_status", "ok") != "ok":
        yield wrong(
            "redis.appendonly_write",
            "the last write of the append-only file failed: Redis refuses jobs until it succeeds",
            "free disk space on its host; see its log",
        )
    if info.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield wrong(
            "redis.appendonly_rewrite",
            "the last rewrite of the append-only file failed, so the file grows without end",
            "free disk space and memory on its host; see its log, then BGREWRITEAOF",
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        yield warn(
            "redis.snapshot",
            "the last snapshot failed",
            "free disk space and memory on its host; see its log",
        )


def _fsync(config: Mapping[str, str] | Unknown) -> Finding:
    if isinstance(config, Unknown):
        return skipped("redis.appendfsync", config)
    value = config.get("appendfsync")
    if value == "no":
        return warn(
            "redis.appendfsync",
            "the append-only file is synced when the system likes: a power cut may lose half a minute",
            "CONFIG SET appendfsync everysec",
        )
    lost = "nothing that was acknowledged" if value == "always" else "at most about the last second"
    return ok("redis.appendfsync", f"appendfsync is {value}: a power cut loses {lost}")


def policy(facts: RedisFacts) -> Finding:
    """A full server must refuse, never forget."""
    value = facts.info.get("maxmemory_policy")
    if value == "noeviction":
        return ok("redis.policy", "maxmemory-policy is noeviction")
    return wrong(
        "redis.policy",
        f"maxmemory-policy is {value}: a full server throws jobs away",
        "CONFIG SET maxmemory-policy noeviction, and write it into the configuration",
    )


def memory(facts: RedisFacts) -> Finding:
    """How full it is."""
    used, limit = int(facts.info.get("used_memory", 0)), int(facts.info.get("maxmemory", 0))
    if not limit:
        return warn(
            "redis.memory",
            f"there is no maxmemory ({size(used)} are used): the system ends a server that grows too large",
            "CONFIG SET maxmemory, below what the machine can give",
        )
    share = used / limit
    told = f"{share:.0%} of maxmemory are used ({size(used)} of {size(limit)})"
    if share < NEARLY_FULL:
        return ok("redis.memory", told)
    fix = "raise maxmemory, or let records end sooner (OVERPAINT_KEEP_DONE_S, OVERPAINT_KEEP_FAILED_S)"
    if share < FULL:
        return warn("redis.memory", told, fix)
    return wrong("redis.memory", f"{told}: new jobs are refused when it is full", fix)


def latency(facts: RedisFacts) -> Finding:
    """How long an answer takes."""
    told = f"an answer takes {facts.latency_s * 1000:.1f} ms"
    if facts.latency_s < SLOW_S:
        return ok("redis.latency", told)
    fix = "look for slow scripts (SLOWLOG GET), a busy host, or a far network"
    return (warn if facts.latency_s < TOO_SLOW_S else wrong)("redis.latency", told, fix)


def clock(facts: RedisFacts) -> Finding:
    """The clock of this machine against the server's."""
    skew_s = abs(facts.clock_ahead_s)
    told = f"this machine's clock is {duration(skew_s)} {'ahead' if facts.clock_ahead_s > 0 else 'behind'}"
    if skew_s < SKEW_S:
        return ok("redis.clock", "this machine's clock agrees with the server's")
    return (warn if skew_s < TOO_MUCH_SKEW_S else wrong)(
        "redis.clock", told, "let both hosts take their time from NTP"
    )


def encryption(facts: RedisFacts) -> Finding:
    """Passwords and jobs on the wire."""
    if facts.is_encrypted:
        return ok("redis.tls", "the connection is encrypted")
    if facts.is_local:
        return ok("redis.tls", "the connection stays on this machine")
    return warn(
        "redis.tls",
        "the connection is not encrypted: whoever listens reads the password and the jobs",
        "use rediss://, or keep it inside a private network that you trust",
    )


def scripts(facts: RedisFacts) -> Finding:
    """Whether the ledger works there."""
    if isinstance(facts.scripts, Unknown):
        return skipped("redis.scripts", facts.scripts)
    if isinstance(facts.scripts, str):
        fix = "start a worker, which loads them; and give the user the rights that docs/security.md lists"
        if "permission" in facts.scripts.lower() or "NOPERM" in facts.scripts:
            return skipped("redis.scripts", Unknown("this user has no right to SCRIPT LOAD"))
        return wrong("redis.scripts", f"the ledger's scripts do not work: {facts.scripts}", fix)
    return ok("redis.scripts", f"the server has the ledger's {facts.scripts} scripts")
