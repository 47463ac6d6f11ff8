"""What is no workflow, or none that a job could say exactly, is refused by node and reason."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint_producer.workflow import KINDS, convert
from overpaint_shared.errors import SpecError
from overpaint_shared.job import parse_job
from tests.unit.workflows import SCALE, changed, clipseg, composed, graph, grey, node, problem

# ------------------------------------------------------------------------------------------- refusals


def test_every_unknown_class_is_told_at_once_with_what_is_known() -> None:
    made = changed(graph(n12=node("LatentUpscaleBy", samples=["5", 0])), "3", latent_image=["12", 0])
    with pytest.raises(SpecError) as caught:
        convert(made | {"99": node("SaveAnimatedWEBP", images=["8", 0])})
    assert [each.path for each in caught.value.problems] == [
        "node 12 (LatentUpscaleBy)",
        "node 99 (SaveAnimatedWEBP)",
    ]
    assert all(name in str(caught.value) for name in KINDS)


def test_an_input_that_is_not_known_is_refused_since_it_may_change_the_picture() -> None:
    assert problem(changed(graph(), "8", tile=64)).path == "node 8 (VAEDecode).tile"


@pytest.mark.parametrize(
    ("name", "inputs", "path"),
    [
        ("3", {"sampler_name": "eulr"}, "node 3 (KSampler).sampler_name"),
        ("3", {"steps": "20"}, "node 3 (KSampler).steps"),
        ("3", {"steps": True}, "node 3 (KSampler).steps"),
        ("3", {"steps": 0}, "node 3 (KSampler).steps"),
        ("3", {"steps": None}, "node 3 (KSampler).steps"),
        ("3", {"cfg": float("nan")}, "node 3 (KSampler).cfg"),
        ("3", {"cfg": float("inf")}, "node 3 (KSampler).cfg"),
        ("3", {"denoise": 0}, "node 3 (KSampler).denoise"),
        ("3", {"seed": -1}, "node 3 (KSampler).seed"),
        ("3", {"seed": 2**64}, "node 3 (KSampler).seed"),
        ("3", {"seed": ["4", 0]}, "node 3 (KSampler).seed"),
        ("3", {"model": ["4", 1]}, "node 3 (KSampler).model"),
        ("3", {"model": ["4", 7]}, "node 3 (KSampler).model"),
        ("3", {"model": ["400", 0]}, "node 3 (KSampler).model"),
        ("3", {"model": "4"}, "node 3 (KSampler).model"),
        ("3", {"latent_image": ["9", 0]}, "node 3 (KSampler).latent_image"),
        ("5", {"pixels": ["5", 0]}, "node 5 (VAEEncode)"),
        ("6", {"text": 5}, "node 6 (CLIPTextEncode).text"),
        ("6", {"text": "x" * 20_001}, "node 6 (CLIPTextEncode).text"),
        ("6", {"text": "a\x00b"}, "node 6 (CLIPTextEncode).text"),
        ("10", {"image": ""}, "node 10 (LoadImage).image"),
        ("10", {"image": "https://example.org/a.png"}, "node 10 (LoadImage).image"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_told_at_its_node(name: str, inputs: Any, path: str) -> None:
    assert problem(changed(graph(), name, **inputs)).path == path


def test_a_near_name_is_suggested() -> None:
    assert problem(changed(graph(), "3", sampler_name="dpmpp_2m_sd")).suggestion in {
        "dpmpp_2m",
        "dpmpp_2m_sde",
    }


def test_a_circle_is_told_with_its_way() -> None:
    made = graph(
        grey(["11", 0]), n11=node("InvertMask", mask=["12", 0]), n12=node("InvertMask", mask=["11", 0])
    )
    assert "depends on itself: 11 <- 12 <- 11" in problem(made).message


def test_a_chain_too_long_for_any_person_is_refused() -> None:
    chain = {f"n{100 + i}": node("InvertMask", mask=[str(101 + i), 0]) for i in range(600)}
    made = graph(grey(["100", 0]), **chain, n700=node("InvertMask", mask=["10", 1]))
    assert "too long a chain" in problem(made).message


def test_the_editors_own_format_is_told_how_to_export() -> None:
    with pytest.raises(SpecError, match=r"Export \(API\)"):
        convert(json.dumps({"nodes": [{"id": 1, "type": "KSampler"}], "links": [], "version": 0.4}).encode())


def test_a_graph_as_it_is_sent_to_the_server_is_taken_too() -> None:
    assert convert({"prompt": graph(), "client_id": "x"}).jobs[0].spec == convert(graph()).jobs[0].spec


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"a": 1}',
        b"\xff",
        b"[" * 100_000,
        b" " * (5 << 20),
        b'{"1": {"class_type": 5}}',
        b'{"1": {"class_type": "KSampler", "inputs": []}}',
        b'{"1": {"class_type": "KSampler"}, "2": null}',
        json.dumps({str(i): node("X") for i in range(1001)}).encode(),
        json.dumps({"x" * 100: node("X")}).encode(),
    ],
)
def test_what_is_no_workflow_is_a_spec_error(data: bytes) -> None:
    with pytest.raises(SpecError) as caught:
        convert(data)
    assert len(str(caught.value)) < 5000


HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.tuples(st.sampled_from([*graph(), "99"]), st.integers(-1, 4)).map(list), st.just([]), st.just({}),
)  # fmt: skip


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_graph_with_anything_anywhere_converts_or_is_a_spec_error(data: Any) -> None:
    made = graph(grey(), n30=composed(graph())["30"], n31=clipseg(["10", 0]), n32=SCALE)
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(list(made)))
        inputs = made[name]["inputs"]
        made = changed(made, name, **{data.draw(st.sampled_from([*inputs, "more"])): data.draw(HOSTILE)})
    try:
        found = convert(made)
    except SpecError:
        return
    assert all(parse_job(job.spec) for job in found.jobs)
