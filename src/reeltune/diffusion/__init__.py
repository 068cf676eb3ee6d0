"""Noise in, loss out: the objective that trains and samples."""
