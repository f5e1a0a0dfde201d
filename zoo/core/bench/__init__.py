"""Context schemes compared by their plans and by the clock."""
