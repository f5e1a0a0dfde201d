"""The `ulysses` scheme: each rank computes some heads over the whole row (DeepSpeed-Ulysses, 2309.14509).

One exchange before attention and one after, whose sizes shrink with the degree as long as there are key/value heads
to deal out; no exchange can hide behind the computation, and memory for K/V is that of the whole row for few heads.
"""

from __future__ import annotations

from zoo import AttentionProblem, HeadShape
from zoo.plugins.context.heads import sharing_problem
from zoo.plugins.context.hybrid import Hybrid


class Ulysses(Hybrid):
    """`hybrid` with one group: no ring is left, and any layout of rows costs the same."""

    splits_rows = False

    def __init__(self) -> None:
        super().__init__()
        self.name = "ulysses"

    def check(self, problem: AttentionProblem, length: int, degree: int) -> str | None:
        """None, or that there are not enough heads, with the most ranks there are enough for."""
        reason = sharing_problem(problem.heads, degree)
        return reason and f"{reason}; lower --cp, or type --cp-scheme hybrid"

    def inner(self, heads: HeadShape, degree: int) -> int:
        return degree
