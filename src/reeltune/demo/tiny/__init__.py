"""A tiny checkpoint for each family that the demo shows untrained: its sizes, as values."""
