"""Checks of the bucket."""

from collections.abc import Iterator
from typing import Final

from overpaint_producer.doctor.findings import Finding, Unknown, duration, ok, skipped, warn, wrong
from overpaint_producer.doctor.store_facts import StoreFacts

SKEW_S, TOO_MUCH_SKEW_S = 10.0, 60.0
KEPT: Final = ("inputs/", "results/", "named/")


def check(facts: StoreFacts) -> Iterator[Finding]:
    """All checks of the bucket."""
    yield ok("s3.reachable", f"the bucket {facts.bucket!r} answers at {facts.endpoint}")
    yield from rights(facts)
    yield conditional(facts)
    yield clock(facts)
    yield encryption(facts)
    yield from strangers(facts)
    yield from housekeeping(facts)


def rights(facts: StoreFacts) -> Iterator[Finding]:
    """What producers and workers need."""
    for name, error in facts.rights.items():
        if error is None:
            yield ok(f"s3.{name}", f"this key may {name}")
        else:
            yield wrong(f"s3.{name}", error.message, error.fix or "see the server's log")


def conditional(facts: StoreFacts) -> Finding:
    """A result is written once."""
    if isinstance(facts.conditional, Unknown):
        return skipped("s3.conditional", facts.conditional, "mend what is wrong above")
    if facts.conditional:
        return ok(
            "s3.conditional", "the server writes no object over another when asked not to (If-None-Match)"
        )
    return wrong(
        "s3.conditional",
        "the server writes over objects although asked not to (If-None-Match)",
        "use a server that knows conditional writes: AWS, SeaweedFS 4, MinIO, Ceph",
    )


def clock(facts: StoreFacts) -> Finding:
    """Signatures are judged by the server's clock."""
    if isinstance(facts.clock_ahead_s, Unknown):
        return skipped("s3.clock", facts.clock_ahead_s, "nothing need be done")
    skew_s = abs(facts.clock_ahead_s)
    if skew_s < SKEW_S:
        return ok("s3.clock", "this machine's clock agrees with the server's")
    return (warn if skew_s < TOO_MUCH_SKEW_S else wrong)(
        "s3.clock",
        f"this machine's clock is {duration(skew_s)} {'ahead' if facts.clock_ahead_s > 0 else 'behind'}",
        "let both hosts take their time from NTP; S3 refuses what is signed a quarter of an hour off",
    )


def encryption(facts: StoreFacts) -> Finding:
    """Pictures on the wire."""
    if facts.is_private:
        return ok("s3.tls", "the connection is encrypted, or stays on this machine")
    return warn(
        "s3.tls",
        "the connection is not encrypted: whoever listens sees the pictures",
        "use https://, or keep it inside a private network that you trust",
    )


def strangers(facts: StoreFacts) -> Iterator[Finding]:
    """SeaweedFS's parts talk by ports of their own, which must ask for a certificate."""
    if facts.open_grpc is None:
        return
    if facts.open_grpc:
        yield wrong(
            "s3.grpc",
            f"SeaweedFS's own ports {', '.join(map(str, facts.open_grpc))} ask for no certificate: "
            "whoever reaches them reads all pictures and can become its administrator",
            "start it with -config_dir and the keys that overpaint_producer.weed_security makes, "
            "readable by its user (docs/security.md)",
        )
    else:
        yield ok("s3.grpc", "SeaweedFS's own ports let nobody in from here without a certificate")


def housekeeping(facts: StoreFacts) -> Iterator[Finding]:
    """What the server does to objects by itself."""
    if facts.versioning == "Enabled":
        yield warn(
            "s3.versioning",
            "the bucket keeps old versions, so what `overpaint gc` deletes still takes room",
            "expire noncurrent versions by a lifecycle rule, or suspend versioning",
        )
    if isinstance(facts.lifecycle, Unknown):
        return
    touched = [rule for rule in facts.lifecycle if any(_overlap(rule, kept) for kept in KEPT)]
    if touched:
        prefixes = ", ".join(map(repr, touched))
        yield warn(
            "s3.lifecycle",
            f"lifecycle rules remove or move the farm's objects ({prefixes}): waiting jobs may lose pictures",
            "keep inputs/ longer than jobs wait and failed records are kept (OVERPAINT_KEEP_FAILED_S)",
        )


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)
