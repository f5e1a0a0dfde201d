"""Write docs/api.md, the list of public names, from the groups of the public packages: `python -m tools.api_page`."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PACKAGES = ("zoo", "zoo.models.common", "zoo.testing")
HEAD = """# Public names

`from zoo import Mask, hookimpl`: everything that users and authors of plugins need. Names are imported when they are
first used. What "public" promises, and how a name changes: [stability.md](stability.md). What each hook is asked:
[hooks.md](hooks.md). `help(zoo.Mask)` has the whole text of a name, of which this page has the first sentence.

This page is written by `python -m tools.api_page`.
"""


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [HEAD]
    for package in PACKAGES:
        parts.append(f"## `{package}`\n")
        for group, modules in importlib.import_module(package)._GROUPS.items():
            rows = sorted((name, docstring(module, name)) for module, names in modules.items() for name in names)
            table = [f"| `{name}` | {_first_sentence(text)} |" for name, text in rows]
            parts.append("\n".join([f"### {group}\n", "| name | what it is |", "|---|---|", *table]) + "\n")
    return "\n".join(parts)


def docstring(module: str, name: str) -> str:
    """Return what stands below the definition of a class, function or constant; empty if nothing does."""
    return _docstrings(module).get(name, "")


@cache
def _docstrings(module: str) -> dict[str, str]:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return dict(_said(ast.parse(Path(spec.origin).read_text())))


def _said(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, ast.get_docstring(node) or ""
        elif isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    yield target.id, str(below.value.value)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"\.(?: (?=[A-Z`])|$)", paragraph)[0].replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page())
