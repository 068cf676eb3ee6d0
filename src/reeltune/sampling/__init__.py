"""From noise to a clip: prompts, previews, the held-out loss."""
