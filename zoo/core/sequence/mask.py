"""What a row of packed documents lets each token see, said in numbers and never as a matrix."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from operator import itemgetter

from zoo.core.errors import DataError
from zoo.core.sequence.ranges import Range, Ranges

_start, _stop = itemgetter(0), itemgetter(1)


@dataclass(frozen=True, slots=True)
class Document:
    """A document in its row: tokens `[start, stop)`, of which all see `[start, prefix_stop)`."""

    start: int
    stop: int
    prefix_stop: int


@dataclass(frozen=True, slots=True)
class Mask:
    """Visibility within a row of `length` tokens.

    A token sees its own document: the tokens up to and including itself if `causal`, otherwise all of them.
    `documents` are ascending, disjoint `(start, stop)` ranges; a row outside all of them is padding, which sees
    nothing and is seen by nobody. `window` W leaves of a causal mask the last W tokens, the token itself included
    (Mistral's and Mixtral's convention: query i sees key j if i - W < j <= i). `prefixes` holds for each document how
    many of its first tokens everybody in it sees (prefix language model, 1910.10683); empty means none.
    Raises DataError if documents, window or prefixes contradict each other.
    """

    length: int
    documents: Ranges
    causal: bool = True
    window: int | None = None
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        edge = 0
        for start, stop in self.documents:
            if not edge <= start < stop <= self.length:
                raise DataError(
                    f"document ({start}, {stop}) of a {self.length}-token row: documents must be non-empty, "
                    f"ascending, disjoint and inside the row; this one must start at {edge} or later"
                )
            edge = stop
        if self.window is not None and (self.window < 1 or not self.causal or self.prefixes):
            raise DataError(
                f"a window of {self.window} tokens: a window is at least 1 and narrows a causal mask; where all of a "
                f"document or its prefix is seen there is no order in which it could slide"
            )
        if self.prefixes and not self.causal:
            raise DataError("prefixes widen a causal mask; one that is not causal shows whole documents already")
        sizes = [stop - start for start, stop in self.documents]
        if self.prefixes and (len(self.prefixes) != len(sizes) or any(map(_outside, self.prefixes, sizes))):
            raise DataError(f"prefixes {self.prefixes} of documents of {sizes} tokens: one each, from 0 to its length")

    @classmethod
    def whole(cls, length: int, *, causal: bool = True, window: int | None = None) -> Mask:
        """One document that fills the row."""
        return cls(length, ((0, length),) if length else (), causal, window)

    def with_window(self, window: int | None) -> Mask:
        """The same row as a layer with that window sees it; None leaves it as it is.

        Raises DataError if a window makes no sense here.
        """
        return self if window is None else replace(self, window=window)

    @property
    def area(self) -> int:
        """Number of visible (query, key) pairs, exactly."""
        return sum(
            visible_before(d.stop - d.start, prefix=d.prefix_stop - d.start, window=self.window)
            for d in map(self.document, range(len(self.documents)))
        )

    def document(self, index: int) -> Document:
        """A document by its number."""
        start, stop = self.documents[index]
        prefix = stop - start if not self.causal else self.prefixes[index] if self.prefixes else 0
        return Document(start, stop, start + prefix)

    def document_at(self, position: int) -> Document | None:
        """The document that holds a position, if any."""
        i = bisect_right(self.documents, position, key=_start) - 1
        return self.document(i) if i >= 0 and position < self.documents[i][1] else None

    def documents_in(self, start: int, stop: int) -> list[Document]:
        """The documents with at least one token in `[start, stop)`, uncut."""
        first = bisect_right(self.documents, start, key=_stop)
        return [self.document(i) for i in range(first, bisect_left(self.documents, stop, key=_start))]

    def reach(self, document: Document, query: int) -> Range:
        """The keys `[first, last)` that the query at a position of a document sees."""
        first = document.start if self.window is None else max(document.start, query - self.window + 1)
        return first, max(query + 1, document.prefix_stop)


def visible_before(offset: int, *, prefix: int = 0, window: int | None = None) -> int:
    """Number of pairs (query, key) that the first `offset` queries of a document see."""
    if window is not None and offset > window:
        return window * (window + 1) // 2 + (offset - window) * window
    if offset <= prefix:
        return offset * prefix
    return prefix * prefix + (offset * (offset + 1) - prefix * (prefix + 1)) // 2


def _outside(prefix: int, size: int) -> bool:
    return not 0 <= prefix <= size
