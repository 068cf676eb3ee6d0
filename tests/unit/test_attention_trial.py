"""The trial of attention's kernels: who is taken by which times, who is left out and why, and what is timed."""

from itertools import count

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from reeltune.memory import attention, attention_trial
from reeltune.memory.attention_trial import Call, asked, median_s, soonest, tried, why
from tests.unit.test_attention import Operators

aten = torch.ops.aten
HEADERS = {
    "efficient": "Memory efficient kernel not used because:",
    "flash": "Flash attention kernel not used because:",
    "cudnn": "CuDNN attention kernel not used because:",
}


@pytest.mark.parametrize(
    ("passes_s", "kernel"),
    [
        ({"flash": [1.0], "cudnn": [0.9], "efficient": [2.0]}, "cudnn"),
        ({"flash": [1.0], "cudnn": [0.98], "efficient": [2.0]}, "flash"),  # within noise, so the order decides
        ({"flash": [2.0], "cudnn": [1.01], "efficient": [1.0]}, "cudnn"),
        ({"flash": [2.0], "cudnn": [1.04], "efficient": [1.0]}, "efficient"),
        ({"flash": [1.0, 9.0, 1.0], "cudnn": [1.5, 0.1, 1.5]}, "flash"),  # by medians: not by sums, nor the least
        ({"efficient": []}, "efficient"),
        ({}, None),
    ],
)
def test_the_soonest_by_times(passes_s, kernel):
    assert soonest(passes_s) == kernel


def test_medians_are_of_what_was_timed():
    assert median_s({"flash": [3.0, 1.0, 2.0], "math": []}) == {"flash": 2.0}


def test_kernels_are_asked_in_order_and_math_is_the_last():
    assert attention.in_order("cudnn", ["flash", "cudnn"]) == ["cudnn", "flash", "math"]
    assert attention.in_order("math", ["flash", "math"]) == ["math"]
    assert attention.in_order("flash", ["flash", "math"]) == ["flash", "math"]


@pytest.mark.parametrize("kernel", HEADERS)
def test_of_torchs_reasons_those_for_the_kernel_are_told(kernel):
    own = {HEADERS[name]: f"{name} is for other heads." for name in HEADERS}
    said = [f"{line} (Triggered internally at /x/sdp_utils.cpp:1.)" for pair in own.items() for line in pair]
    assert why(kernel, said, "No available kernel. Aborting execution.") == f"{kernel} is for other heads."
    assert why("math", said, "out of memory. Tried\nto") == "out of memory. Tried"


def call(S=24, times=1, **named):
    made = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 8, generator=made) for length in (24, S, S))
    return Call((query, key, value), named, times)


@pytest.fixture
def clock(monkeypatch):
    """A second for each look."""
    ticks = map(float, count())
    monkeypatch.setattr(attention_trial.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(attention_trial.time, "monotonic", lambda: next(ticks))


def test_kernels_are_timed_in_turns_until_the_time_is_over(clock):
    calls = [call(times=3), call(S=5, times=2)]
    found = tried(calls, ["flash", "math"], seconds=20)
    assert found.left_out == {}
    assert found.passes_s == {"flash": [5.0, 5.0], "math": [5.0, 5.0]}  # 3 and 2 blocks, each call timed on its own
    assert len(tried(calls, ["flash", "math"], seconds=0).passes_s["math"]) == 1
    many = tried(calls, ["flash", "math"], seconds=1e6)
    assert len(many.passes_s["flash"]) == attention_trial.ROUNDS


def test_a_kernel_that_the_device_has_not_is_left_out_and_one_alone_is_not_timed():
    found = tried([call()], ["cudnn", "math"])
    assert found.passes_s == {"math": []} and soonest(found.passes_s) == "math"
    assert found.left_out.keys() == {"cudnn"} and found.left_out["cudnn"].startswith("No viable backend for")


def test_one_that_cannot_do_the_largest_call_is_left_out_and_one_that_cannot_do_a_smaller_is_not():
    both = ["flash", "math"]
    hard, small = call(dropout_p=0.5), call(S=5, dropout_p=0.5)  # which the CPU's flash has not
    assert list(tried([hard, call(S=5)], both, seconds=0).passes_s) == ["math"]
    found = tried([call(), small], both, seconds=0)
    assert list(found.passes_s) == ["flash", "math"]


def test_one_that_runs_out_of_memory_is_left_out(monkeypatch):
    def full(self, real=Call.run):
        if torch.backends.cuda.flash_sdp_enabled():
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 9 GiB.\nmore")
        real(self)

    monkeypatch.setattr(Call, "run", full)
    found = tried([call()], ["flash", "math"], seconds=0)
    assert list(found.passes_s) == ["math"]
    assert found.left_out == {"flash": "out of memory. Tried to allocate 9 GiB."}


def test_a_call_is_run_forward_and_backward_and_leaves_no_gradients():
    one = call(scale=0.5)
    with attention.preferring(["flash"]), Operators() as ran:
        one.run()
    assert ran.counts[aten._scaled_dot_product_flash_attention_for_cpu.default] == 1
    assert ran.counts[aten._scaled_dot_product_flash_attention_for_cpu_backward.default] == 1
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in one.given)


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.linear, self.count = nn.Linear(dim, dim), 0

    def forward(self, x_BHLD, mask):
        self.count += 1
        x_BHLD = self.linear(x_BHLD)
        within = scaled_dot_product_attention(x_BHLD, x_BHLD, x_BHLD, mask, scale=0.5)
        return within + scaled_dot_product_attention(query=x_BHLD, key=x_BHLD[:, :, :3], value=x_BHLD[:, :, :3])


class Other(Block):
    pass


def test_of_each_kind_the_first_block_computes_and_stands_for_the_others():
    torch.manual_seed(0)
    blocks, mask = [Block(), Block(), Other(), Block()], torch.ones(6, 6, dtype=torch.bool)
    x_BHLD = torch.randn(1, 2, 6, 8)

    def forward():
        x = x_BHLD
        for block in blocks:
            x = block(x, mask=mask)
        scaled_dot_product_attention(x, x, x)  # of no block

    calls = asked(blocks, forward)
    assert [block.count for block in blocks] == [1, 0, 1, 0]
    assert [one.times for one in calls] == [3, 3, 1, 1]
    assert [one.given[1].shape[-2] for one in calls] == [6, 3, 6, 3]
    query = blocks[0].linear(x_BHLD).detach()
    assert all(torch.equal(tensor, query) for tensor in calls[0].given)
    assert calls[0].named["attn_mask"] is mask or torch.equal(calls[0].named["attn_mask"], mask)
    assert calls[0].named["scale"] == 0.5 and calls[1].named == {}
    with pytest.raises(ZeroDivisionError):
        asked(blocks, lambda: 1 / 0)
    forward()
    assert [block.count for block in blocks] == [2, 1, 2, 1]  # as if nothing was


def test_where_autocast_is_on_the_tensors_are_as_it_casts_them():
    block, x_BHLD = Block(), torch.randn(1, 2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        calls = asked([block], lambda: block(x_BHLD, mask=torch.zeros(6, 6)))
    assert {tensor.dtype for tensor in (*calls[0].given, calls[0].named["attn_mask"])} == {torch.bfloat16}
