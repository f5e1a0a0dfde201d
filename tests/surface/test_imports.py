"""Who may import whom, and what never costs an import of torch."""

import ast
import configparser
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from zoo.core.registry.loading import Plugins

ROOT = Path(__file__).parents[2]
FORBIDDEN_IN_MODELS = {"torch.distributed", "os", "DTensor", "distribute_tensor", "DeviceMesh", "ProcessGroup"}

FAMILY_NAMES_ELSEWHERE = {
    ("zoo/models/common/rope_parameters.py", "llama3"): "the hub's word for a kind of RoPE scaling, whoever uses it",
    ("zoo/models/common/rope.py", "llama3"): "the hub's word for a kind of RoPE scaling, whoever uses it",
    ("zoo/models/nemotron_nas/sizes.py", "llama3"): "the hub's word for a kind of RoPE scaling, whoever uses it",
}
"""(file, literal) to the reason why a family's name stands outside its folder."""


def sources(folder):
    """Path from the root and syntax tree of each module below a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def builtin_entry_points():
    """Name to module, as setup.cfg says."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for line in config["options.entry_points"]["zoo"].splitlines() if line.strip()]
    return dict((part.strip() for part in line.split("=")) for line in lines)


def imported_names(tree):
    """Every dotted name that an import statement binds or passes through."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (name for alias in node.names for name in (alias.name, f"{node.module}.{alias.name}"))


def test_import_directions_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["zoo", "tools", "benchmarks", "examples"])
def test_nothing_outside_tests_imports_tests(folder):
    found = [
        (path, name)
        for path, tree in sources(folder)
        for name in imported_names(tree)
        if name == "tests" or name.startswith("tests.")
    ]
    assert not found


def test_models_know_of_no_ranks_meshes_or_environment():
    found = [
        (path, name)
        for path, tree in sources("zoo/models")
        for name in imported_names(tree)
        if any(name == word or name.startswith(f"{word}.") for word in FORBIDDEN_IN_MODELS)
    ]
    found += [
        (path, ast.unparse(node))
        for path, tree in sources("zoo/models")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.distributed", "os.environ", "dist.get_rank")
    ]
    assert not found


def test_no_family_is_named_outside_its_folder():
    plugins = Plugins.load(only=[])
    found = set()
    for status in plugins.statuses:
        for entry in status.entries.get("models", ()):
            folder = status.source.value.rpartition(".")[0].replace(".", "/")
            found |= set(_literals({entry.name, entry.model_type}, folder))
    unexplained = sorted((path, line, name) for path, line, name in found if (path, name) not in FAMILY_NAMES_ELSEWHERE)
    assert not unexplained
    unused = set(FAMILY_NAMES_ELSEWHERE) - {(path, name) for path, _, name in found}
    assert not unused


def _literals(names, own_folder):
    for path, tree in sources("zoo"):
        if not path.startswith(f"{own_folder}/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and node.value in names:
                    yield path, node.lineno, node.value


def test_every_builtin_imports_without_torch():
    script = (
        "import importlib, json, sys\n"
        "heavy = []\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        heavy.append(name)\n"
        "        [sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == 'torch']\n"
        "print(json.dumps(heavy))\n"
    )
    modules = json.dumps(sorted(builtin_entry_points().values()))
    done = subprocess.run([sys.executable, "-c", script, modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_every_plugin_module_is_an_entry_point_and_the_other_way_round():
    modules = {
        path.removesuffix(".py").replace("/", ".")
        for folder in ("zoo/plugins", "zoo/models", "zoo/conversion")
        for path, _ in sources(folder)
        if path.endswith(("_plugin.py", "/plugin.py"))
    }
    assert modules == set(builtin_entry_points().values())


def test_what_is_installed_is_what_setup_cfg_says():
    installed = {point.name: point.value for point in metadata.distribution("zoo").entry_points.select(group="zoo")}
    assert installed == builtin_entry_points(), "install again: pip install -e ."


def test_every_builtin_is_let_in():
    assert [(s.name, s.reason) for s in Plugins.load(only=[]).statuses if not s.ok] == []


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["models"], ["plugins"], ["plugins", "info", "dense"]])
def test_light_commands_do_not_import_torch(words):
    script = "import sys; from zoo.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_import_zoo_imports_neither_torch_nor_click():
    script = "import sys, zoo; zoo.hookimpl; sys.exit('torch' in sys.modules or 'click' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
