"""What one GPU gives: `python -m benchmarks gpu`. A file for each part; `command.py` has their order."""
