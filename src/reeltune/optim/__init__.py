"""Optimizers, which weights learn, the step taken within the backward pass."""
