"""From a job to everything decided, before a process starts."""
