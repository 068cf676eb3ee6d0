"""Compiled blocks, with torch's own operators in place of compiled code."""

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch.nn.functional import scaled_dot_product_attention

from reeltune.core.errors import UserError
from reeltune.memory import compiled
from reeltune.memory.blocks import recompute
from reeltune.memory.compiled import Compiled, refuse_missing
from reeltune.memory.kept import KEPT


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x_BLD, scale=1.0):
        q_BHLD = self.linear(x_BLD).unflatten(-1, (2, 8)).transpose(1, 2)
        return x_BLD + scale * scaled_dot_product_attention(q_BHLD, q_BHLD, q_BHLD).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Those that were to be compiled."""
    asked, made = [], lookup_backend("aot_eager")
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs: asked.append(graph) or made(graph, inputs))
    return asked


def blocks():
    torch.manual_seed(0)
    return [Block() for _ in range(3)]


def passed(net, tokens=6):
    """(answer, gradient of the first block's weights)"""
    x_BLD = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens), requires_grad=True)
    for block in net:
        x_BLD = block(x_BLD, scale=0.5)
    if x_BLD.requires_grad:
        x_BLD.square().mean().backward()
    gradient, net[0].linear.weight.grad = net[0].linear.weight.grad, None
    return x_BLD.detach(), gradient


@pytest.mark.parametrize("keep", [None, *KEPT.values()])
def test_all_blocks_share_a_graph_and_all_sizes_of_several(keep, graphs):
    ours, theirs = blocks(), blocks()
    made = Compiled(ours)
    if keep:
        made.keep(ours, keep)
        recompute(theirs, keep=keep)
    for size in (6, 4):  # before it begins, as if nothing was
        torch.testing.assert_close(passed(ours, size), passed(theirs, size), rtol=0, atol=0)
    assert not graphs
    made.begin(2, "first")
    for size in (9, 6, 4):
        torch.testing.assert_close(passed(ours, size), passed(theirs, size))
    with torch.no_grad():
        passed(ours, 5)
    assert made.count == len(graphs) == 1
    assert {*ours[0].state_dict()} == {"linear.weight", "linear.bias"}


def test_networks_alike_share_a_graph_wherever_their_weights_have_been():
    ours, other, theirs = blocks(), blocks(), blocks()
    made, beside = Compiled(ours), Compiled(other)
    made.begin(1, "first", beside)
    for net in (ours, other, ours, other):
        torch.testing.assert_close(passed(net), passed(theirs))
        for weight in (weight for block in net for weight in block.parameters()):
            weight.data = weight.data.clone()  # as it comes back to the device, in another place
    assert made.count == beside.count == 1


def test_of_one_size_another_is_compiled_too_up_to_a_bound():
    made = Compiled(blocks()[:1])
    net = [*made._functions]
    made.begin(1, "first")
    passed(net, 6)
    with pytest.raises(UserError, match=r"cannot compile Block after 1 compilations(.|\n)*set compile to none"):
        passed(net, 4)


def test_what_is_remembered_on_the_disk_is_kept_apart():
    tags = set()
    for again in (False, True):
        for label in ("5x32x32", "9x32x32"):
            Compiled(blocks(), again=again).begin(1, label)
            tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 4


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_told(device, variable, monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda _: object())
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"clang(.|\n)*apt-get install g"):
        refuse_missing(device)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name)
    refuse_missing(device)
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    if device == "cuda":
        with pytest.raises(UserError, match="pip install triton"):
            refuse_missing(device)
