"""Bytes per trained parameter, by torch's record of its allocations: what weights, gradients and state add up to."""

import pytest
import torch

from benchmarks.memory import bytes_per_parameter

WEIGHT = {"fp32": 4, "bf16_stochastic": 2}  # and as much for a gradient
STATE = {"adamw": 8, "8bit": 2, "came": 4, "adafactor": 0}  # moments in full size; factored ones are next to nothing
LIFTED = 8 / 64  # weight and gradient of one of 64 layers in fp32, and what the step makes of them


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("optimizer", STATE)
@pytest.mark.parametrize("weights", WEIGHT)
def test_bytes_add_up(weights, optimizer, in_backward):
    if optimizer == "8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    torch.set_num_threads(1)
    least = WEIGHT[weights] + STATE[optimizer] + (0 if in_backward else WEIGHT[weights])
    found = bytes_per_parameter(weights, optimizer, in_backward)
    assert least <= found < least + 5 * LIFTED
