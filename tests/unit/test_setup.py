"""deploy/setup.sh, without installing anything."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def stamp(python: str) -> str:
    """What setup.sh takes for the state of an installation that this interpreter makes."""
    script = (ROOT / "deploy" / "setup.sh").read_text()
    (function,) = re.findall(r"^setup_wanted\(\) \{.*?^\}", script, re.DOTALL | re.MULTILINE)
    command = ["sh", "-euc", f'TORCH=torch\n{function}\nsetup_wanted "$1"', "sh", python]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_an_activated_environment_is_not_installed_anew(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    inside, outside = str(venv / "bin" / "python"), sys._base_executable  # type: ignore[attr-defined]
    assert len(stamp(inside)) == 65
    assert stamp(inside) == stamp(outside)
