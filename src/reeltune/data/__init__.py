"""From a metadata file to batches: every choice is made in the plan, before a file is opened."""
