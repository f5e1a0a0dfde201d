"""Checkpoints of a run, read as a source of tensors."""
