"""`make demo`: a small real run, on data and a model made here in a few minutes."""
