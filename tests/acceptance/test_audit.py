"""`overpaint audit`: who did what, on a farm by hand and on the farm as shipped."""

import redis

from overpaint_producer.client import Farm
from tests.acceptance.commands import Shell
from tests.integration.hand import Hand, job
from tests.shipped import Shipped

AUDIT = ("audit", "--json")


def test_what_was_typed_is_in_the_trail(shell: Shell, farm: Farm, hand: Hand) -> None:
    assert "no such call" in shell.overpaint("audit").err
    first = farm.submit(job(output={"key": "hat.png"}), folder=shell.folder)
    hand.render(first.id)
    assert shell.overpaint("get", first.id, "--out", "out").code == 0
    assert shell.overpaint("cancel", first.id).code == 0
    assert shell.overpaint("replay", "nobody").code == 2
    assert shell.overpaint("get", "nobody").code == 2
    lines = shell.overpaint(*AUDIT).lines
    told = [(line["action"], line["result"]) for line in lines]
    assert told == [
        ("submit", "ok"), ("get", "ok"), ("cancel", "ok"), ("replay", "unknown_job"), ("get", "unknown_job"),
    ]  # fmt: skip
    assert lines[1]["name"] == "hat.png"
    assert lines[2]["program"].startswith("overpaint ")
    shown = shell.overpaint("audit", "--since", "1h").out.splitlines()
    assert len(shown) == 6
    assert shown[0].startswith("AT (UTC)")
    assert "name hat.png" in shown[2]


def test_the_trail_is_narrowed_by_options(shell: Shell, farm: Farm, hand: Hand) -> None:
    one, two = farm.submit_many([job(), job()], folder=shell.folder)
    hand.farm.ledger.cancel(one.id)
    farm.cancel([two.id])

    def actions(*argv: str) -> list[str]:
        return [line["action"] for line in shell.overpaint(*AUDIT, *argv).lines]

    assert actions() == actions("--owner", farm.settings.owner) == ["submit", "cancel", "cancel"]
    assert actions("--limit", "1") == ["cancel"]
    assert actions("--action", "submit") == ["submit"]
    assert actions("--owner", "nobody") == []
    assert shell.overpaint("audit", "--since", "soon").code == 2
    assert shell.overpaint("audit", "--action", "look").code == 2


def test_a_strangers_words_are_safe_to_print(shell: Shell, farm: Farm, redis_client: redis.Redis) -> None:
    redis_client.rpush(
        "op:audit:producer", b'{"at":1,"action":"\\u001b[2J\\u202e","ids":["\\u0007"]}', b"\xff"
    )
    result = shell.overpaint("audit")
    assert result.code == 0
    assert "1 entries" in result.err
    assert not set(result.out) & {"\x1b", "\x07", "\u202e"}


def test_a_producer_is_told_to_ask_as_the_operator(shell: Shell, shipped: Shipped) -> None:
    result = shell.overpaint("audit", "--redis-url", shipped.redis.url("producer"))
    assert result.code == 3
    assert "as the Redis user operator" in result.err
    assert shell.overpaint("audit", "--redis-url", shipped.redis.url("operator")).code == 0
    with shipped.redis.client() as client:
        client.acl_log_reset()
