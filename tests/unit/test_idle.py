"""The simulation of waiting ranks, on a small scale: its arithmetic, its cost, and what it must find."""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import idle
from reeltune.data.plan import Plan


def test_idle_share_is_what_ranks_wait_for_the_costliest():
    assert idle.idle_share(np.array([[1.0, 1.0], [1.0, 3.0]])) == pytest.approx(0.25)
    assert idle.idle_share(np.array([[2.0, 2.0], [5.0, 5.0]])) == 0


def test_cost_is_what_a_block_of_wan_computes():
    """Counted by torch on a network of one and of two blocks with the released sizes, on the meta device."""

    def counted(layers: int) -> int:
        with torch.device("meta"):
            net = WanTransformer3DModel(
                num_attention_heads=40, attention_head_dim=128, ffn_dim=idle.FEED_FORWARD, num_layers=layers
            )
            inputs = {
                "hidden_states": torch.empty(1, 16, 21, 60, 104),
                "timestep": torch.empty(1),
                "encoder_hidden_states": torch.empty(1, idle.TEXT_TOKENS, 4096),
            }
            with FlopCounterMode(display=False) as counter:
                net(**inputs)
        return counter.get_total_flops()

    block = counted(2) - counted(1)
    assert block == pytest.approx(idle.flops(21 * 30 * 52) / idle.LAYERS, rel=0.01)


def test_no_rank_waits_by_the_plan(monkeypatch):
    monkeypatch.setattr(idle, "RECORDS", 4000)
    held = idle.records()
    alone = Plan(held, idle.RULES, group=1, seed=0)
    apart = []
    for ranks in (4, 64):
        plan = Plan(held, idle.RULES, group=ranks, seed=0)
        costs_KR = idle.ours(plan, ranks, range(len(plan)))
        assert costs_KR.shape == (len(plan), ranks) and len(np.unique(costs_KR)) > 10
        assert idle.idle_share(costs_KR) == 0
        apart.append(idle.idle_share(idle.each_its_own(alone, ranks, 20)))
    assert 0.15 < apart[0] < apart[1] < 0.5
