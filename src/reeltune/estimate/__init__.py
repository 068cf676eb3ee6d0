"""`reeltune plan` and `check`: the data that a run will see, its memory and its time."""
