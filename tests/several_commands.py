"""The guides' scripts, one command after another, in the processes that this is started in.

Each argument is a JSON file of {"environ": what the launcher would have set, "script": ..., "argv": [...]}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from reeltune import compat

if __name__ == "__main__":
    torch.set_num_threads(1)
    for file in sys.argv[1:]:
        command = json.loads(Path(file).read_text())
        before = dict(os.environ)
        os.environ.update(command["environ"])
        code = compat.train(command["script"], command["argv"])
        if code:
            sys.exit(code)
        os.environ.clear()
        os.environ.update(before)
