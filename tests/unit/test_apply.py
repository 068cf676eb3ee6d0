"""Adapters in a network's weights: one, several, at any strength, out again; and what is refused."""

import pytest
import torch
from torch import nn

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.apply import applied, check, merge, merged, parameters_of
from reeltune.core.errors import UserError
from reeltune.memory.quantized import Quantisation, quantize_linears

NAMES = {"first.weight": "a.weight", "first.bias": "a.bias", "second.weight": "b.weight", "second.bias": "b.bias"}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, *, outputs=6, inputs=4, alpha=3.0, **more) -> LowRank:
    return LowRank(numbers(2, inputs, seed=seed), numbers(outputs, 2, seed=seed + 1), alpha, **more)


@pytest.fixture
def net():
    """Two layers of 4 to 6 to 4."""
    made = nn.ModuleDict({"first": nn.Linear(4, 6), "second": nn.Linear(6, 4)})
    with torch.no_grad():
        for i, weight in enumerate(made.parameters()):
            weight.copy_(numbers(*weight.shape, seed=100 + i))
    return made


def bits(net):
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def test_the_change_is_strength_times_alpha_over_rank(net):
    one = low_rank(1)
    merge(net, NAMES, [(Adapter({"a": one}), 0.5)])
    before = numbers(6, 4, seed=100)
    wanted = before.double() + 0.5 * 3.0 / 2 * one.B_OR.double() @ one.A_RI.double()
    assert (net["first"].weight - wanted).abs().max() < 1e-6 and (wanted - before).abs().max() > 0.1
    stabilised = merged("a.weight", before, [(Adapter({"a": low_rank(1, rank_stabilised=True)}), 1.0)])
    assert (stabilised - before - (wanted - before) * 2 * 2**0.5).abs().max() < 1e-5


def test_changes_add_up_in_any_order(net):
    base = net["first"].weight.detach()
    one, other = Adapter({"a": low_rank(1)}), Adapter({"a": low_rank(5, magnitude_O=numbers(6, seed=9).abs())})
    alone = [merged("a.weight", base, [(adapter, s)]) - base for adapter, s in ((one, 0.8), (other, -0.5))]
    for pair in ([(one, 0.8), (other, -0.5)], [(other, -0.5), (one, 0.8)]):
        assert (merged("a.weight", base, pair) - base - sum(alone)).abs().max() < 1e-6
    assert min(change.abs().max() for change in alone) > 0.1


def test_dora_is_a_magnitude_and_a_direction_and_goes_from_the_base_to_itself():
    base, magnitude_O = numbers(6, 4), numbers(6, seed=3).abs() + 1
    dora = low_rank(1, magnitude_O=magnitude_O)
    whole, half = (dora.changed(base, strength) for strength in (1.0, 0.5))
    direction = base + 1.5 * dora.B_OR @ dora.A_RI
    assert torch.allclose(whole.norm(dim=1), magnitude_O, rtol=1e-6)
    assert torch.allclose(whole / magnitude_O[:, None], nn.functional.normalize(direction), atol=1e-6)
    assert torch.equal(dora.changed(base, 0.0), base)
    assert torch.allclose(half, (base + whole) / 2, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_whole_weights_and_their_changes(strength, net):
    before = bits(net)
    wanted = {"a.bias": numbers(6, seed=30), "b.weight": numbers(4, 6, seed=31)}
    as_changes = {"b.weight": wanted["b.weight"] - before["second.weight"]}
    merge(net, NAMES, [(Adapter(whole={"a.bias": wanted["a.bias"]}, changes=as_changes), strength)])
    for name, released in (("first.bias", "a.bias"), ("second.weight", "b.weight")):
        between = before[name] + strength * (wanted[released] - before[name])
        assert (net.get_parameter(name) - between).abs().max() < 1e-6
    if strength == 1:
        assert torch.equal(net["first"].bias, wanted["a.bias"])
    assert torch.equal(net["first"].weight, before["first.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_bits_of_the_base_and_what_is_taken_out_leaves_them(dtype, net):
    net.to(dtype)
    before = bits(net)
    adapter = Adapter({"a": low_rank(1), "b": low_rank(3, outputs=4, inputs=6)}, whole={"b.bias": numbers(4, seed=8)})
    merge(net, NAMES, [(adapter, 0.0)])
    assert all(torch.equal(weight, before[name]) for name, weight in bits(net).items())
    with pytest.raises(ZeroDivisionError), applied(net, NAMES, [(adapter, 1.0)]):
        changed = {name for name, weight in bits(net).items() if not torch.equal(weight, before[name])}
        assert changed == {"first.weight", "second.weight", "second.bias"}
        one = merged("a.weight", before["first.weight"], [(adapter, 1.0)])
        assert one.dtype == torch.float32 and torch.equal(net["first"].weight, one.to(dtype))
        raise ZeroDivisionError
    assert all(torch.equal(weight, before[name]) for name, weight in bits(net).items())


def test_what_does_not_fit_is_named(net):
    shapes = {NAMES[name]: weight.shape for name, weight in net.named_parameters()}
    check(Adapter({"a": low_rank(1)}, whole={"b.bias": torch.zeros(4)}), shapes, "x")
    unlike = Adapter({"a": low_rank(1), "c": low_rank(2)}, whole={"b.bias": torch.zeros(5), "b.weight": numbers(4, 6)})
    with pytest.raises(UserError) as told:
        check(unlike, shapes, "x.safetensors")
    assert told.value.problems == [
        "c.weight is not in the network",
        "b.bias is 5 in it, and 4 in the network",
    ]
    with pytest.raises(UserError) as told:
        check(Adapter({"a": low_rank(1, outputs=8), "b": low_rank(1, outputs=4, inputs=5)}), shapes, "x")
    assert told.value.problems == [
        "most of it does not fit: it was made for another model or size; give that model",
        "a.weight is 8 x 4 in it, and 6 x 4 in the network",
        "b.weight is 4 x 5 in it, and 4 x 6 in the network",
    ]
    with pytest.raises(UserError, match=r"a\.weight is 5 x 4 in it"):
        check(Adapter({"a": low_rank(1, magnitude_O=torch.ones(5))}), shapes, "x")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_nothing_is_merged_into_quantised_weights(dtype, net):
    net["first"].weight = nn.Parameter(torch.zeros(6, 4, dtype=dtype), requires_grad=False)
    kept = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"weights are kept as {kept}, .*leave base_weights out"):
        merge(net, NAMES, [(Adapter({"a": low_rank(1)}), 1.0)])
    merge(net, NAMES, [(Adapter({"b": low_rank(1, outputs=4, inputs=6)}), 1.0)])


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_quantised_layer_answers_with_them_and_keeps_its_bits(kind, use_dora):
    plain = nn.Linear(64, 32)
    net = nn.ModuleDict({"block": nn.Sequential(plain)})
    (layer,) = quantize_linears(net, Quantisation(kind, ("Sequential",))).values()
    layer.weight = nn.Parameter(layer.pack(numbers(32, 64), "cpu"), requires_grad=False)
    names = {"block.0.weight": "a.weight", "block.0.bias": "a.bias"}
    more = {"magnitude_O": numbers(32, seed=3).abs() + 1} if use_dora else {}
    adapter = Adapter({"a": low_rank(1, outputs=32, inputs=64, **more)}, whole={"a.bias": numbers(32, seed=5)})
    check(adapter, {name: weight.shape for name, weight in parameters_of(net, names).items()}, "x")
    x, before = numbers(5, 64, seed=7), (layer.weight.clone(), layer.bias.clone())
    own = layer(x)
    with applied(net, names, [(adapter, 0.5)], keep=True):
        answer = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    wanted_OI = adapter.layers["a"].changed(layer.dequantized(torch.float32), 0.5)
    bias_O = (before[1] + adapter.whole["a.bias"]) / 2
    assert (answer - nn.functional.linear(x, wanted_OI, bias_O)).abs().max() < 1e-5
    assert torch.equal(layer(x), own) and (answer - own).abs().max() > 0.1
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])
    with pytest.raises(UserError, match="leave base_weights out"):
        merge(net, names, [(adapter, 1.0)])
