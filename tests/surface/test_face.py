"""The public packages: their list, their laziness, their types, their pages, and who must use them."""

import ast
import importlib
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import zoo
import zoo.models.common
import zoo.testing
from tests.surface.test_imports import builtin_entry_points
from tools import api_page
from zoo.public_names import lazy_getattr, modules_of

ROOT = Path(__file__).parents[2]
PACKAGES = {"zoo": zoo, "zoo.models.common": zoo.models.common, "zoo.testing": zoo.testing}
HOMES = {package: modules_of(face._GROUPS) for package, face in PACKAGES.items()}
NAMES = [(package, name) for package, homes in HOMES.items() for name in homes]
KINDS = ("plugins", "models", "conversion")
BUILT_IN = [path for kind in KINDS for path in sorted((ROOT / "zoo" / kind).rglob("*.py"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
HANDED_ON = {"Account", "Checksums", "Mesh", "Plugins", "Registry", "Tokenizer", "WorkerDied"}
"""Classes that plugins are given and never make or implement: only their own text says what to use of them."""


def imports(tree):
    """(module, name, line) of each `from module import name`, and (module, None, line) of each `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)


def python_of(page):
    """The Python blocks of a page that are whole programs."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        yield ast.parse(textwrap.dedent(block))


# The list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imports_for_type_checkers_are_the_list(package):
    tree = ast.parse(Path(PACKAGES[package].__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert imported == HOMES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_and_all_are_the_list_and_nothing_hides_a_name(package):
    face = PACKAGES[package]
    for module in set(HOMES[package].values()):
        importlib.import_module(module)
    extra = {"__version__"} if face is zoo else set()
    assert set(dir(face)) == set(face.__all__) == {*HOMES[package], *extra}
    for name, home in HOMES[package].items():
        assert getattr(face, name) is getattr(sys.modules[home], name), f"a module of {package} is called {name} too"


def test_every_name_has_one_package():
    names = [name for _, name in NAMES]
    assert sorted(names) == sorted(set(names))


def test_a_name_that_is_listed_twice_is_an_error():
    with pytest.raises(ValueError, match="'Mask' is listed twice, for a and b"):
        modules_of({"one": {"a": ["Mask"]}, "two": {"b": ["Mask"]}})


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'Maks'"):
        zoo.Maks  # noqa: B018
    with pytest.raises(ImportError):
        exec("from zoo import Maks")


# Laziness, star import, pickles -------------------------------------------------------------------


def test_importing_the_packages_and_what_plugin_modules_need_imports_no_torch():
    light = [name for name, home in HOMES["zoo"].items() if home in ("zoo.core.contracts.entries", "zoo.core.errors")]
    script = (
        f"import sys, zoo, zoo.models.common\nfrom zoo import hookimpl, {', '.join(light)}\n"
        "from zoo.models.common import Family, Fields, DecoderConfig, read_decoder\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_star_gives_every_name(package):
    space = {}
    exec(f"from {package} import *", space)
    assert set(HOMES[package]) <= set(space)


@pytest.mark.parametrize(("package", "name"), NAMES, ids=".".join)
def test_a_public_class_or_function_is_pickled_by_its_name(package, name):
    found = getattr(PACKAGES[package], name)
    if isinstance(found, type) or callable(found) and hasattr(found, "__qualname__"):
        assert pickle.loads(pickle.dumps(found)) is found


def test_what_travels_between_processes_is_pickled_by_value():
    heads = zoo.HeadShape(num_heads=4, num_kv_heads=2, head_dim=8)
    entry = zoo.AttentionEntry(name="mine", target="mine:Kernel")
    mask = zoo.Mask.whole(8, window=3)
    plan = zoo.ParallelPlan(block="layers.*", seams={"attention": "layers.*.core"})
    sample = zoo.Sample([1, 2], [False, True], (zoo.Remark("odd", "message 2"),))
    rule = zoo.Rename(ours="a.{i}", hub="b.{i}")
    for value in (heads, entry, mask, plan, sample, rule, zoo.DataError("a.jsonl:3: no text")):
        again = pickle.loads(pickle.dumps(value))
        assert type(again) is type(value)
        assert str(again) == str(value)


# Deprecation --------------------------------------------------------------------------------------


def test_an_old_spelling_works_and_names_the_new_one_where_it_is_used(monkeypatch):
    monkeypatch.setitem(zoo._RENAMED, "OldMask", "zoo.Mask")
    words = r"^zoo\.OldMask is deprecated and will be removed in the next release; write zoo\.Mask$"
    with pytest.warns(DeprecationWarning, match=words) as said:
        exec(compile("from zoo import OldMask", "plugin_of_a_stranger.py", "exec"), space := {})
    assert space["OldMask"] is zoo.Mask
    assert said[0].filename == "plugin_of_a_stranger.py"
    with pytest.warns(DeprecationWarning, match=words) as said:
        assert zoo.OldMask is zoo.Mask
    assert said[0].filename == __file__
    assert "OldMask" not in dir(zoo)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_was_renamed_is_there_under_its_new_name(package):
    face = PACKAGES[package]
    old = lazy_getattr(package, {}, face._RENAMED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert all(old(name) is not None for name in face._RENAMED)
    assert not set(face._RENAMED) & set(HOMES[package])


# Documentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "name"), NAMES, ids=".".join)
def test_a_public_name_has_a_docstring(package, name):
    assert api_page.docstring(HOMES[package][name], name)


def test_the_page_of_names_is_the_list():
    assert (ROOT / "docs" / "api.md").read_text() == api_page.page(), "run: python -m tools.api_page"


def test_every_page_is_linked_from_the_table_of_pages():
    index = (ROOT / "docs" / "architecture.md").read_text()
    assert [page.name for page in PAGES[:-1] if page.name != "architecture.md" and f"]({page.name})" not in index] == []


# Who uses the door --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_imports_nothing_private(path):
    check_door(ast.parse(path.read_text()), own="zoo_pico")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_imports_and_names_nothing_private(page):
    for tree in python_of(page):
        check_door(tree, own="zoo_")
    assert (
        re.findall(r"`zoo\.(?:core|plugins|cli|conversion)\.[\w.]+`|`zoo\.testing\.\w+\.\w+`", page.read_text()) == []
    )


def check_door(tree, own):
    found = [
        (module, name, line)
        for module, name, line in imports(tree)
        if re.match(r"zoo(\.|_|$)", module) and not module.startswith(own)
        if not (module in PACKAGES and (name is None or name in dir(PACKAGES[module])))
    ]
    assert found == []


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_built_in_takes_a_public_name_from_its_package(path):
    where = path.relative_to(ROOT).as_posix()
    if where == "zoo/models/common/__init__.py":
        return
    used = ["zoo"] if where.startswith("zoo/models/common/") else ["zoo", "zoo.models.common"]
    doors = {name: getattr(PACKAGES[package], name) for package in used for name in HOMES[package]}
    found = [
        (line, f"from {module} import {name}")
        for module, name, line in imports(ast.parse(path.read_text()))
        if module.startswith("zoo.") and module not in PACKAGES and name in doors
        if getattr(importlib.import_module(module), name) is doors[name]
    ]
    assert found == []


def test_every_built_in_says_for_which_plugin_api_it_was_written():
    modules = {name: importlib.import_module(name) for name in builtin_entry_points().values()}
    assert [name for name, module in modules.items() if getattr(module, "ZOO_PLUGIN_API", None) != 1] == []


# Types --------------------------------------------------------------------------------------------


def contract_names():
    """(class or function, name in its signature) over what authors implement, make and call."""
    for name, home in HOMES["zoo"].items():
        if name in HANDED_ON or home == "zoo.core.api":
            continue
        tree = ast.parse(Path(importlib.import_module(home).__file__).read_text())
        for node in tree.body:
            if getattr(node, "name", None) == name:
                yield from ((name, home, found) for found in _signature_names(node))
    hooks = importlib.import_module("zoo.core.registry.hookspecs")
    for node in ast.parse(Path(hooks.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            yield from ((node.name, hooks.__name__, found) for found in _signature_names(node))


def _signature_names(node):
    if isinstance(node, ast.FunctionDef):
        parts = [arg.annotation for arg in (*node.args.args, *node.args.kwonlyargs) if arg.annotation]
        parts += [node.returns] if node.returns else []
    else:
        parts = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        implemented = any(ast.unparse(base) in ("Protocol", "ABC") for base in node.bases)
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        for method in methods if implemented else [m for m in methods if m.name == "__init__"]:
            yield from _signature_names(method)
    for part in parts:
        yield from (found.id for found in ast.walk(part) if isinstance(found, ast.Name))


def test_every_class_in_the_signature_of_a_public_contract_is_public():
    classes = {
        node.name
        for path in (ROOT / "zoo" / "core").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    missing = {(where, found) for where, _, found in contract_names() if found in classes - set(HOMES["zoo"])}
    assert missing == set()


STRANGER = """
from typing import assert_type

import zoo
from zoo import AttentionEntry, Mask, ParallelAdapter, ParallelPlan, find_modules, hookimpl
from zoo.models.common import Attention, DecoderConfig, Fields
from zoo.testing import AttentionContract
from zoo import Maks

assert_type(Mask.whole(3), Mask)
assert_type(zoo.Mask.whole(3).area, int)


@hookimpl
def zoo_register_attention() -> list[AttentionEntry]:
    return [AttentionEntry(name=1, target="mine:Kernel")]
"""


@pytest.mark.slow
def test_a_strangers_package_is_checked_with_exact_types(tmp_path):
    """And so is the example: what is wrong here is found, and nothing is wrong there."""
    (tmp_path / "stranger.py").write_text(STRANGER)
    # zoo is installed for a stranger, so mypy says nothing of zoo's own files.
    zoo_is_installed = [f"--config-file={ROOT / 'setup.cfg'}", "--follow-imports=silent"]
    mypy = [sys.executable, "-m", "mypy", "--strict", *zoo_is_installed, f"--cache-dir={tmp_path / 'cache'}"]
    done = subprocess.run(
        [*mypy, tmp_path / "stranger.py", ROOT / "examples" / "attention_kernel.py", "zoo_pico"],
        cwd=ROOT / "examples" / "zoo-pico",
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.partition("error: ")[2] for line in done.stdout.splitlines() if "error: " in line]
    assert errors == [
        'Module "zoo" has no attribute "Maks"  [attr-defined]',
        'Argument "name" to "AttentionEntry" has incompatible type "int"; expected "str"  [arg-type]',
    ], done.stdout + done.stderr
