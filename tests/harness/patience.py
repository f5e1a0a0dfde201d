"""How long a test waits for what must come: so long that only what never comes is given up."""

PATIENCE_S = 900.0
"""Seconds. No test may depend on how fast a machine is or how busy; this is there so that a hang ends at all."""
