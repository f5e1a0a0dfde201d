"""The mesh as people see it: which rank sits in which group, as text and as SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from zoo.core.mesh.degrees import AXES, Degrees, drawn_axes, groups

_GRID_RANKS = 16
"""With more ranks, lines of a grid no longer fit a terminal."""
_ABOUT = {
    "tp": "cuts matrices",
    "cp": "cuts rows of tokens",
    "dp_shard": "own rows, shards weights",
    "dp_replicate": "own rows, copies weights",
    "pp": "stages of layers",
    "fsdp": "shards weights",
    "ep": "exchanges tokens, cuts experts",
    "efsdp": "shards each expert",
}


def draw_text(degrees: Degrees, gpus_per_node: int, width: int = 120) -> str:
    """Lines: the mesh, its groups axis by axis, and up to 16 ranks a grid in which equal letters are one group.

    Lines of words are wrapped at `width` characters, under where they begin.
    """
    order = " x ".join(f"{axis} {getattr(degrees, axis)}" for axis in AXES)
    axes, few = drawn_axes(degrees), degrees.world_size <= _GRID_RANKS
    said = {
        "mesh": f"{_placed(degrees, gpus_per_node)}: {degrees.describe()}",
        "order": f"{order}, outermost first{'' if few else '; --svg FILE draws all'}",
        **{axis: _summary(degrees, axis, gpus_per_node) for axis in axes},
    }
    lines = [line for topic, words in said.items() for line in wrapped(topic, words, width)]
    if axes and few:
        lines += ["", *_grid(degrees, axes, gpus_per_node)]
    return "\n".join(lines)


def draw_svg(degrees: Degrees, gpus_per_node: int) -> str:
    """A picture: a frame a node, a column a rank, a line an axis; cells of one group have its colour and number."""
    axes, world = drawn_axes(degrees), degrees.world_size
    wide = _LABEL_W + min(gpus_per_node, world) * _CELL_W + _GAP
    height = _CELL_H * (len(axes) + 1) + _GAP
    nodes = -(-world // gpus_per_node)
    # About as wide as high, whatever the number of nodes.
    columns = max(1, round(math.sqrt(nodes * (height + _GAP) / wide)))
    top = _GAP + _CELL_H * (len(axes) + 1)
    size = (max(_LEAST_W, columns * wide), top + -(-nodes // columns) * (height + _GAP) + _GAP)
    heading = f"{_placed(degrees, gpus_per_node)}: {degrees.describe()}"
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(degrees.describe())}</title>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        _text(8, _CELL_H, heading),
        *(_text(8, (n + 2) * _CELL_H, f"{axis}: {_about(degrees, axis)}") for n, axis in enumerate(axes)),
    ]
    for node in range(nodes):
        ranks = range(node * gpus_per_node, min(world, (node + 1) * gpus_per_node))
        left, y = (node % columns) * wide, top + node // columns * (height + _GAP)
        body += _node(degrees, axes, node, ranks, (left, y), height)
    return "\n".join([*body, "</svg>", ""])


_CELL_W, _CELL_H, _LABEL_W, _GAP, _LEAST_W = 44, 24, 110, 12, 480


def _node(
    degrees: Degrees, axes: Sequence[str], node: int, ranks: range, corner: tuple[int, int], height: int
) -> Iterator[str]:
    width = len(ranks) * _CELL_W
    left, top = corner
    frame = f'x="{left + _LABEL_W - 4}" y="{top}" width="{width + 8}" height="{height}"'
    yield f'<rect {frame} fill="none" stroke="#888" rx="4"/>'
    yield _text(left + 8, top + _CELL_H - 6, f"node {node}")
    for column, rank in enumerate(ranks):
        yield _text(left + _LABEL_W + column * _CELL_W + 14, top + _CELL_H - 6, str(rank))
    for line, axis in enumerate(axes, start=1):
        y = top + line * _CELL_H
        yield _text(left + 24, y + 16, axis)
        index = _group_index(degrees, axis)
        for column, rank in enumerate(ranks):
            x, group = left + _LABEL_W + column * _CELL_W, index[rank]
            # The golden angle keeps the colours of neighbouring groups apart however many there are.
            yield (
                f'<rect x="{x}" y="{y}" width="{_CELL_W - 2}" height="{_CELL_H - 2}" '
                f'fill="hsl({group * 137.508 % 360:.0f},60%,80%)" data-axis="{axis}" data-rank="{rank}" '
                f'data-group="{group}"/>'
            )
            yield _text(x + 14, y + 16, str(group))


def _text(x: int, y: int, words: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(words)}</text>'


def _group_index(degrees: Degrees, axis: str) -> dict[int, int]:
    """Rank to the number of its group."""
    return {rank: number for number, group in enumerate(groups(degrees, axis)) for rank in group}


def _summary(degrees: Degrees, axis: str, gpus_per_node: int) -> str:
    """As `2 ranks, 4 groups: 0 1, 2 3, 4 5, 6 7 (cuts matrices)`."""
    found = groups(degrees, axis)
    listed = [_ranks(group) for group in found]
    listed = listed if len(listed) <= 4 else [*listed[:2], "...", listed[-1]]
    across = any(group[0] // gpus_per_node != group[-1] // gpus_per_node for group in found)
    many = _groups(found)
    return f"{many}: {', '.join(listed)} ({_ABOUT[axis]}{', across nodes' if across else ''})"


def _about(degrees: Degrees, axis: str) -> str:
    """As `4 groups of 2, cuts matrices`."""
    return f"{_groups(groups(degrees, axis))}, {_ABOUT[axis]}"


def _groups(found: Sequence[Sequence[int]]) -> str:
    return f"{_many(len(found), 'group')} of {len(found[0])}"


def _placed(degrees: Degrees, gpus_per_node: int) -> str:
    """As `16 ranks on 2 nodes of 8`."""
    nodes = _many(-(-degrees.world_size // gpus_per_node), "node")
    return f"{_many(degrees.world_size, 'rank')} on {nodes} of {gpus_per_node}"


def wrapped(topic: str, words: str, width: int) -> list[str]:
    """A topic and what is said of it as lines."""
    return textwrap.wrap(
        f"{topic:<14}{words}",
        max(width, 40),
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ranks(group: Sequence[int]) -> str:
    """`0 2 4 6`, and `0 2 ... 30` for many."""
    shown = list(map(str, group)) if len(group) <= 4 else [str(group[0]), str(group[1]), "...", str(group[-1])]
    return " ".join(shown)


def _grid(degrees: Degrees, axes: Sequence[str], gpus_per_node: int) -> Iterator[str]:
    world = degrees.world_size
    starts = range(0, world, gpus_per_node)

    def line(label: str, cells: Sequence[str]) -> str:
        parts = ["".join(f"{cell:>3}" for cell in cells[start : start + gpus_per_node]) for start in starts]
        return f"{label:<14}{' |'.join(parts)}"

    widths = [3 * min(gpus_per_node, world - start) for start in starts]
    yield f"{'':<14}{'  '.join(f' node {i}'.ljust(w) for i, w in enumerate(widths))}".rstrip()
    yield line("rank", [str(rank) for rank in range(world)])
    for axis in axes:
        index = _group_index(degrees, axis)
        yield line(axis, [chr(ord("A") + index[rank]) for rank in range(world)])
