"""The tree of errors, and their way across processes as JSON."""

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared import errors
from overpaint_shared.errors import OverpaintError, Problem, SpecError, StoreError, StoreMissing, shorten
from overpaint_shared.store_errors import explained, is_final


def tree(root: type[OverpaintError] = OverpaintError) -> Iterator[type[OverpaintError]]:
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__ and not kind.__name__.startswith("_"):
            yield kind
        yield from tree(kind)


EVERY_KIND = sorted(set(tree()), key=lambda kind: kind.__name__)


def test_the_tree_at_the_top_of_the_file_names_every_error() -> None:
    assert errors.__doc__
    drawn = {
        word for word in errors.__doc__.replace("├──", " ").replace("└──", " ").split() if word[0].isupper()
    }
    assert {kind.__name__ for kind in EVERY_KIND} <= drawn


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.__name__)
def test_every_error_crosses_as_json_and_keeps_its_type(kind: type[OverpaintError]) -> None:
    error = kind("what happened", fix="mend it")
    error.field = "sampling.steps"
    again = OverpaintError.from_json(json.loads(json.dumps(error.to_json())))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.message, again.field, again.value, again.fix) == (
        error.message,
        "sampling.steps",
        error.value,
        "mend it",
    )
    assert again.exit_code == error.exit_code
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.MaskError, 1),
        (errors.PrecisionError, 1),
        (errors.EngineHung, 1),
        (errors.SpecError, 2),
        (errors.SettingsError, 2),
        (errors.MissingExtraError, 2),
        (errors.LedgerFull, 3),
        (errors.StoreDenied, 3),
    ],
)
def test_exit_codes_are_those_of_the_contract(kind: type[OverpaintError], exit_code: int) -> None:
    assert kind.exit_code == exit_code
    assert (errors.EXIT_DONE, errors.EXIT_INTERRUPTED) == (0, 130)


def test_a_code_of_a_newer_version_gives_the_root_error_with_its_words() -> None:
    error = OverpaintError.from_json({"code": "melted", "message": "the device melted", "colour": "red"})
    assert type(error) is OverpaintError
    assert str(error) == "the device melted"


def test_two_errors_cannot_share_a_code() -> None:
    with pytest.raises(TypeError, match="share the code"):
        type("Other", (OverpaintError,), {"code": "spec"})


def test_a_missing_object_names_its_key() -> None:
    error = StoreMissing("inputs/a/b")
    assert error.key == "inputs/a/b"
    assert "inputs/a/b" in str(error)
    again = OverpaintError.from_json(error.to_json())
    assert isinstance(again, StoreMissing)
    assert again.key == error.key


def test_problems_of_a_newer_version_are_read_without_their_new_keys() -> None:
    data = SpecError("x is wrong:", [Problem(path="a", message="is bad")]).to_json()
    data["problems"][0]["severity"] = "high"
    again = OverpaintError.from_json(data)
    assert isinstance(again, SpecError)
    assert again.problems == [Problem(path="a", message="is bad")]


@settings(deadline=None)
@given(st.text() | st.binary() | st.floats() | st.lists(st.text(st.characters())), st.integers(10, 100))
def test_a_shortened_value_is_printable_and_short(value: object, longest: int) -> None:
    text = shorten(value, longest)
    text.encode()
    assert len(text) <= longest


def test_a_lone_surrogate_is_shown_as_its_escape() -> None:
    shorten(["\ud800"]).encode()


def test_values_that_are_no_json_still_cross() -> None:
    error = errors.InputError("odd", value=object())
    assert "object" in json.dumps(error.to_json())


@pytest.mark.parametrize(("code", "final"), [("InvalidObjectState", True), ("AccessDenied", False)])
def test_an_archived_object_is_no_missing_permission(code: str, final: bool) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    with (
        pytest.raises(StoreError) as caught,
        explained("read an input", bucket="b", endpoint="e", key="k"),
    ):
        raise ClientError(answer, "GetObject")
    assert is_final(caught.value) is final


@pytest.mark.parametrize("problems", [None, 1, "x", {"a": 1}, [1, {"path": "a"}, {}]])
def test_an_error_whose_problems_are_damaged_is_still_told(problems: object) -> None:
    again = OverpaintError.from_json({"code": "spec", "message": "is wrong", "problems": problems})
    assert str(again) == "is wrong"


def test_a_problem_is_told_in_few_words_however_long_a_strangers_words_are() -> None:
    long = "x" * 300_000
    problem = Problem(path=long, message=f"leads to node {long}", given=long, allowed=long)
    assert len(str(problem)) < 5000
    assert len(json.dumps(vars(problem))) < 7000
    assert problem.message.startswith("leads to node x")
