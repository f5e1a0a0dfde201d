"""Which layout a packed row gets: head-tail for one causal document, the solver's for anything else."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.core.sequence.balance import balanced
from zoo.core.sequence.layout import SequenceLayout
from zoo.core.sequence.mask import Mask

BALANCES = ("auto", "head-tail", "balanced", "contiguous")


def row_layout(
    mask: Mask, windows: Mapping[int | None, int], degree: int, *, balance: str = "auto", splits_rows: bool = True
) -> SequenceLayout:
    """The layout of a row over `degree` ranks whose model has so many layers of each window.

    `auto` is contiguous where ranks do not compute the rows they hold, head-tail where that is exact (one causal
    document seen whole), and otherwise what balances tokens and scores of all layers.
    """
    if balance == "contiguous" or degree == 1 or (balance == "auto" and not splits_rows):
        return SequenceLayout.contiguous(mask.length, degree)
    one = mask.causal and not mask.prefixes and mask.documents == ((0, mask.length),) and set(windows) <= {None}
    if balance == "head-tail" or (balance == "auto" and one):
        return SequenceLayout.head_tail(mask.length, degree)
    return balanced([(mask.with_window(window), layers) for window, layers in windows.items()], degree)
