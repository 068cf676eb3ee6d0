"""python -m reeltune"""

import sys

from reeltune.cli import main

if __name__ == "__main__":
    sys.exit(main())
