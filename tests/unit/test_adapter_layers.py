"""Adapters in a network: which layers, how they begin, and that a full-rank one can do what full training does."""

import pytest
import torch
from torch import nn

from reeltune.adapters.layers import adapted, begin, groups, inject
from reeltune.adapters.targets import Target, targets
from reeltune.core.errors import UserError


class Block(nn.Module):
    def __init__(self, D=8):
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.ffn = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return x + self.ffn(self.norm(self.q(x) * self.k(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net():
    return Net()


def names_of(net):
    """As a released file would have them: to_q for q."""
    return {name: name.replace(".q.", ".to_q.") for name, _ in net.named_parameters()}


def chosen(net, **settings):
    return targets(net, ("Block",), names_of(net), **{"rank": 4, "alpha": None} | settings)


def adapters_in(net, **settings):
    more = {"dtype": torch.float32} | settings
    return inject(net, chosen(net), names_of(net), **more)


# ---- which layers


def test_every_linear_layer_of_the_blocks_is_a_target(net):
    found = chosen(net)
    ours = [f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "ffn.0", "ffn.2")]
    assert [target.name for target in found] == ours
    assert found[0] == Target("blocks.0.q", "blocks.0.to_q", 4, 4.0)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"wanted": ["q"]}, ["blocks.0.q", "blocks.1.q"]),  # our name and the released one, whole parts alone
        ({"wanted": ["to_q"]}, ["blocks.0.q", "blocks.1.q"]),
        ({"wanted": ["blocks.1"], "skipped": ["ffn"]}, ["blocks.1.q", "blocks.1.k"]),
        ({"wanted": ["head"]}, ["head"]),
        ({"wanted": ["k", "ffn.2"], "whole": ["blocks.0.ffn"]}, ["blocks.0.k", "blocks.1.k", "blocks.1.ffn.2"]),
    ],
)
def test_targets_by_whole_parts_of_names(settings, ends, net):
    assert [target.name for target in chosen(net, **settings)] == ends


def test_ranks_and_alphas_of_some_layers(net):
    found = chosen(net, alpha=2.0, ranks=["ffn.0=2", "blocks.1.ffn.0=3"], alphas=["to_q=8"])
    assert [(target.rank, target.alpha) for target in found[:4]] == [(4, 8.0), (4, 2.0), (2, 2.0), (4, 2.0)]
    assert [target.rank for target in found[4:]] == [4, 4, 3, 4]
    assert [target.alpha for target in chosen(net, ranks=["ffn.0=2"])[:3]] == [4.0, 4.0, 2.0]  # the rank's own


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wanted": ["ff.0"]}, "ffn.0"),
        ({"wanted": ["to_kq"]}, "to_q"),
        ({"skipped": ["norm"]}, "lora_skip_name has 'norm'"),
        ({"ranks": ["proj=4"]}, "rank_pattern has 'proj'"),
        ({"rank": 9}, r"blocks.0.to_q \(and \d+ more\) gets rank 9, and its own is 8 at most"),
        ({"wanted": ["q"], "skipped": ["to_q"]}, "no linear layer is left"),
    ],
)
def test_names_and_ranks_that_cannot_be_are_refused(settings, said, net):
    with pytest.raises(UserError, match=said):
        chosen(net, **settings)


# ---- how they begin


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"rank_stabilised": True}, {"dropout": 0.5}])
def test_before_a_step_nothing_is_changed(settings, net):
    x_BD = torch.randn(3, 8)
    before, weights = net(x_BD), {name: weight.clone() for name, weight in net.named_parameters()}
    names = adapters_in(net, **settings)
    begin(net, names, how="uniform", seed=1)
    now = net(x_BD)
    # DoRA multiplies by magnitude / norm, which is 1 to the last bit but one.
    assert torch.equal(now, before) or (settings.get("use_dora") and torch.allclose(now, before, rtol=1e-6))
    base = {name.replace(".base_layer.", "."): weight for name, weight in net.named_parameters()}
    assert all(torch.equal(base[name], weight) for name, weight in weights.items())


def test_names_are_the_released_ones(net):
    names = adapters_in(net, use_dora=True)
    assert names.keys() == dict(net.named_parameters()).keys()
    assert names["blocks.0.q.base_layer.weight"] == "blocks.0.to_q.weight"
    assert names["blocks.0.q.lora_A.default.weight"] == "blocks.0.to_q.lora_A.weight"
    assert names["blocks.1.ffn.0.lora_magnitude_vector.default.weight"] == "blocks.1.ffn.0.dora_scale"
    assert len(set(names.values())) == len(names)


def test_first_weights_are_a_function_of_seed_and_name_alone(net):
    def drawn(seed, how="uniform", **settings):
        net = Net()
        names = inject(net, chosen(net, **settings), names_of(net), dtype=torch.float32)
        torch.manual_seed(seed + 1)  # what the global generator says is nothing to it
        begin(net, names, how=how, seed=seed)
        return {name: layer.lora_A["default"].weight.detach() for name, layer in adapted(net).items()}

    one, again, fewer = drawn(7), drawn(7), drawn(7, wanted=["ffn"])
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], fewer[name]) for name in fewer)
    assert not torch.equal(one["blocks.0.q"], one["blocks.1.q"])
    assert not torch.equal(one["blocks.0.q"], drawn(8)["blocks.0.q"])
    assert one["blocks.0.q"].abs().max() <= 8**-0.5
    gaussian_N = torch.cat([A.flatten() for A in drawn(7, "gaussian").values()])
    assert abs(gaussian_N.std() - 1 / 4) < 4 * 0.25 / (2 * len(gaussian_N)) ** 0.5


def test_what_learns_and_at_which_rate(net):
    names = adapters_in(net)
    two = groups(net, names, whole=["head"], ratio=16.0)
    assert [group["rate"] for group in two] == [1.0, 16.0]
    rates = {id(weight): group["rate"] for group in two for weight in group["params"]}
    for name, weight in net.named_parameters():
        expected = 16.0 if ".lora_B." in name else 1.0 if ".lora_A." in name or name.startswith("head") else None
        assert rates.get(id(weight)) == expected
        assert weight.requires_grad == (expected is not None)
    (one,) = groups(net, names, whole=(), ratio=1.0)
    assert len(one["params"]) == 16


def test_each_layer_has_its_own_rank_and_alpha(net):
    found = chosen(net, ranks=["ffn=2", "blocks.1.q=3"], alphas=["k=12"])
    inject(net, found, names_of(net), dtype=torch.bfloat16)
    made = {name: (layer.lora_A["default"].weight, layer.scaling["default"]) for name, layer in adapted(net).items()}
    assert {name: (len(A_RI), scale) for name, (A_RI, scale) in made.items()} == {
        **{f"blocks.{i}.{name}": (2, 1.0) for i in range(2) for name in ("ffn.0", "ffn.2")},
        **{f"blocks.{i}.k": (4, 3.0) for i in range(2)},
        **{"blocks.0.q": (4, 1.0), "blocks.1.q": (3, 1.0)},
    }
    assert all(A_RI.dtype == torch.bfloat16 and not A_RI.any() for A_RI, _ in made.values())


def test_its_change_is_that_of_the_paper():
    for stabilised, scale in ((False, 3.0 / 4), (True, 3.0 / 2)):
        net = Net()
        found = chosen(net, alpha=3.0, wanted=["head"])
        inject(net, found, names_of(net), dtype=torch.float32, rank_stabilised=stabilised)
        layer, x_BD = net.head, torch.randn(3, 8)
        for part in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(part["default"].weight)
        change_OI = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = nn.functional.linear(x_BD, layer.base_layer.weight + change_OI, layer.base_layer.bias)
        torch.testing.assert_close(layer(x_BD), expected, rtol=1e-5, atol=1e-6)


def test_at_full_rank_it_follows_full_training():
    """With A the identity, kept still, and scale 1, the gradient of B is the weight's: SGD takes the same path."""
    whole, net = Net(), Net()
    inject(net, chosen(net, rank=8, wanted=["head"]), names_of(net), dtype=torch.float32)
    layer = net.head
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(8))
    x_BD, y_BD = torch.randn(32, 8), torch.randn(32, 8)
    for _ in range(20):
        for model, weight in ((whole, whole.head.weight), (net, layer.lora_B["default"].weight)):
            model.zero_grad()
            nn.functional.mse_loss(model(x_BD), y_BD).backward()
            with torch.no_grad():
                weight -= 0.1 * weight.grad
    now_OI = layer.base_layer.weight + layer.lora_B["default"].weight
    assert (whole.head.weight - Net().head.weight).abs().max() > 0.05
    torch.testing.assert_close(now_OI, whole.head.weight, rtol=0, atol=1e-6)
