"""Tensor and sequence parallelism over `tp`."""
