"""What strangers write is refused where it names something, and made safe where people read it."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

from overpaint_producer import progress
from overpaint_producer.cli import context
from overpaint_producer.submitting import Options, Submitter
from overpaint_shared.errors import ModelLoadError, SpecError
from overpaint_shared.job import parse_job
from overpaint_shared.setting_views import Limits
from overpaint_worker import logs
from overpaint_worker.engine import colour, picture
from overpaint_worker.engine.families.weights import read_json
from overpaint_worker.registry import SegmenterEntry

STRANGE = ["\x1b[2J", "a\x9bb", "\u202eevil", "a\u2066b", "a\nb", "a\u2028b", "\u200fa", "a\x00b", "\x7f"]
ODD_PROFILE = Path(__file__).parents[1] / "data" / "odd_profile.icc"


def job(**more: Any) -> dict[str, Any]:
    return {
        "version": 1, "model": "m", "source": {"image": "a.png"}, "method": {"kind": "img2img"}, **more
    }  # fmt: skip


def named(place: str, text: str) -> None:
    if place == "token":
        list(Submitter.__new__(Submitter).submit([], Options(token=text), many=False))
    given = {"group": {"group": text}, "label": {"labels": {text: "x"}}, "labelled": {"labels": {"x": text}}}
    parse_job(job(**given[place]))


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("place", ["group", "label", "labelled", "token"])
def test_what_moves_a_cursor_is_refused_where_a_job_names_something(place: str, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        named(place, text)
    (problem,) = caught.value.problems

    assert problem.path.startswith({"token": "token", "group": "group"}.get(place, "labels"))
    assert problem.allowed
    assert str(caught.value).replace("\n", "").isprintable()


def test_prompts_hold_lines_and_tabs() -> None:
    assert parse_job(job(prompt="a\n\tb")).prompt == "a\n\tb"


@pytest.mark.parametrize("text", STRANGE)
def test_what_is_printed_moves_no_cursor(capsys: pytest.CaptureFixture[str], text: str) -> None:
    context.say(text)
    context.tell(text)
    context.table([[text]], ["TITLE"])
    context.emit({"title": text})
    out = io.StringIO()
    progress.Lines(["a"], out)._say(text)
    said = "".join(capsys.readouterr()) + out.getvalue()

    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_line_stays_one_line_and_moves_no_cursor(as_json: bool) -> None:
    root = logging.getLogger()
    before, stream = (list(root.handlers), root.level), io.StringIO()
    logs.configure(as_json=as_json, stream=stream)
    try:
        for text in STRANGE:
            structlog.get_logger("x").warning(f"event {text}", action="a", error=f"error {text}")
            logging.getLogger("y").warning("said %s", text)
    finally:
        root.handlers[:], root.level = before[0], before[1]
        structlog.reset_defaults()
    lines = stream.getvalue().split("\n")[:-1]

    assert len(lines) == 2 * len(STRANGE)
    assert all(line.isprintable() for line in lines)


def test_twenty_thousand_unknown_keys_are_told_by_the_first_and_their_number() -> None:
    compared = []
    with pytest.MonkeyPatch.context() as patched:
        from overpaint_shared import explain

        patched.setattr(explain, "nearest", lambda name, _: compared.append(name))
        with pytest.raises(SpecError, match="and 19980 more") as caught:
            parse_job(json.dumps(job(**{f"k{n}": 1 for n in range(20_000)})))

    assert len(caught.value.problems) == 20
    assert len(compared) == 20


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "9" * 400, "-0.5e400"])
@pytest.mark.parametrize(
    "place", ['"priority": {}', '"sampling": {{"cfg": {}}}', '"sampling": {{"seed": {}}}']
)
def test_numbers_that_no_field_holds_are_refused(place: str, number: str) -> None:
    text = json.dumps(job())[:-1] + ", " + place.format(number) + "}"
    with pytest.raises(SpecError) as caught:
        parse_job(text)

    assert caught.value.problems


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"\\ud800": 1}', '{"version": 1, "version": 1}']
)
def test_depth_bombs_surrogates_and_double_keys_are_typed_errors(text: str) -> None:
    with pytest.raises(SpecError):
        parse_job(text)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_that_fails_when_it_is_used_leads_into_srgb_only_and_says_so(kind: str) -> None:
    out, icc = io.BytesIO(), ODD_PROFILE.read_bytes()
    Image.new("RGB", (8, 8)).save(out, kind, icc_profile=icc)
    seen = picture.load(out.getvalue(), Limits(), "source.image")

    assert not colour.read(icc).returns
    assert seen.icc is None
    assert seen.notes == ("its colour profile leads into sRGB only; the result is sRGB",)


def test_bytes_that_are_no_profile_are_ignored_with_a_note() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out, "PNG", icc_profile=b"\0" * 5000)

    (note,) = picture.load(out.getvalue(), Limits(), "source.image").notes
    assert "was ignored" in note


@pytest.mark.parametrize(
    "content", ['{"quantization_config": {"load_in_4bit": true}}', "[" * 100_000, "[]", "{"]
)
def test_a_model_that_cannot_be_read_is_told_by_name_and_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelLoadError) as caught:
        read_json(path, SegmenterEntry(name="words", path=str(tmp_path), base=tmp_path))

    assert "config.json" in str(caught.value)
    assert caught.value.fix
