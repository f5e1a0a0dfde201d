"""The mesh that is drawn is the mesh that is made: text and SVG against the process groups of real ranks."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch.distributed as dist

from zoo.core.mesh.degrees import AXES, Degrees, coordinates, drawn_axes, groups
from zoo.core.mesh.drawing import draw_svg, draw_text
from zoo.core.mesh.mesh import Mesh
from zoo.testing import ranks

DEGREES = [
    Degrees(pp=2, cp=2, tp=2),
    Degrees(dp_shard=2, cp=2, tp=2, ep=2),
    Degrees(dp_replicate=2, dp_shard=2, cp=2, ep=4),
    Degrees(pp=2, dp_shard=4, ep=2),
]


def made(degrees):
    """This rank's groups and places by axis, as torch has them."""
    mesh = Mesh(degrees, "cpu")
    axes = [*AXES, "fsdp", "efsdp", *(["ep"] if degrees.ep > 1 else [])]
    return {axis: (dist.get_process_group_ranks(mesh[axis].get_group()), mesh.rank(axis)) for axis in axes}


@pytest.mark.dist
@pytest.mark.parametrize("degrees", DEGREES, ids=Degrees.describe)
def test_groups_drawn_are_groups_made(degrees):
    for rank, axes in enumerate(ranks.run(8, made, degrees)):
        for axis, (peers, place) in axes.items():
            (group,) = [group for group in groups(degrees, axis) if rank in group]
            assert (axis, group) == (axis, peers)
            assert coordinates(degrees, rank)[axis] == place


def in_grid(text):
    """Axis to groups, as the letters of the grid say."""
    lines = [line for line in text.splitlines() if re.fullmatch(r"\w+ +[A-Z](  [A-Z]| \|  [A-Z])*", line)]
    letters = {line.split()[0]: [word for word in line.split()[1:] if word != "|"] for line in lines}
    return {a: [[r for r, x in enumerate(row) if x == y] for y in sorted(set(row))] for a, row in letters.items()}


def in_svg(text):
    """Axis to groups, as the cells of the picture say."""
    found = {}
    for cell in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect"):
        if cell.get("data-axis"):
            members = found.setdefault(cell.get("data-axis"), {}).setdefault(int(cell.get("data-group")), [])
            members.append(int(cell.get("data-rank")))
    return {axis: [of[number] for number in sorted(of)] for axis, of in found.items()}


@pytest.mark.parametrize("degrees", [*DEGREES, Degrees(pp=2, dp_replicate=2, dp_shard=2, tp=2)], ids=Degrees.describe)
@pytest.mark.parametrize("gpus_per_node", [3, 8])
def test_grid_and_picture_show_these_groups(degrees, gpus_per_node):
    wanted = {axis: groups(degrees, axis) for axis in drawn_axes(degrees)}
    assert {axis for axis in AXES if getattr(degrees, axis) > 1} <= set(wanted)
    text = draw_text(degrees, gpus_per_node)
    assert in_grid(text) == wanted
    assert max(map(len, text.splitlines())) <= 120
    assert in_svg(draw_svg(degrees, gpus_per_node)) == wanted
    (header,) = [line for line in text.splitlines() if line.startswith("rank ")]
    nodes = [[int(rank) for rank in part.split()] for part in header.removeprefix("rank").split("|")]
    assert sum(nodes, []) == list(range(degrees.world_size))
    assert all(len(node) == gpus_per_node for node in nodes[:-1])


def test_many_ranks_are_summed_up_and_groups_across_nodes_are_named():
    degrees = Degrees(dp_replicate=4, dp_shard=16, cp=16, tp=4)
    text = draw_text(degrees, 8)
    assert "4096 ranks on 512 nodes" in text
    assert "1024 groups of 4: 0 1 2 3, 4 5 6 7, ..., 4092 4093 4094 4095 (cuts matrices)" in text
    assert "256 groups of 16: 0 4 ... 60, " in text
    assert "across nodes" in next(line for line in text.splitlines() if line.startswith("cp "))
    assert "rank  " not in text
    assert len(text.splitlines()) < 10


def test_a_narrow_terminal_gets_the_same_words_in_lines_that_fit():
    degrees = Degrees(pp=2, dp_shard=8, cp=4, tp=8)
    narrow, wide = draw_text(degrees, 8, 60), draw_text(degrees, 8, 1000)
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == wide.split()
    assert all(line.startswith(" " * 14) for line in narrow.splitlines() if line.startswith(" "))


@pytest.mark.parametrize("degrees", [Degrees(cp=2, tp=2), Degrees(pp=2, dp_shard=8, cp=4, tp=8)], ids=Degrees.describe)
def test_cells_of_a_picture_lie_apart_inside_it_and_it_is_no_ribbon(degrees):
    picture = ET.fromstring(draw_svg(degrees, 8))
    width, height = int(picture.get("width")), int(picture.get("height"))
    assert max(width, height) <= 3 * min(width, height)
    cells = [c for c in picture.iter("{http://www.w3.org/2000/svg}rect") if c.get("data-axis")]
    boxes = [tuple(int(c.get(side)) for side in ("x", "y", "width", "height")) for c in cells]
    assert len(boxes) == degrees.world_size * len(drawn_axes(degrees))
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    painted = {(x + dx, y + dy) for x, y, w, h in boxes for dx in (0, w - 1) for dy in (0, h - 1)}
    assert len(painted) == 4 * len(boxes)
    texts = {(t.get("x"), t.get("y")) for t in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert len(texts) == len(list(picture.iter("{http://www.w3.org/2000/svg}text")))
