"""Controls made from clips: by which detector, and how well a clip obeys them."""
