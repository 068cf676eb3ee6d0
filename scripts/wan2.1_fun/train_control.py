"""The original tools' control training script by name and flags; reeltune does the work."""

import sys

from reeltune.compat import train_control

sys.exit(train_control())
