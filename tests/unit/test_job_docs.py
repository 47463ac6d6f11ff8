"""docs/job-spec.md says what the schema says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overpaint_shared.job import parse_job, schema

TEXT = (Path(__file__).parents[2] / "docs" / "job-spec.md").read_text(encoding="utf-8")
SCHEMA = schema()
HEADINGS = {
    "Overpaint job spec, version 1": "## The whole",
    "Source": "## `source`",
    "Control": "## `controls`",
    "LoraUse": "## `loras`",
    "Sampling": "## `sampling`",
    "Preserve": "## `preserve`",
    "Output": "## `output`",
}
TAGS = ("op", "from", "kind")
OF_EVERY_MASK = ("ops", "min_coverage", "max_coverage")


def section(heading: str) -> str:
    """The text from a heading to the next of any level."""
    start = TEXT.index(f"{heading}\n")
    end = re.search(r"^#+ ", TEXT[start + len(heading) :], re.MULTILINE)
    return TEXT[start : start + len(heading) + (end.start() if end else len(TEXT))]


def heading_of(node: dict[str, Any]) -> str:
    for tag in TAGS:
        if "const" in node["properties"].get(tag, {}):
            return f'#### `"{tag}": "{node["properties"][tag]["const"]}"`'
    return HEADINGS[node["title"]]


def fields() -> Iterator[tuple[str, str, bool, dict[str, Any]]]:
    """(heading, name, required, field) of every field of the schema."""
    for node in [SCHEMA, *SCHEMA["$defs"].values()]:
        for name, field in node["properties"].items():
            if name in TAGS and "const" in field:
                continue
            is_common = name in OF_EVERY_MASK and "from" in node["properties"]
            heading = "### Fields of every mask" if is_common else heading_of(node)
            yield heading, name, name in node.get("required", ()), field


ALL = list(fields())


def words(field: dict[str, Any]) -> Iterator[str]:
    """What the row of a field must hold: its bounds, its choices."""
    for option in [field, *field.get("anyOf", ())]:
        for bound in ("minimum", "maximum", "maxLength", "maxItems"):
            if bound in option:
                yield str(option[bound])
        yield from (f"`{choice}`" for choice in option.get("enum", ()))


def written_default(value: object) -> str:
    if value == "":
        return '`""`'
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


@pytest.mark.parametrize(
    ("heading", "name", "required", "field"), ALL, ids=[f"{h} {n}" for h, n, _, _ in ALL]
)
def test_every_field_is_documented_with_default_range_and_choices(
    heading: str, name: str, required: bool, field: dict[str, Any]
) -> None:
    (row,) = [line for line in section(heading).splitlines() if line.startswith(f"| `{name}` |")]
    _, _, default, meaning, _ = re.split(r"(?<!\\)\|", row)
    if required:
        assert default.strip() == "required"
    elif "default" in field:
        assert default.strip() == written_default(field["default"])
    for word in words(field):
        bounded = rf"(?<![\w.]){re.escape(word)}(?!\w)" if word[0] != "`" else re.escape(word)
        assert re.search(bounded, meaning), word


def test_the_documentation_names_no_field_that_is_not_there() -> None:
    known = {(heading, name) for heading, name, _, _ in ALL}
    for heading in re.findall(r"^#+ .*$", TEXT, re.MULTILINE):
        for name in re.findall(r"^\| `(\w+)` \|", section(heading), re.MULTILINE):
            assert (heading, name) in known


@pytest.mark.parametrize("example", re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
def test_every_example_parses(example: str) -> None:
    assert parse_job(example)
