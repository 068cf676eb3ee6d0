"""Noise to clip: prompts, previews, held-out loss."""
