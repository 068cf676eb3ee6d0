"""A small real run, made here in a few minutes."""
