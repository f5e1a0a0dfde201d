"""Counts the imports of zoo: files are nodes, rooms are groups of files.

    python -m tools.rooms [PACKAGE]        # zoo.core if none is named

A room is what lies directly in the package: a folder, or a file by itself. An arrow goes from one room to another if a
file of the one imports a file of the other, however often. Every import counts: those inside functions, those for type
checkers, and targets such as "package.module:name" of entries, which are imported later.

Prints the rooms with their files, floor and arrows, then the circles. A floor is the longest way down; rooms of one
circle share it. Exit status 1 if files or rooms are in a circle.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
_TARGET = re.compile(r"zoo(\.\w+)+(?=:\w)")

Graph = dict[str, set[str]]
"""Name to the names that it imports."""


def modules() -> dict[str, Path]:
    """Return every module of zoo by its name."""
    found = {}
    for path in sorted((ROOT / "zoo").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Graph:
    """Return which modules of zoo each of them imports."""
    known = modules()
    return {name: _imported(path, known) - {name} for name, path in known.items()}


def _imported(path: Path, known: Mapping[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys()
            if not inner <= known.keys():
                found.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := _TARGET.match(node.value)):
            found.add(match[0])
    return found & known.keys()


def rooms(graph: Graph, package: str) -> Graph:
    """Return which rooms of a package each of its rooms imports."""
    inside = {name: room_of(name, package) for name in graph if name.startswith(f"{package}.")}
    found: Graph = {room: set() for room in inside.values()}
    for name, room in inside.items():
        found[room] |= {inside[other] for other in graph[name] if other in inside} - {room}
    return found


def room_of(name: str, package: str) -> str:
    """Return the room of a module, as `attention` for `zoo.core.sequence.mask`."""
    return name.removeprefix(f"{package}.").partition(".")[0]


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that import each other, by whatever way; each sorted, the largest first."""
    reach = {name: _reached(graph, name) for name in graph}
    found = {tuple(sorted({a, *(b for b in reach[a] if a in reach[b])})) for a in graph}
    return sorted((list(group) for group in found if len(group) > 1), key=lambda group: (-len(group), group))


def _reached(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph.get(waiting.pop(), ()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """Return the longest way down from each node, with a circle as one node."""
    group = {name: name for name in graph} | {name: names[0] for names in circles(graph) for name in names}
    merged: Graph = {group[name]: set() for name in graph}
    for name, others in graph.items():
        merged[group[name]] |= {group[other] for other in others if other in group} - {group[name]}
    found: dict[str, int] = {}
    try:
        for name in TopologicalSorter(merged).static_order():
            found[name] = 1 + max((found[other] for other in merged[name]), default=-1)
    except CycleError as error:
        raise AssertionError("circles were merged") from error
    return {name: found[group[name]] for name in graph}


def _lines(package: str, graph: Graph) -> Iterable[str]:
    between = rooms(graph, package)
    floor = floors(between)
    files = Counter(room_of(name, package) for name in graph if name.startswith(f"{package}."))
    for room in sorted(between, key=lambda room: (-floor[room], room)):
        yield f"{floor[room]:3}  {room:20} {files[room]:3} files  -> {', '.join(sorted(between[room]))}"
    arrows = sum(map(len, between.values()))
    yield f"{len(between)} rooms on {max(floor.values(), default=-1) + 1} floors, {arrows} arrows in {package}"
    for what, found in (("rooms", circles(between)), ("files of zoo", circles(graph))):
        yield f"{len(found)} circles of {what}"
        for names in found:
            yield f"     {', '.join(names)}"


def main(words: list[str]) -> int:
    """Print what there is. Return 1 if there is a circle."""
    graph, package = imports(), words[0] if words else "zoo.core"
    for line in _lines(package, graph):
        sys.stdout.write(f"{line}\n")
    return int(bool(circles(graph) or circles(rooms(graph, package))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
