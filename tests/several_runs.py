"""Several recipes, one after another, in the processes that this is started in: starting them is what takes long."""

import sys

import torch

from reeltune.settings import build, read
from reeltune.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for file in sys.argv[1:]:
        code = train(build(read(file)))
        if code:
            sys.exit(code)
