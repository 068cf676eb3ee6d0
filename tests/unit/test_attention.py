"""Kernels of attention, by the operators that run."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from reeltune.core.errors import UserError
from reeltune.memory import attention
from reeltune.memory.blocks import recompute

CPU = torch.device("cpu")
LENGTH, WIDTH, FEW = 24, 16, 5


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        """Attention that was one operator."""
        return sum(self.counts[operator] for operator in attention.OPERATORS)


class Block(nn.Module):
    """Attention within `x`, and to the first few of it, which is a caption in real."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.into, self.out, self.dropout = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), dropout

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.into(x).chunk(3, -1))
        within = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        across = scaled_dot_product_attention(q, k[:, :, :FEW], v[:, :, :FEW], dropout_p=self.dropout)
        return x + self.out((within + across).transpose(1, 2).flatten(2))


def net_of(depth=3, block=Block):
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(depth)))


def step(prepare, block=Block):
    """(operators of the forward pass, of the backward pass, loss and gradients of what learns)."""
    net = net_of(block=block)
    prepare(net)
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with Operators() as forward:
        loss = net(x).square().mean()
    with Operators() as backward:
        loss.backward()
    return forward, backward, [loss.detach(), *(weight.grad for weight in net.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("kernel", "fused"), [("flash", 6), ("math", 0)])
def test_a_kernel_is_that_of_forward_pass_and_recomputation(kernel, fused, recomputed):
    def prepare(net):
        attention.Attention(list(net), kernel)
        if recomputed:
            recompute(list(net))

    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    forward, backward, numbers = step(prepare)
    assert (forward.fused, backward.fused) == (fused, fused * recomputed)
    assert before == (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
    _, _, plain = step(lambda net: None)
    for ours, theirs in zip(numbers, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_blocks_that_were_not_asked_for_have_what_torch_chooses():
    forward, _, _ = step(lambda net: attention.Attention([net[0]], "math"))
    assert forward.fused == 4


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_has_not_is_refused_before_training(kernel):
    with pytest.raises(UserError) as told:
        attention.refuse_missing(kernel, CPU, torch.bfloat16)
    (line,) = told.value.problems
    assert line.startswith(f"attention is {kernel}, a kernel that torch ")
    assert line.endswith("does not have on cpu in bfloat16; use another, or auto")


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_those_that_the_cpu_has_are_not(kernel):
    attention.refuse_missing(kernel, CPU, torch.float32)
    assert attention.notices(kernel) == [] or kernel in attention.notices(kernel)[0]


def test_what_a_network_asks_of_a_kernel_in_vain_is_told():
    block = Block(dropout=0.5)  # which the CPU's flash has not
    attention.Attention([block], "flash")
    with pytest.raises(UserError, match=r"attention is flash, a kernel .* for what this network asks of it"):
        block(torch.zeros(1, LENGTH, WIDTH))


def test_another_error_stays_what_it_is():
    block = Block()
    attention.Attention([block], "math")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        block(torch.zeros(1, LENGTH, WIDTH + 1))
