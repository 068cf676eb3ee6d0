"""The original tools' script of that name: a checkpoint of any engine to weights in bf16; reeltune does the work."""

import sys

from reeltune.__main__ import zero_to_bf16

if __name__ == "__main__":
    sys.exit(zero_to_bf16())
