"""Job files as they come."""

import io
import json
from pathlib import Path

import pytest

from overpaint_producer.jobfiles import MAX_DRAFT_BYTES, Draft, as_object, expand, read
from overpaint_shared.errors import SpecError

NOTHING = io.BytesIO()


def drafts(text: str, name: str = "-") -> list[Draft]:
    return list(read(name, io.BytesIO(text.encode())))


def test_a_file_is_one_job_and_its_folder_is_where_pictures_are(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"a":\n1}')
    (draft,) = read(str(tmp_path / "job.json"), NOTHING)
    assert (draft.data, draft.folder, draft.where) == (b'{"a":\n1}', tmp_path, str(tmp_path / "job.json"))


def test_json_lines_are_one_job_a_line_and_blank_lines_count(tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"a": 1}\n\n{"a": 2}')
    found = list(read(str(tmp_path / "jobs.jsonl"), NOTHING))
    assert [as_object(draft)["a"] for draft in found] == [1, 2]
    assert found[1].where.endswith("jobs.jsonl, line 3")


def test_standard_input_takes_lines_or_one_job_over_several() -> None:
    assert [as_object(draft) for draft in drafts('{"a": 1}\n{"a": 2}\n')] == [{"a": 1}, {"a": 2}]
    assert [as_object(draft) for draft in drafts(json.dumps({"a": {"b": 1}}, indent=2))] == [{"a": {"b": 1}}]
    assert drafts("\n \n") == []


def test_lines_are_read_as_they_come() -> None:
    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            return b'{"a": 1}\n'

    lines = read("-", Endless())
    assert [as_object(next(lines)) for _ in range(3)] == [{"a": 1}] * 3


def test_a_huge_line_is_refused_unread() -> None:
    class Huge(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= MAX_DRAFT_BYTES + 1
            return b"x" * size

    with pytest.raises(SpecError, match="line 1 is larger"):
        next(read("-", Huge()))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        list(read(str(tmp_path / "none.json"), NOTHING))
    with pytest.raises(SpecError, match="directory"):
        list(read(str(tmp_path), NOTHING))


def test_a_picture_is_told_from_a_job(tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SpecError, match=r"scene\.png is a picture, not a job"):
        list(read(str(tmp_path / "scene.png"), NOTHING))


def test_patterns_are_expanded_and_names_with_brackets_kept(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "[x].json"):
        (tmp_path / name).write_text("{}")
    assert expand([f"{tmp_path}/?.json"]) == [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    assert expand([f"{tmp_path}/[x].json", "plain.json"]) == [f"{tmp_path}/[x].json", "plain.json"]
    with pytest.raises(SpecError, match="no file matches"):
        expand([f"{tmp_path}/*.jsonl"])


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_told(data: bytes) -> None:
    with pytest.raises(SpecError):
        as_object(Draft(data=data, folder=Path(), where="x"))
