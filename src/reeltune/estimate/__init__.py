"""`plan` and `check`: what a run will see, take and cost."""
