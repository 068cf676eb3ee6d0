"""FSDP's step of AdamW on what each process keeps of the weights: the bits of torch's own on DTensors."""

from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from reeltune.distributed.ddp import Direct
from reeltune.distributed.engine import Engine
from reeltune.distributed.fsdp_step import OnShards
from reeltune.distributed.launch import Parallelism
from reeltune.optim.optimizers import soften_outliers
from tests.distributed.processes import train
from tests.runs.same_run import assert_equal

COUNT, STEPS, MAX_NORM = 3, 3, 0.01  # gradients are clipped, and softened as outliers


class Net(nn.Module):
    """Rows that three processes share evenly and not, and fewer than there are processes: some keep nothing of them."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(4, 7), nn.Linear(7, 2), nn.Linear(6, 6)

    def forward(self, x_BC):
        return self.head(self.body(x_BC).tanh())


def trained(kind, engine):
    """(its trainer, norms, weights) after some steps, of which the second has two micro-steps. After each comes a
    backward pass that is thrown away."""
    torch.manual_seed(0)
    net = Net()
    fully_shard(net)
    first, *others = net.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others}])
    made = kind(engine.accelerator, net, optimizer)
    draw, norms = torch.Generator().manual_seed(engine.rank), []
    for step in range(STEPS):
        for _ in range(1 + step % 2):
            made.backward(net(torch.randn(5, 4, generator=draw)).square().mean(), last=True)
        norms.append(made.step([first, *others], MAX_NORM, partial(soften_outliers, max_norm=MAX_NORM)))
        assert all(parameter.grad is None for parameter in net.parameters())
        made.rehearse(net(torch.ones(5, 4)).sum())
        assert all(parameter.grad is None for parameter in net.parameters())
    return made, norms, [cast("DTensor", parameter).full_tensor() for parameter in net.parameters()]


def compare():
    engine = Engine(on_cpu=True, parallelism=Parallelism("fsdp"))
    theirs, norms, weights = trained(partial(Direct, ddp=False), engine)
    ours, our_norms, our_weights = trained(OnShards, engine)
    assert min(our_norms) > 5 * MAX_NORM
    assert_equal(our_norms, [norm.full_tensor() for norm in norms])
    assert_equal(our_weights, weights)
    names = {name: name.upper() for name, _ in ours.plain.named_parameters()}
    assert_equal(list(map(vars, ours.pieces(names))), list(map(vars, theirs.pieces(names))))
    assert ours.scalars(names) == theirs.scalars(names) and "UNUSED.WEIGHT" not in ours.scalars(names)
    assert {type(value) for state in ours._inner.state.values() for value in state.values()} == {torch.Tensor}
    return 0


def test_it_ends_in_the_bits_of_a_step_on_dtensors(tmp_path):
    train([compare], COUNT, tmp_path)
