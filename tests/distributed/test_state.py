"""The optimizer's state as it is made for what a checkpoint of another engine has."""

import pytest
import torch
from torch import nn

from reeltune.distributed.ddp import zeros


@pytest.mark.parametrize("fused", [True, None])
def test_numbers_lie_where_torch_itself_reads_them_to(fused):
    """A fused optimizer on a GPU that is given a step on the CPU reads memory that is not there."""
    weight = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0]["fused"] = fused
    ours = zeros(optimizer, weight, ["exp_avg", "exp_avg_sq"], {"step": 4.0})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {name: v.clone() for name, v in ours.items()}}})
    theirs = optimizer.state[weight]
    told = {name: (value.device, value.dtype, value.shape) for name, value in theirs.items()}
    assert {name: (value.device, value.dtype, value.shape) for name, value in ours.items()} == told
    assert ours["step"].device.type == ("meta" if fused else "cpu")
