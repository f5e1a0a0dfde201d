"""README's commands run, in the order given, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands():
    """The `$ zoo ...` lines of the console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ zoo ")]


def test_the_commands_of_the_first_run_work_as_typed(tmp_path):
    assert len(commands()) >= 7
    for command in commands():
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, f"{command} prints nothing on stdout"


def test_the_python_of_the_first_run_works_as_typed(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = block + "import torch\nassert model(torch.zeros(1, 5, dtype=torch.long)).shape[:2] == (1, 5)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_map_of_folders_is_the_folders():
    said = set(re.findall(r"^\| `([\w/]+)`", README, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in said)
    packages = {f"zoo/{path.parent.name}" for path in (ROOT / "zoo").glob("*/__init__.py")}
    assert packages <= said


def test_the_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
