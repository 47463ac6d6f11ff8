"""The keys of the S3 server that `overpaint up` starts."""

from pathlib import Path

import pytest

from overpaint_producer.services import _keys
from overpaint_shared.errors import ServiceError


def test_keys_are_made_once(tmp_path: Path) -> None:
    assert _keys(tmp_path / "keys.json") == _keys(tmp_path / "keys.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"accessKey": "a"}'])
def test_damaged_keys_are_told_with_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ServiceError, match=r"keys\.json holds no keys of S3") as told:
        _keys(tmp_path / "keys.json")
    assert told.value.fix == "delete it: new keys are made"
