"""Many jobs from one file."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_producer.variants import MAX_VARIANTS, parse_assignment, parse_seeds, variants
from overpaint_shared.errors import SpecError


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("1..4", [1, 2, 3, 4]), ("5..5", [5]), ("1,9, 3..4", [1, 9, 3, 4])],
)
def test_seeds_are_read(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "1..", "..3", "8..1", "1...3", "-1", "1.5", "0..100000", "1;2", "٣"]
)
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seed"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("sampling.steps=30", ("sampling", "steps"), 30),
        ("prompt=a red hat", ("prompt",), "a red hat"),
        ('prompt="42"', ("prompt",), "42"),
        ("prompt=a=b", ("prompt",), "a=b"),
        ("prompt=", ("prompt",), ""),
        ("mask=null", ("mask",), None),
        ("prepare.0.factor=2.5", ("prepare", 0, "factor"), 2.5),
        ("mask.ops[1].by=3", ("mask", "ops", 1, "by"), 3),
        ('method={"kind": "img2img"}', ("method",), {"kind": "img2img"}),
    ],
)
def test_an_assignment_is_read(text: str, path: tuple[str | int, ...], value: Any) -> None:
    assert parse_assignment(text) == (path, value)


@pytest.mark.parametrize("text", ["prompt", "=x", "a..b=1", ".a=1", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no assignment"):
        parse_assignment(text)


def test_a_path_given_twice_is_swept_and_crossed_with_the_seeds() -> None:
    base = {"prompt": "x", "sampling": {"steps": 1}}
    made = list(
        variants(base, [(("sampling", "cfg"), 1), (("sampling", "cfg"), 2), (("prompt",), "y")], [5, 6])
    )
    assert [(each["prompt"], each["sampling"]["cfg"], each["sampling"]["seed"]) for each in made] == [
        ("y", 1, 5), ("y", 1, 6), ("y", 2, 5), ("y", 2, 6),
    ]  # fmt: skip
    assert base == {"prompt": "x", "sampling": {"steps": 1}}


def test_objects_that_are_left_out_are_made() -> None:
    assert list(variants({}, [(("sampling", "steps"), 3)], [])) == [{"sampling": {"steps": 3}}]


@pytest.mark.parametrize(
    "path", [("prompt", "x"), ("prepare", 2), ("prepare", "first"), ("prepare", 0, "a", "b")]
)
def test_a_path_that_leads_nowhere_is_refused(path: tuple[str | int, ...]) -> None:
    data = {"prompt": "x", "prepare": [{"a": 1}]}
    with pytest.raises(SpecError, match="there is no"):
        list(variants(data, [(path, 1)], []))


def test_too_many_variants_are_refused_before_the_first_is_made() -> None:
    many = [(("a",), value) for value in range(400)] + [(("b",), value) for value in range(400)]
    with pytest.raises(ValueError, match=str(MAX_VARIANTS)):
        next(variants({}, many, []))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=4)
)
def test_variants_share_nothing(seeds: list[int], steps: list[int]) -> None:
    made = list(variants({"sampling": {}}, [(("sampling", "steps"), step) for step in steps], seeds))
    assert len(made) == len(seeds) * len(steps)
    assert len({id(each["sampling"]) for each in made}) == len(made)
