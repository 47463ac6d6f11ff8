"""Checks of the users of Redis."""

from collections.abc import Iterator
from typing import Final

from overpaint_producer.doctor.findings import Finding, Unknown, ok, skipped, warn, wrong
from overpaint_producer.doctor.redis_facts import RedisFacts

ROLES: Final = ("producer", "worker", "monitor", "operator")
REPLAY: Final = "user default off resetpass ~* &* +@all"


def check(facts: RedisFacts) -> Iterator[Finding]:
    """All checks of users."""
    if isinstance(facts.users, Unknown):
        yield skipped("redis.users", facts.users)
        return
    users = {words[1]: words[2:] for line in facts.users if len(words := line.split()) > 2}
    yield default(users.get("default", []), facts)
    yield roles(users, facts)
    yield from excessive(users)


def default(rights: list[str], facts: RedisFacts) -> Finding:
    """Nobody logs in as `default` without a password, and it may replay the append-only file."""
    if not _all_rights(rights):
        return wrong(
            "redis.default_user",
            "the user default lacks rights, but the server replays its append-only file as this user: a "
            "restart loses jobs",
            f"write `{REPLAY}` into the file of users, and ACL LOAD",
        )
    if "off" in rights:
        return ok("redis.default_user", "the user default is off, and may replay the append-only file")
    if "nopass" in rights:
        fix = f"give each role its own user (deploy/valkey/users.acl.template), and set `{REPLAY}`"
        text = "whoever reaches the server may do everything: the user default needs no password"
        return (warn if facts.is_local else wrong)("redis.default_user", text, fix)
    return ok("redis.default_user", "the user default needs a password")


def _all_rights(rights: list[str]) -> bool:
    """Every command on every key. ACL LIST gives the words in their order: a later `-` takes away."""
    if "+@all" not in rights or not {"~*", "allkeys"} & set(rights):
        return False
    return not any(word.startswith("-") for word in rights[rights.index("+@all") :])


def roles(users: dict[str, list[str]], facts: RedisFacts) -> Finding:
    """One user for each role."""
    missing = [role for role in ROLES if role not in users]
    if not missing:
        return ok("redis.roles", f"there is a user for each role: {', '.join(ROLES)}")
    if len(missing) == len(ROLES) and facts.is_local:
        return ok("redis.roles", "there is one user for all, on this machine alone")
    return warn(
        "redis.roles",
        f"there is no user for {', '.join(missing)}: somebody has more rights than needed",
        "take the users of deploy/valkey/users.acl.template",
    )


def excessive(users: dict[str, list[str]]) -> Iterator[Finding]:
    """Roles that may do everything."""
    for role in ROLES[:-1]:
        if "+@all" in users.get(role, []):
            yield warn(
                "redis.rights",
                f"the user {role} may run every command",
                "take its line of deploy/valkey/users.acl.template",
            )
