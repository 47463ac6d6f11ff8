"""The action keys of the log are an interface: docs/worker.md lists them, all of them and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "worker" / "overpaint_worker").rglob("*.py"))
MADE = {
    "job.{name}": ("job.done", "job.failed", "job.cancelled"),
    "reaper.{action}": ("reaper.expired", "reaper.stale", "reaper.unable", "reaper.late"),
    "ledger.{action}": ("ledger.odd", "ledger.mended"),
}
"""Keys that the code puts together."""


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if isinstance(of, ast.Name) and of.id == "log":
                yield node


def keys(value: ast.expr) -> tuple[str, ...]:
    match value:
        case ast.Constant(value=str(key)):
            return (key,)
        case ast.IfExp(body=body, orelse=orelse):
            return (*keys(body), *keys(orelse))
        case ast.JoinedStr():
            return MADE[ast.unparse(value)[2:-1]]
    raise AssertionError(f"an action that no reader can look up: {ast.unparse(value)}")


def actions() -> set[str]:
    return {
        key
        for path in SOURCES
        for call in calls(path)
        for word in call.keywords
        if word.arg == "action"
        for key in keys(word.value)
    }


def test_the_document_lists_every_action_and_no_other() -> None:
    section = (ROOT / "docs" / "worker.md").read_text(encoding="utf-8").partition("\n## Logs")[2]
    table = re.findall(r"^\| (`[^|]+`) \|", section.partition("\n## ")[0], re.MULTILINE)
    told = {key for cell in table for key in re.findall(r"`([^`]+)`", cell)}
    assert len(told) > 40
    assert told == actions()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_line_of_the_worker_has_an_action(path: Path) -> None:
    missing = [
        ast.unparse(call) for call in calls(path) if not {"action"} & {word.arg for word in call.keywords}
    ]
    assert missing == []
