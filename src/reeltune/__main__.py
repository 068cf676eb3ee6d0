"""The door of `reeltune`, `python -m reeltune` and the guides' scripts: Ctrl-C is answered in a line from here on, also
while what a command needs is being imported."""

import sys
from collections.abc import Sequence

from reeltune.core.interrupt import ends_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """What `cli.main` does; Ctrl-C is answered while its modules are imported, too. Returns the exit code."""
    ends_at_once()
    from reeltune.cli import main

    return main(argv)


def train(script: str) -> int:
    """What `compat.train` does; Ctrl-C is answered while its modules are imported, too. Returns the exit code."""
    ends_at_once()
    from reeltune.compat import train

    return train(script)


def zero_to_bf16() -> int:
    """What `compat.zero_to_bf16` does; Ctrl-C is answered while its modules are imported, too. Returns the exit
    code."""
    ends_at_once()
    from reeltune.compat import zero_to_bf16

    return zero_to_bf16()


if __name__ == "__main__":
    sys.exit(main())
