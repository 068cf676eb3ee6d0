"""The loop, and what goes on beside it."""
