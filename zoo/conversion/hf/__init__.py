"""Hugging Face checkpoints, local or on a hub."""
