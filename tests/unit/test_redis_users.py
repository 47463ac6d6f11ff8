"""The users of deploy/valkey against the scripts that they run."""

import re
from importlib.resources import files
from pathlib import Path

TEMPLATE = Path(__file__).parents[2] / "deploy" / "valkey" / "users.acl.template"


def test_workers_may_give_every_command_of_the_scripts() -> None:
    texts = [file.read_text() for file in (files("overpaint_shared.ledger") / "lua").iterdir()]
    used = {word.lower() for text in texts for word in re.findall(r"call\('([A-Z]+)'", text)}
    (line,) = [line for line in TEMPLATE.read_text().splitlines() if line.startswith("user worker ")]
    assert used - set(re.findall(r"\+([a-z]+)", line)) == set()
