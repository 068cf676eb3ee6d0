"""A checkpoint's folder and state."""
