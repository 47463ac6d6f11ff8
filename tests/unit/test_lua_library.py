"""What a Lua script is given of the shared definitions."""

import re

import pytest

from overpaint_shared.ledger.lua_library import definitions, needed
from overpaint_shared.ledger.scripts import NAMES, source

LIBRARY = definitions("""
local LIMIT, OTHER = 1, 2  -- a comment that mentions unused
local TABLE = {}
for i = 1, LIMIT do TABLE[i] = true end

-- What nobody needs.
local function unused() return OTHER end
local function inner() return TABLE[1] end
local function outer()
  return inner()
end
""")


def test_a_script_gets_what_it_mentions_and_what_that_mentions_in_order():
    assert [text.split("(")[0].splitlines()[0] for text in needed("return outer()", LIBRARY)] == [
        "local LIMIT, OTHER = 1, 2",
        "local TABLE = {}",
        "local function inner",
        "local function outer",
    ]


def test_a_statement_stays_with_the_definition_before_it():
    (_, table) = needed("return TABLE", LIBRARY)
    assert table.endswith("for i = 1, LIMIT do TABLE[i] = true end")


def test_fields_methods_and_comments_are_no_mentions():
    assert needed("return job.inner, job:outer() -- unused", LIBRARY) == []


@pytest.mark.parametrize("name", NAMES)
def test_no_script_makes_a_function_that_it_does_not_use(name: str):
    text = source(name)
    for function in re.findall(r"^local function (\w+)", text, re.MULTILINE):
        assert len(re.findall(rf"\b{function}\b", text)) > 1
