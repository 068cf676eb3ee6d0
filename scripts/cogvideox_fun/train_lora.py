"""The original tools' training script by name and flags; reeltune does the work."""

import sys

from reeltune.__main__ import train

if __name__ == "__main__":  # the processes that measure and decode clips import this file too
    sys.exit(train("cogvideox_fun/train_lora.py"))
