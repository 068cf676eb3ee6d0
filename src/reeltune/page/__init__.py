"""`reeltune serve`: a local page to look at data and runs.

The folder stays the truth; the page keeps nothing of its own beside pictures that can be made again.
"""
