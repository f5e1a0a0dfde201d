"""What a stage of the plan returns: a decision and its reason."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Chosen(NamedTuple, Generic[T]):
    """A decision, and the sentence that `zoo plan` prints of it."""

    value: T
    why: str
