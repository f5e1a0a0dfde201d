"""A run on one rank: built once, stepped, saved, reported."""
