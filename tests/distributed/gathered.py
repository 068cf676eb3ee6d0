"""Runs that leave the live network's weights at their end in gathered.safetensors: for `before` of processes.forked.

They are gathered as each engine's own library does it, under the names that diffusers or the toy have.
"""

from collections.abc import Container
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reeltune.families import weights
from reeltune.training.duties import Duties
from reeltune.training.learner import Learner


def leave_gathered(rank: int, names: Container[str] | None = None) -> None:
    """names: of the runs' folders that are to have it; all, if there are none."""
    left: set[Path] = set()

    def save(duties: Duties, *, last=False, real=Duties.save):
        real(duties, last=last)
        run, out = duties.run, duties.out
        ends = run.progress.step == run.recipe.training.max_train_steps
        if ends and out not in left and (names is None or out.name in names):
            left.add(out)  # at its end a run asks twice for a save
            state = gathered(run.turns.now.learner)
            if rank == 0:
                weights.write(state, out / "gathered.safetensors")

    Duties.save = save


def gathered(learner: Learner) -> dict[str, torch.Tensor]:
    if learner.engine.name == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(learner.plain.parameters())):
            return {name: weight.detach().clone() for name, weight in learner.plain.named_parameters()}
    if learner.engine.name == "fsdp":
        return get_model_state_dict(learner.plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return learner.plain.state_dict()
