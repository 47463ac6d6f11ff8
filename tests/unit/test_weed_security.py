"""The S3 server's keys are given to the user of `weed`, or it is told why not."""

from pathlib import Path

import pytest

from overpaint_producer import weed_security


def test_a_user_that_cannot_be_taken_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("overpaint_producer.weed_security.write_security", lambda _folder: None)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("os.chown", lambda *_: None)
    monkeypatch.setattr("os.setgroups", refuse)
    assert weed_security.main(["weed_security", str(tmp_path), "1:1"]) == 1
    assert "Operation not permitted" in capfd.readouterr().err
    monkeypatch.setattr("os.chown", refuse)
    assert weed_security.main(["weed_security", str(tmp_path), "1:1"]) == 1
    assert "Operation not permitted" in capfd.readouterr().err
