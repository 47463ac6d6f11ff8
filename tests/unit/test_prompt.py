import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_shared.errors import JobError
from overpaint_worker.engine.families.prompt import BLOCK, DEEPEST, MOST_BLOCKS, Marks, blocks, stretches

MARKS = Marks(start=-1, end=-2, pad=-3)


def read(prompt: str) -> list[tuple[str, float]]:
    return [(stretch.text, pytest.approx(stretch.weight)) for stretch in stretches(prompt)]


def words(text: str) -> list[int]:
    """One token for each word: its number."""
    return [int(word) for word in text.split()]


def payload(row: tuple[int, ...]) -> list[int]:
    return [token for token in row if token >= 0]


def numbers(count: int, first: int = 0) -> str:
    return " ".join(str(number) for number in range(first, first + count))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red hat", [("a red hat", 1.0)]),
        ("", []),
        ("a (red) hat", [("a ", 1.0), ("red", 1.1), (" hat", 1.0)]),
        ("a (red:1.3) hat", [("a ", 1.0), ("red", 1.3), (" hat", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("(((red)))", [("red", 1.331)]),
        ("(a (b:1.5) c)", [("a ", 1.1), ("b", 1.5), (" c", 1.1)]),
        ("(a (b) c:2)", [("a ", 2.0), ("b", 2.2), (" c", 2.0)]),
        ("(a:0.5) (b:0)", [("a", 0.5), (" ", 1.0), ("b", 0.0)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:1e-1)", [("a", 0.1)]),
        ("(16:9:1.2)", [("16:9", 1.2)]),
        ("a:1.3", [("a:1.3", 1.0)]),
        (r"a \(red\) hat", [("a (red) hat", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("a\\b", [("a\\b", 1.0)]),
        ("(a\nb:1.2)", [("a\nb", 1.2)]),
    ],
)  # fmt: skip
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert read(prompt) == expected


@pytest.mark.parametrize("number", ["nan", "inf", "1e999", "", "1.2.3", "0x10", "1_0", "red"])
def test_what_is_no_finite_number_belongs_to_the_words(number: str) -> None:
    assert read(f"(a:{number})") == [(f"a:{number}", 1.1)]


@pytest.mark.parametrize("prompt", ["a (b", "a) b", ") (", "a (b (c) d"])
def test_parentheses_without_a_partner_are_plain(prompt: str) -> None:
    assert "".join(text for text, _ in read(prompt)) == prompt
    assert all(stretch.weight == 1 for stretch in stretches(prompt))


def test_absurd_nesting_is_a_typed_error_and_no_recursion_fault() -> None:
    with pytest.raises(JobError, match="deep"):
        stretches("(" * 9_000 + "a" + ")" * 9_000)

    assert len(stretches("(" * DEEPEST + "a" + ")" * DEEPEST)) == 1


@given(st.text(alphabet="ab():1.\\ \n", max_size=60))
@settings(deadline=None)
def test_no_prompt_is_a_surprise(prompt: str) -> None:
    found = stretches(prompt)

    assert all(stretch.weight == stretch.weight and abs(stretch.weight) < 1e300 for stretch in found)
    assert all(stretch.text for stretch in found)


@given(st.text(alphabet="ab: .,", max_size=60))
@settings(deadline=None)
def test_a_prompt_without_parentheses_is_itself(prompt: str) -> None:
    assert "".join(stretch.text for stretch in stretches(prompt)) == prompt


def test_an_empty_prompt_is_one_block_of_start_end_and_padding() -> None:
    (block,) = blocks("", words, MARKS)

    assert block.ids == (-1, -2, *[-3] * 75)
    assert set(block.weights) == {1.0}


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (75, [75]), (76, [75, 1]), (151, [75, 75, 1])])
def test_75_tokens_go_into_a_block(count: int, expected: list[int]) -> None:
    found = blocks(numbers(count), words, MARKS)

    assert [len(payload(block.ids)) for block in found] == expected
    assert [token for block in found for token in payload(block.ids)] == list(range(count))
    for block in found:
        assert len(block.ids) == len(block.weights) == BLOCK
        assert block.ids[0] == -1
        assert block.ids[1 + len(payload(block.ids))] == -2


def test_weights_stand_beside_their_tokens_and_marks_weigh_1() -> None:
    (block,) = blocks("0 (1 2:1.5) 3", words, MARKS)

    assert block.ids[:6] == (-1, 0, 1, 2, 3, -2)
    assert block.weights[:6] == (1, 1, 1.5, 1.5, 1, 1)
    assert set(block.weights[6:]) == {1}


def test_a_short_weighted_stretch_is_not_cut_by_the_end_of_a_block() -> None:
    first, second = blocks(f"{numbers(72)} ({numbers(7, 100)}:1.2)", words, MARKS)

    assert payload(first.ids) == list(range(72))
    assert first.ids[73:] == (-2, -3, -3, -3)
    assert payload(second.ids) == list(range(100, 107))
    assert second.weights[1:8] == (1.2,) * 7


def test_a_long_weighted_stretch_fills_the_block_and_goes_on_in_the_next() -> None:
    first, second = blocks(f"{numbers(72)} ({numbers(8, 100)}:1.2)", words, MARKS)

    assert payload(first.ids) == [*range(72), 100, 101, 102]
    assert payload(second.ids) == list(range(103, 108))
    assert second.weights[1:6] == (1.2,) * 5


# ----------------------------------------------------------------------------- as prompts were always read


def by_recursion(prompt: str) -> list[tuple[str, float]]:
    """The same syntax, written for its rules and not for speed: each level is cut into pieces anew."""
    return list(_weighted(re.findall(r"\\[()]|.", prompt, re.DOTALL), 1.0))


def _weighted(symbols: list[str], weight: float) -> Iterator[tuple[str, float]]:
    for piece in _pieces(symbols):
        if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
            yield from _weighted(*_explicit(piece[1:-1], weight))
        elif piece:
            yield "".join(symbol[-1] for symbol in piece), weight


def _pieces(symbols: list[str]) -> Iterator[list[str]]:
    """Cut before every outermost "(" and after the ")" that closes it."""
    depth = start = 0
    for i, symbol in enumerate(symbols):
        depth += (symbol == "(") - (symbol == ")")
        if symbol == "(" and depth == 1:
            yield symbols[start:i]
            start = i
        elif symbol == ")" and depth == 0:
            yield symbols[start : i + 1]
            start = i + 1
    yield symbols[start:]


def _explicit(inner: list[str], weight: float) -> tuple[list[str], float]:
    colon = max((i for i, symbol in enumerate(inner) if symbol == ":"), default=0)
    number = "".join(inner[colon + 1 :])
    form = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
    if colon > 0 and re.fullmatch(form, number) and math.isfinite(float(number)):
        return inner[:colon], float(number)
    return inner, weight * 1.1


@given(st.text(alphabet="ab((())):1.e-\\ ", max_size=40))
@settings(deadline=None, max_examples=2000)
def test_one_pass_over_a_prompt_reads_what_cutting_each_level_reads(prompt: str) -> None:
    assert [(stretch.text, stretch.weight) for stretch in stretches(prompt)] == by_recursion(prompt)


def test_a_prompt_of_more_tokens_than_any_encoder_makes_sense_of_is_refused() -> None:
    most = MOST_BLOCKS * (BLOCK - 2)

    assert len(blocks(numbers(most), words, MARKS)) == MOST_BLOCKS
    with pytest.raises(JobError, match=rf"more than {most} tokens"):
        blocks(numbers(most + 1), words, MARKS)
