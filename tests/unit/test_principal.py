"""PiSSA: the base keeps its bits and its answers, what learns follows PEFT's own PiSSA, and a file has all of it."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from reeltune.adapters import saved
from reeltune.adapters.factors import ITERATIONS, factors
from reeltune.adapters.layers import SLOT, adapted, groups, inject
from reeltune.adapters.principal import change_of, find_starts, is_start, iterations, round_the_rest, starts_of
from reeltune.core.errors import UserError
from reeltune.memory.quantized import Quantisation, QuantizedLinear, quantize_linears
from tests.unit.test_adapter_layers import Net, chosen, names_of

RANK, ALPHA = 3, 2.0


def by_name(net):
    return adapted(net)


def principal_in(net, *, weights=None, how="pissa", start_dtype=torch.float32, dtype=torch.float32, **settings):
    """weights: of the layers in full, where the base has them in fewer bits. Returns the names of parameters."""
    found = chosen(net, rank=RANK, alpha=ALPHA)
    names = inject(net, found, names_of(net), dtype=dtype, start_dtype=start_dtype, **settings)
    groups(net, names, whole=(), ratio=1.0)
    layers = by_name(net)
    full = weights or {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
    find_starts(layers, SLOT, full.__getitem__, layers, iterations(how))
    round_the_rest(layers, SLOT, full.__getitem__)
    return names


def learnt(net, seed=0):
    """Moves what learns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for weight in net.parameters():
        if weight.requires_grad:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def inputs(seed=3):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [{}, {"rank_stabilised": True}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_before_a_step_the_answer_is_the_bases_to_the_bit(settings, dtype, autocast):
    if dtype == torch.bfloat16 and not autocast:
        pytest.skip("bf16 weights compute under autocast")
    net = Net().to(dtype)
    weights = {name: weight.clone() for name, weight in net.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = net(inputs())
        names = principal_in(net, start_dtype=dtype, **settings)
        assert torch.equal(net(inputs()), before)
        learnt(net)
        assert not torch.equal(net(inputs()), before)
    base = {name.replace(".base_layer.", "."): weight for name, weight in net.named_parameters()}
    assert all(torch.equal(base[name], weight) for name, weight in weights.items())
    assert {names[name] for name, w in net.named_parameters() if w.requires_grad} == {
        f"{layer}.{kind}.weight"
        for layer in ({names[f"{n}.base_layer.weight"].removesuffix(".weight") for n in by_name(net)})
        for kind in ("lora_A", "lora_B")
    }


def test_magnitudes_go_with_it():
    net = Net()
    before = net(inputs())
    principal_in(net, use_dora=True)
    torch.testing.assert_close(net(inputs()), before, rtol=1e-6, atol=1e-6)  # magnitude / norm is 1 but for rounding


def theirs(net):
    """PEFT's own PiSSA, whose base is left without what its pairs begin with."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q", "k", "ffn.0", "ffn.2"], init_lora_weights="pissa"
    )
    return inject_adapter_in_model(config, net)


def test_it_learns_as_pefts_own():
    ours, peft = Net(), theirs(Net())
    principal_in(ours)
    ends = {}
    for kind, net in (("ours", ours), ("peft", peft)):
        learning = [weight for weight in net.parameters() if weight.requires_grad]
        step = torch.optim.SGD(learning, lr=0.05)
        for i in range(10):
            step.zero_grad()
            (net(inputs(i)) - 1).square().mean().backward()
            step.step()
        eye_DD = torch.eye(8)
        ends[kind] = [layer(eye_DD) for layer in by_name(net).values() if layer.in_features == 8]
    plain = [layer.get_base_layer()(torch.eye(8)) for layer in by_name(ours).values() if layer.in_features == 8]
    for mine, other, begun in zip(ends["ours"], ends["peft"], plain, strict=True):
        assert (mine - begun).abs().max() > 1e-3  # it has learnt
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-6)


def test_it_begins_as_pefts_own():
    ours, peft = Net(), theirs(Net())
    principal_in(ours)
    for name, layer in by_name(ours).items():
        other = by_name(peft)[name]
        for start, pair in zip(starts_of(layer, SLOT), (other.lora_A, other.lora_B), strict=True):
            torch.testing.assert_close(start, pair[SLOT].weight, rtol=1e-5, atol=1e-6)


def test_iterations_are_those_of_the_word():
    assert [iterations(how) for how in ("pissa", "pissa_niter_16")] == [ITERATIONS, 16]
    weight_OI = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(weight_OI)[:RANK].square().sum()
    few, many = (factors(weight_OI, RANK, "one", iterations=count).square_at(RANK) for count in (1, 16))
    again = factors(weight_OI, RANK, "one", iterations=16)
    assert many == again.square_at(RANK) and few < many
    assert few < 0.9 * exact and 0.98 * exact < many <= exact * 1.0001


# ---- a base in fewer bits


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_the_rest_of_a_coarse_base_is_rounded_and_nearer(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    net, plain = Net(), Net()
    full = {name: module.weight.detach() for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in quantize_linears(net, Quantisation(kind, ("Block",))).items():
        layer.weight = nn.Parameter(layer.pack(full[name.removesuffix(".weight")], "cpu"), requires_grad=False)
        layer.bias = plain.get_submodule(name.removesuffix(".weight")).bias
    alone = {name: layer.dequantized(torch.float32) for name, layer in net.named_modules() if _coarse(layer)}
    principal_in(net, weights=full)
    errors, errors_alone = [], []
    for name, layer in by_name(net).items():
        base = layer.get_base_layer()
        assert isinstance(base, QuantizedLinear)
        A_RI, B_OR = starts_of(layer, SLOT)
        there_OI = base.dequantized(torch.float32) + ALPHA / RANK * B_OR @ A_RI
        bias = 0 if base.bias is None else base.bias
        x = torch.eye(base.in_features)
        torch.testing.assert_close(layer(x) - bias, there_OI.T, rtol=0, atol=1e-6)
        errors.append((there_OI - full[name]).norm())
        errors_alone.append((alone[name] - full[name]).norm())
    assert sum(errors) < 0.8 * sum(errors_alone)


def _coarse(layer):
    return isinstance(layer, QuantizedLinear)


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_has_the_change_and_gives_back_the_bits(dtype, tmp_path):
    net = Net()
    names = principal_in(net, start_dtype=torch.bfloat16, dtype=dtype)
    learnt(net)
    weights = {
        names[name]: weight.detach()
        for name, weight in net.named_parameters()
        if weight.requires_grad or is_start(names[name])
    }
    alphas = {target.released: target.alpha for target in chosen(Net(), rank=RANK, alpha=ALPHA)}
    saved.write(tmp_path, weights, alphas, {"lora_init": "pissa"})
    again = saved.read(tmp_path)
    assert again.keys() == weights.keys()
    assert all(
        torch.equal(again[name], weight) and again[name].dtype == weight.dtype for name, weight in weights.items()
    )
    for name, layer in saved.load(tmp_path).layers.items():
        assert (layer.rank, layer.scale) == (2 * RANK, ALPHA / RANK)
        a, b, A0, B0 = (
            weights[f"{name}.{kind}"].double()
            for kind in ("lora_A.weight", "lora_B.weight", "lora_A.start", "lora_B.start")
        )
        change_OI = (B0 + b) @ (A0 + a) - B0 @ A0
        found_OI = layer.B_OR.double() @ layer.A_RI.double()
        rounding = 1e-6 if dtype == torch.float32 else 1e-2
        assert (found_OI - change_OI).norm() < rounding * change_OI.norm()
        assert change_OI.norm() > 0.1


def test_a_file_with_magnitudes_has_the_layers_weight(tmp_path):
    net = Net()
    names = principal_in(net, use_dora=True)
    learnt(net)
    weights = {names[n]: w.detach() for n, w in net.named_parameters() if w.requires_grad or is_start(names[n])}
    alphas = {target.released: target.alpha for target in chosen(Net(), rank=RANK, alpha=ALPHA)}
    saved.write(tmp_path, weights, alphas, {"lora_init": "pissa"})
    pair, layer = saved.load(tmp_path).layers["blocks.0.to_q"], by_name(net)["blocks.0.q"]
    base = layer.get_base_layer()
    effective_OI = (layer(torch.eye(8)) - base.bias).T
    assert pair.magnitude_O is not None and (effective_OI - base.weight).abs().max() > 0.1
    torch.testing.assert_close(pair.changed(base.weight.detach()), effective_OI.detach(), rtol=0, atol=1e-5)


def test_a_folder_without_its_start_or_a_part_of_it_is_refused(tmp_path):
    net = Net()
    names = principal_in(net)
    weights = {names[n]: w.detach() for n, w in net.named_parameters() if w.requires_grad or is_start(names[n])}
    alphas = {target.released: target.alpha for target in chosen(Net(), rank=RANK, alpha=ALPHA)}
    saved.write(tmp_path, weights, alphas, {"lora_init": "pissa"})
    first, *_ = starts = load_file(tmp_path / saved.START)
    save_file({name: start for name, start in starts.items() if name != first}, tmp_path / saved.START)
    with pytest.raises(UserError, match=f"has not what {first.removesuffix('.lora_A.start')} began with"):
        saved.load(tmp_path)  # or the layer would count half
    (tmp_path / saved.START).unlink()
    with pytest.raises(UserError, match=saved.START):
        saved.read(tmp_path)


def test_the_change_of_a_pair_that_gained_nothing_is_nothing():
    net = Net()
    principal_in(net)
    layer: LoraLayer = by_name(net)["blocks.0.q"]
    start_A, start_B = starts_of(layer, SLOT)
    pair = saved.LowRank(torch.zeros(RANK, 8), torch.zeros(8, RANK), ALPHA)
    change = change_of(start_A.detach(), start_B.detach(), pair)
    assert torch.equal(change.B_OR @ change.A_RI, torch.zeros(8, 8)) and change.A_RI.any() and change.B_OR.any()
