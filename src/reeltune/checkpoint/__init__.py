"""A checkpoint: its folder, written whole or not at all, and the optimizer state in it."""
