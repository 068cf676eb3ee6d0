"""`reeltune serve`: a local page to look at data and runs. The folder stays the truth; what the page keeps beside it are
pictures that can be made again.
"""
