"""Runs as several_runs.py has them, each of which leaves the live network's weights at its end in gathered.safetensors.

They are gathered as each engine's own library does it, under the names that diffusers or the toy have.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reeltune.families import weights
from reeltune.learner import Learner
from reeltune.settings import build, read
from reeltune.train import train


def gathered(learner: Learner) -> dict[str, torch.Tensor]:
    if learner.engine.name == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(learner.plain.parameters())):
            return {name: weight.detach().clone() for name, weight in learner.plain.named_parameters()}
    if learner.engine.name == "fsdp":
        return get_model_state_dict(learner.plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return learner.plain.state_dict()


def watched(out: Path):
    def pieces(learner: Learner, real=Learner.pieces):
        state = gathered(learner)
        if learner.engine.main:
            weights.write(state, out / "gathered.safetensors")
        yield from real(learner)

    return pieces


if __name__ == "__main__":
    torch.set_num_threads(1)
    real = Learner.pieces
    for file in sys.argv[1:]:
        recipe = build(read(file))
        Learner.pieces = watched(Path(recipe.output.output_dir))
        code = train(recipe)
        Learner.pieces = real
        if code:
            sys.exit(code)
