"""Rules of the house that no linter states: sizes, characters, packages, what `zoo --help` costs."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "zoo").rglob("*.py"))
WRITTEN = sorted(
    path
    for folder in ("zoo", "tests", "examples", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".toml")
)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_file_is_long_and_no_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text().strip()], ids=relative)
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_nothing_is_left_to_do():
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    assert [relative(path) for path in WRITTEN if marks.search(path.read_text())] == []


def test_code_is_ascii():
    assert [relative(path) for path in WRITTEN if path.suffix == ".py" and not path.read_text().isascii()] == []


def test_no_file_has_a_name_without_meaning():
    assert [relative(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_every_folder_of_code_is_a_package_that_gets_built():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    include = [part.strip() for part in config["options.packages.find"]["include"].split(",")]
    built = set(find_packages(str(ROOT), include=include))
    assert built == {relative(path.parent).replace("/", ".") for path in MODULES}


def test_no_module_reaches_into_the_globals():
    found = [
        (relative(path), node.lineno)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_help_imports_no_more_than_comes_within_a_quarter_of_a_second():
    """Some 190 modules where a bare interpreter starts in 30 ms; of the library of Python the most."""
    script = (
        "import sys\nbare = set(sys.modules)\nfrom zoo.cli.main import main\nmain(['--help'])\n"
        "print(len(set(sys.modules) - bare), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stderr.splitlines()[-1]) < 250
