"""Commands as a person types them, each in a process of its own, in a clean environment."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint_shared.settings import Settings

OVERPAINT = Path(sysconfig.get_path("scripts")) / "overpaint"


@dataclass(frozen=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Standard output as JSON, line by line."""
        return [json.loads(line) for line in self.out.splitlines()]


def environment(settings: Settings | None = None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command needs of the environment, and the farm's settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    farm = {}
    if settings is not None:
        secret = settings.s3_secret_key
        farm = {
            "OVERPAINT_REDIS_URL": str(settings.redis_url),
            "OVERPAINT_S3_ENDPOINT_URL": settings.s3_endpoint_url or "",
            "OVERPAINT_S3_BUCKET": settings.s3_bucket,
            "OVERPAINT_S3_ACCESS_KEY": settings.s3_access_key or "",
            "OVERPAINT_S3_SECRET_KEY": secret.get_secret_value() if secret else "",
        }
    return kept | farm | dict(more or {})


@dataclass(frozen=True)
class Shell:
    """Types commands in a folder, with a farm's settings in the environment."""

    folder: Path
    env: dict[str, str]

    def overpaint(self, *argv: str, stdin: str = "") -> Result:
        """Run `overpaint ARGV` to its end."""
        done = subprocess.run(
            [OVERPAINT, *argv],
            cwd=self.folder,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        """Start `overpaint ARGV` and leave it running."""
        command: Sequence[str | Path] = [OVERPAINT, *argv]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
