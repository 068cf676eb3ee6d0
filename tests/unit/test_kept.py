"""What blocks keep when they recompute the rest, by the operators that run again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from reeltune.memory.blocks import offload_activations, recompute, spread, swap
from reeltune.memory.kept import KEPT, THIN
from tests.unit.test_attention import FEW, WIDTH
from tests.unit.test_attention import step as operators_of_step

CPU = torch.device("cpu")
aten = torch.ops.aten


class Block(nn.Module):
    """Attention within `x`, and to the first few of it, which is a caption in real; its products are of all kinds, and
    two are thin."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix, self.thin_mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(1, THIN + 1, 1)
        self.down, self.up = nn.Linear(WIDTH, 1, bias=False), nn.Linear(1, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.into(x).chunk(3, -1))
        within = scaled_dot_product_attention(q, k, v)
        across = scaled_dot_product_attention(q, k[:, :, :FEW], v[:, :, :FEW])
        x = x + self.out((within + across).transpose(1, 2).flatten(2))
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        narrow = self.down(x)
        return (x + self.up(narrow) + self.thin_mix(narrow.transpose(1, 2)).mean((1, 2), keepdim=True)).tanh()


step = partial(operators_of_step, block=Block)


def assert_same(ours, theirs):
    assert all(one.abs().max() > 1e-6 for one in theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def plain():
    return step(lambda net: None)


def again(found, plain):
    """(attention, linear layers with a bias, without, convolutions), as often as the backward pass computes them
    beside its own."""
    ours, theirs = found[1], plain[1]
    products = (aten.addmm.default, aten.mm.default, aten.convolution.default)
    return ours.fused - theirs.fused, *(ours.counts[operator] - theirs.counts[operator] for operator in products)


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(None, (6, 3, 9, 6)), ("attention_kept", (3, 3, 9, 6)), ("products_kept", (3, 0, 3, 3))],
)
def test_what_is_kept_is_computed_once_and_attention_to_few_keys_and_thin_products_again(keep, counts, plain):
    """Of each block: two of attention; of products one with a bias, three without, two convolutions."""
    found = step(partial(recompute, keep=KEPT.get(keep)))
    assert again(found, plain) == counts
    assert_same(found[2], plain[2])


@pytest.mark.parametrize(("keep", "counts"), [("attention_kept", (1, 1, 3, 2)), ("products_kept", (1, 0, 1, 1))])
def test_of_a_share_of_the_blocks(keep, counts, plain):
    found = step(lambda net: recompute(spread(list(net), 1 / 3), keep=KEPT[keep]))
    assert again(found, plain) == counts
    assert_same(found[2], plain[2])


@pytest.mark.parametrize("keep", KEPT)
def test_what_is_kept_goes_with_swapped_blocks_and_offloaded_activations(keep, monkeypatch):
    monkeypatch.setattr("reeltune.memory.blocks.LEAST_BYTES", 0)

    def prepare(net, spared):
        for weight in net[1].parameters():
            weight.requires_grad_(False)
        swapped = swap(list(net), spared, CPU)
        if spared:
            recompute([block for block in net if block not in swapped], keep=KEPT[keep])
            offload_activations(net)

    assert_same(*(step(partial(prepare, spared=spared))[2] for spared in (1, 0)))
