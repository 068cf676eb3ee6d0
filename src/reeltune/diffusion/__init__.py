"""The objective, which trains and samples; the loss."""
