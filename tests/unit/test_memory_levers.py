"""Ways of saving memory end in the bits of the plain run: by optimizer and part here, by family in test_lean_runs."""

import math
import weakref

import pytest
import torch
from torch import nn

from reeltune.core.errors import UserError
from reeltune.memory import blocks
from reeltune.memory.blocks import blocks_of, move, offload_activations, recompute, spread, swap, waiting
from reeltune.optim.optimizers import StochasticRounding, build_optimizer, set_rate, soften_outliers
from reeltune.optim.step_in_backward import StepInBackward

ADAM = {"learning_rate": 1e-2, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
KINDS = {
    "adamw": {},
    "came": {"use_came": True},
    "adafactor": {"use_adafactor": True},
    "8bit": {"use_8bit_adam": True},
    "muon": {"use_muon": True},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.two(torch.tanh(self.one(x)))


class Net(nn.Module):
    """`shared` is used by every block's input, `idle` by none."""

    def __init__(self, dtype=torch.float32, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.idle = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x * self.shared)
        return x


def given(step, dtype):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def optimizer_of(net, kind, rounding):
    if kind == "8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    weights = list(net.parameters())
    groups = [{"params": weights[::2], "rate": 1.0}, {"params": weights[1::2], "rate": 0.5}]
    parameters = [weight for group in groups for weight in group["params"]]

    def build(groups):
        return build_optimizer(groups, **ADAM, **KINDS[kind])

    return (StochasticRounding(groups, build, seed=3) if rounding else build(groups)), parameters


def run(kind, *, rounding, in_backward, max_norm, soften=False, checkpointing=False, steps=4, half_way=None):
    """(norm of each step, weights, optimizer state). half_way: replaces the state in the middle by one saved then."""
    dtype = torch.bfloat16 if rounding else torch.float32
    net = Net(dtype)
    optimizer, parameters = optimizer_of(net, kind, rounding)
    if checkpointing:
        recompute(list(net.blocks))
    fused = StepInBackward(optimizer, parameters) if in_backward else None
    norms = []
    for step in range(steps):
        set_rate(optimizer, 1e-2 / (step + 1))
        loss = net(given(step, dtype)).float().square().mean()

        def shrink(parameters, norm):
            soften_outliers(parameters, norm, max_norm)

        if fused is not None:
            fused.backward(loss)
            norms.append(fused.step(max_norm, shrink if soften else None))
        else:
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(parameters, max_norm))
            if soften:
                shrink(parameters, norms[-1])
            optimizer.step()
            optimizer.zero_grad()
        assert all(weight.grad is None for weight in net.parameters())
    return torch.stack(norms), net.state_dict(), optimizer.state_dict()


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", [False, True], ids=["fp32", "bf16_stochastic"])
@pytest.mark.parametrize("max_norm", [math.inf, 0.05], ids=["free", "clipped"])
def test_a_step_inside_the_backward_pass_is_the_step_after_it(kind, rounding, max_norm):
    after = run(kind, rounding=rounding, in_backward=False, max_norm=max_norm)
    inside = run(kind, rounding=rounding, in_backward=True, max_norm=max_norm)
    assert_same(inside, after)
    norms, weights, _ = after
    assert (norms > 0.05).all()  # so that 0.05 clips
    start = Net(torch.bfloat16 if rounding else torch.float32).state_dict()
    moved = {name for name in start if not torch.equal(start[name], weights[name])}
    assert moved == start.keys() - {"idle"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_so_it_is_with_harder_clipping_and_recomputed_blocks(checkpointing):
    settings = {"rounding": False, "max_norm": 0.01, "soften": True, "checkpointing": checkpointing}
    assert_same(run("adamw", in_backward=True, **settings), run("adamw", in_backward=False, **settings))
    plain = run("adamw", in_backward=False, rounding=False, max_norm=0.01)
    assert not torch.equal(plain[1]["shared"], run("adamw", in_backward=True, **settings)[1]["shared"])


@pytest.mark.parametrize("max_norm", [math.inf, 0.05])
def test_no_more_than_one_gradient_is_there_at_a_time(max_norm):
    net = Net()
    optimizer, parameters = optimizer_of(net, "adamw", False)
    seen = []

    def count(_):
        seen.append(sum(one.grad is not None for one in parameters))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)
    fused = StepInBackward(optimizer, parameters)
    fused.backward(net(given(0, torch.float32)).square().mean())
    fused.step(max_norm)
    assert seen == [1] * (len(parameters) - 1) * (1 if max_norm == math.inf else 2)


# ---- blocks


def losses(net, steps=3):
    """Of a run of the net, and its weights after it."""
    optimizer = torch.optim.SGD([weight for weight in net.parameters() if weight.requires_grad], lr=1e-4)
    found = []
    for step in range(steps):
        loss = net(given(step, torch.float32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found), net.state_dict()


@pytest.mark.parametrize(
    ("share", "twice"), [(0.0, []), (0.25, [0]), (0.5, [0, 2]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_a_share_of_the_blocks_is_recomputed(share, twice):
    net = Net()
    found = blocks_of(net, ("Block",))
    assert found == list(net.blocks)
    recompute(spread(found, share))
    assert_same(losses(net), losses(Net()))
    assert [block.calls for block in net.blocks] == [6 if i in twice else 3 for i in range(4)]


def test_activations_wait_elsewhere_and_weights_do_not(monkeypatch):
    sent = []
    monkeypatch.setattr(blocks, "LEAST_BYTES", 64 * 4 * 8)
    net = Net()
    offload_activations(net, to_host=lambda tensor: sent.append(tensor.shape) or tensor.clone())
    assert_same(losses(net, steps=1), losses(Net(), steps=1))
    # of each block: its input, before and after `shared`, and what is between its layers, for tanh and for `two`
    assert sorted(sent) == sorted([torch.Size([8, 64])] * 8 + [torch.Size([8, 96])] * 8)


def test_a_forward_pass_that_fails_ends_the_offloading(monkeypatch):
    sent = []
    monkeypatch.setattr(blocks, "LEAST_BYTES", 0)
    net = Net()
    offload_activations(net, to_host=lambda tensor: sent.append(tensor.shape) or tensor.clone())
    with pytest.raises(RuntimeError):
        net(torch.randn(8, 65))
    sent.clear()
    torch.tanh(torch.randn(8, 64, requires_grad=True))
    assert not sent


def test_a_copy_for_the_cpu_is_exact_and_its_own():
    x = torch.randn(5, 7).bfloat16().t()
    copy = blocks.to_host(x)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and not copy.is_pinned()


def partly_still():
    net = Net()
    for block in net.blocks[:3]:
        block.requires_grad_(False)
    return net


def adapted():
    """A network of which small weights in every block learn."""
    net = Net()
    net.requires_grad_(False)
    for block in net.blocks:
        block.one.bias.requires_grad_(True)
        block.register_buffer("table", torch.ones(64), persistent=False)
    return net


@pytest.mark.parametrize(
    ("make", "count", "chosen"), [(partly_still, 2, [0, 1]), (adapted, 2, [0, 2]), (adapted, 4, [0, 1, 2, 3])]
)
def test_swapped_blocks_give_the_bits_of_still_ones_and_come_back(make, count, chosen):
    net = make()
    homes = {name: weight.data_ptr() for name, weight in net.named_parameters()}
    swapped = swap(blocks_of(net, ("Block",)), count, torch.device("cpu"))
    assert swapped == [net.blocks[i] for i in chosen]
    assert_same(losses(net), losses(make()))
    assert [block.calls for block in net.blocks] == [6 if i in chosen else 3 for i in range(4)]
    assert {name: weight.data_ptr() for name, weight in net.named_parameters()} == homes


def told(net, count):
    """What happens in a run of the network: ("send", block) and ("compute", block); and how much is held at a time."""
    events, held, most = [], weakref.WeakSet(), [0]
    of = {tensor.data_ptr(): i for i, block in enumerate(net.blocks) for tensor in waiting(block)}

    def copy(there, home):
        held.add(there.untyped_storage())
        most[0] = max(most[0], sum(storage.nbytes() for storage in held))
        events.append(("send", of[home.data_ptr()]))
        there.copy_(home)

    for i, block in enumerate(net.blocks):
        block.one.register_forward_pre_hook(lambda *_, i=i: events.append(("compute", i)))
    swap(list(net.blocks), count, torch.device("cpu"), copy=copy)
    return events, held, most


ONE_BLOCK = 4 * (64 * 96 + 96 * 64 + 64 + 64)  # bytes that wait: both weights, a bias, and a table


def test_the_next_block_is_on_its_way_while_one_computes():
    net = adapted()
    events, held, most = told(net, 4)
    loss = net(given(0, torch.float32)).sum()
    there = list(dict.fromkeys(events))
    assert there == [
        *[("send", 0), ("send", 1), ("compute", 0), ("send", 2), ("compute", 1), ("send", 3), ("compute", 2)],
        ("compute", 3),
    ]
    events.clear()
    loss.backward()
    assert list(dict.fromkeys(events)) == [
        *[("send", 3), ("send", 2), ("compute", 3), ("send", 1), ("compute", 2), ("send", 0), ("compute", 1)],
        ("compute", 0),
    ]
    assert most == [2 * ONE_BLOCK]
    del loss
    assert not held


def test_blocks_are_sent_in_vain_only_where_a_pass_is_broken_off():
    net = adapted()
    events, held, most = told(net, 4)
    with torch.no_grad():
        net.blocks[0](given(0, torch.float32))
        assert events[-2:] == [("send", 1), ("compute", 0)]
        events.clear()
        whole = net(given(0, torch.float32))
        assert events[0] == ("send", 0)
        events.clear()
        assert torch.equal(net(given(0, torch.float32)), whole)  # as a preview after a held-out loss
    assert {event for event in events if event[0] == "send"} == {("send", i) for i in range(4)}
    assert most == [2 * ONE_BLOCK] and not held


def test_while_it_visits_a_block_computes_with_copies_on_the_device():
    net = partly_still()
    homes, seen = {w.data_ptr() for w in net.blocks[0].parameters()}, []
    net.blocks[0].one.register_forward_pre_hook(lambda one, _: seen.append(one.weight.data_ptr()))
    swap([net.blocks[0]], 1, torch.device("cpu"))
    net(given(0, torch.float32)).sum().backward()
    assert len(seen) == 2 and not homes & set(seen)


def test_nothing_but_what_is_sent_computes_in_either_pass():
    """As on a GPU, which cannot compute with what waits: here it waits doubled."""

    def gradients(*, doubled):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)])
        for norm, layer in net:  # autograd keeps a norm's weights as they are, and of a layer's a view
            nn.init.normal_(norm.weight.requires_grad_(False))
            layer.weight.requires_grad_(False)
        if doubled:
            for block in swap(list(net), 3, torch.device("cpu"), copy=lambda there, home: there.copy_(home / 2)):
                for tensor in waiting(block):
                    tensor.mul_(2)
        net(torch.randn(4, 8)).square().mean().backward()
        return {name: weight.grad for name, weight in net.named_parameters() if weight.requires_grad}

    assert_same(gradients(doubled=True), gradients(doubled=False))


def test_a_swapped_block_is_left_where_it_is():
    net = partly_still()
    net.register_buffer("table", torch.ones(3))
    before = net.state_dict()
    move(net, torch.device("cpu", 0), besides=swap([net.blocks[0]], 1, torch.device("cpu")))  # "cpu:0": copies
    after = net.state_dict()
    assert_same(after, before)
    assert {name for name in after if after[name].data_ptr() == before[name].data_ptr()} == {
        f"blocks.0.{layer}.{kind}" for layer in ("one", "two") for kind in ("weight", "bias")
    }


def test_what_learns_in_a_swapped_block_is_on_the_device():
    net = adapted()
    before = {name: weight.data_ptr() for name, weight in net.named_parameters()}
    move(net, torch.device("cpu", 0), besides=swap([net.blocks[0]], 1, torch.device("cpu")))
    assert {name for name, weight in net.named_parameters() if weight.data_ptr() == before[name]} == {
        f"blocks.0.{name}" for name in ("one.weight", "two.weight", "two.bias")
    }


def test_more_than_stand_still_cannot_be_swapped():
    with pytest.raises(
        UserError, match="blocks_to_swap is 4, but of the network's 4 blocks 3 have weights that do not learn"
    ):
        swap(list(partly_still().blocks), 4, torch.device("cpu"))
