"""Adapters: low-rank changes that learn beside a frozen network, in training and in every tool's files."""
