"""What a row of packed documents lets each token see, said in numbers and never as a matrix."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from operator import itemgetter

from zoo.core.attention.ranges import Range, Ranges
from zoo.core.errors import DataError

_start, _stop = itemgetter(0), itemgetter(1)


@dataclass(frozen=True, slots=True)
class Mask:
    """Visibility within a row of `length` tokens.

    A token sees its own document: the tokens up to and including itself if `causal`, otherwise all of them.
    `documents` are ascending, disjoint `(start, stop)` ranges; a row outside all of them is padding, which sees
    nothing and is seen by nobody. Raises DataError if they are not.
    """

    length: int
    documents: Ranges
    causal: bool = True

    def __post_init__(self) -> None:
        edge = 0
        for start, stop in self.documents:
            if not edge <= start < stop <= self.length:
                raise DataError(
                    f"document ({start}, {stop}) of a {self.length}-token row: documents must be non-empty, "
                    f"ascending, disjoint and inside the row; this one must start at {edge} or later"
                )
            edge = stop

    @classmethod
    def whole(cls, length: int, *, causal: bool = True) -> Mask:
        """One document that fills the row."""
        return cls(length, ((0, length),) if length else (), causal)

    @property
    def area(self) -> int:
        """Number of visible (query, key) pairs, exactly."""
        sizes = [stop - start for start, stop in self.documents]
        return sum(n * (n + 1) // 2 for n in sizes) if self.causal else sum(n * n for n in sizes)

    def document_at(self, position: int) -> Range | None:
        """The document that holds a position, if any."""
        i = bisect_right(self.documents, position, key=_start) - 1
        return self.documents[i] if i >= 0 and position < self.documents[i][1] else None

    def documents_in(self, start: int, stop: int) -> Ranges:
        """The documents with at least one token in `[start, stop)`, uncut."""
        first = bisect_right(self.documents, start, key=_stop)
        return self.documents[first : bisect_left(self.documents, stop, key=_start)]
