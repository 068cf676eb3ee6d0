"""Weights out, in every dialect, proven."""
