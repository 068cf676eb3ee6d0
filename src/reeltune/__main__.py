"""The door of `reeltune`, `python -m reeltune` and the guides' scripts: Ctrl-C is answered in a line from here on, also
while what a command needs is being imported."""

import sys
from collections.abc import Sequence

from reeltune.core.interrupt import ends_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """As `cli.main`."""
    ends_at_once()
    from reeltune.cli import main

    return main(argv)


def train(script: str) -> int:
    """As `compat.train`."""
    ends_at_once()
    from reeltune.compat import train

    return train(script)


def zero_to_bf16() -> int:
    """As `compat.zero_to_bf16`."""
    ends_at_once()
    from reeltune.compat import zero_to_bf16

    return zero_to_bf16()


if __name__ == "__main__":
    sys.exit(main())
