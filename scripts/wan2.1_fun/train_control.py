"""The original tools' control training script by name and flags; reeltune does the work."""

import sys

from reeltune.compat import train_control

if __name__ == "__main__":  # the processes that measure and decode clips import this file too
    sys.exit(train_control())
