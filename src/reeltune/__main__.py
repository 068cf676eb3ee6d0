"""python -m reeltune"""

import sys

from reeltune.cli import main

sys.exit(main())
