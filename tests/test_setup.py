"""scripts/setup.sh: what ./demo and ./check do first. Nothing is installed here: its own steps are only told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = """#!/bin/sh
set -eu
. "$(dirname -- "$0")/scripts/setup.sh"
make_venv() { echo made; }
install_torch() { echo torch; }
pip_install() { echo packages; }
setup "$@"
"""


def place(folder: Path, python: str) -> Path:
    """A checkout with an environment whose Python is this script."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for path, text in ((folder / ".venv" / "bin" / "python", python), (folder / "command", COMMAND)):
        path.write_text(text)
        path.chmod(0o755)
    return folder / "command"


def said(command: Path, *args: str) -> list[str]:
    return subprocess.run([command, *args], capture_output=True, text=True, check=True).stdout.split()


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    command = place(tmp_path, "#!/bin/sh\n")
    installed = ["torch", "packages", "packages"]
    assert said(command) == installed and said(command) == []
    assert said(command, "test") == installed and said(command, "test") == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# another requirement\n")
    assert said(command) == installed


def test_an_environment_that_was_stopped_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    """Ctrl-C in `python -m venv` leaves a Python without pip."""
    no_pip = """#!/bin/sh
case "$*" in *"-m pip"*) exit 1 ;; esac
"""
    assert said(place(tmp_path, no_pip))[0] == "made"
