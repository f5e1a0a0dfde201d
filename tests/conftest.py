"""Fixtures that tests of several folders share."""

from tests.distributions import distributions

__all__ = ["distributions"]
