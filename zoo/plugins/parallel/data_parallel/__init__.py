"""Data parallelism: FSDP2, DDP, and an optimizer state that is sharded alone (zero1)."""
