"""Frozen weights in 8 and 4 bits: their numbers, their bytes, what computes with them, and how they are read."""

import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import weights
from reeltune.memory import quantized
from reeltune.memory.quantized import Quantisation, QuantizedLinear, quantize_linears
from reeltune.memory.size import size_bytes
from reeltune.optim.trainable import released_names

KINDS = ("fp8", "int8", "nf4")
BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # of a weight, and in nf4 of its part of a scale
LARGEST = {"fp8": 448.0, "int8": 127.0}
ERROR = {"fp8": (0.02, 0.03), "int8": (0.004, 0.012), "nf4": (0.08, 0.11)}  # of normal weights, relative, in the mean


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.norm = AdaNorm()

    def forward(self, x):
        return x + self.two(torch.tanh(self.one(self.norm(x))))


class AdaNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(64, 64)

    def forward(self, x):
        return x * self.modulation(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.blocks = nn.Linear(64, 64), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return x


def fitted(kind, *, state=None, dtype=None):
    with torch.device("meta"):
        net = Net()
    weights.fit(
        net, Net().state_dict() if state is None else state, "here", dtype, "cpu", Quantisation(kind, ("Block",))
    )
    return net


def layer_of(kind, weight_OI, bias=None):
    plain = nn.Linear(*reversed(weight_OI.shape), bias=bias is not None, device="meta")
    layer = QuantizedLinear(plain, kind)
    layer.weight = nn.Parameter(layer.pack(weight_OI, "cpu"), requires_grad=False)
    layer.bias = bias
    return layer


# ---- numbers


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_weights_are_the_nearest_numbers_times_a_scale_for_each_output(kind, monkeypatch):
    monkeypatch.setattr(quantized, "CHUNK", 1000)  # several portions
    weight_OI = normal(50, 96) * torch.logspace(-6, 6, 50)[:, None]
    weight_OI[7] = 0
    layer = layer_of(kind, weight_OI)
    assert torch.equal(layer.scale, layer.scale.bfloat16().float())
    greatest_O, exact_O = weight_OI.abs().amax(1), weight_OI.abs().amax(1) / LARGEST[kind]
    assert (layer.scale >= exact_O).all() and (layer.scale[greatest_O > 0] < exact_O[greatest_O > 0] * 1.0079).all()
    there_OI = layer.dequantized(torch.float32)
    assert not there_OI[7].any()
    step_OI = layer.scale[:, None] * torch.ones_like(there_OI)
    if kind == "fp8":  # three bits behind the point, from 2^-6 upward
        step_OI *= torch.exp2((weight_OI / step_OI).abs().clamp(min=2**-6).log2().floor() - 3)
    assert ((there_OI - weight_OI).abs() <= step_OI * 0.5001).all()


@pytest.mark.parametrize("shape", [(33, 96), (4, 64), (5, 38)], ids=str)
def test_nf4_is_that_of_bitsandbytes_whatever_the_portions(shape, monkeypatch):
    library = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(quantized, "CHUNK", 640)
    weight_OI = normal(*shape)
    packed, state = library.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")
    layer = layer_of("nf4", weight_OI)
    assert torch.equal(layer.weight, packed.flatten()) and torch.equal(layer.scale, state.absmax)
    numbers = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight_OI.numel()]
    scales = state.absmax.repeat_interleave(64)[: weight_OI.numel()]
    assert torch.equal(layer.dequantized(torch.float32), (state.code[numbers.long()] * scales).view(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_normal_weights_and_their_bytes(kind):
    weight_OI = normal(256, 512).bfloat16()
    layer = layer_of(kind, weight_OI)
    least, most = ERROR[kind]
    error = (layer.dequantized(torch.float32) - weight_OI.float()).norm() / weight_OI.float().norm()
    assert least < error < most
    scales = 0 if kind == "nf4" else 4 / 512
    assert size_bytes([layer.weight, layer.scale]) == (BYTES[kind] + scales) * weight_OI.numel()
    # bf16 rounds the same numbers once
    assert torch.equal(layer.dequantized(torch.bfloat16), layer.dequantized(torch.float32).bfloat16())
    assert torch.equal(layer.dequantized(torch.float16), layer.dequantized(torch.float32).half())


# ---- what computes with them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_backward_are_those_of_the_rounded_weights(kind, autocast, with_bias):
    bias = nn.Parameter(normal(48, seed=2)) if with_bias else None
    layer = layer_of(kind, normal(48, 64), bias)
    x, grad = normal(2, 5, 64, seed=3), normal(2, 5, 48, seed=4)
    dtype = torch.bfloat16 if autocast else torch.float32

    def answer_and_gradients(linear):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            answer = linear(given)
        answer.backward(grad.to(answer.dtype))
        found = [answer, given.grad] + ([bias.grad.clone()] if with_bias else [])
        layer.zero_grad()
        return found

    ours = answer_and_gradients(layer)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for one, other in zip(
        ours, answer_and_gradients(lambda given: F.linear(given, layer.dequantized(dtype), bias)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_full_is_kept_for_the_backward_pass(kind):
    layer, kept = layer_of(kind, normal(48, 64)), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(normal(1, 64).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scale.data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_over_them_and_begins_at_nothing(kind):
    net, alone = fitted(kind), fitted(kind)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["one", "two"]), net)
    learning = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    assert len(learning) == 12 and {weight.dtype for weight in learning.values()} == {torch.float32}
    x = normal(3, 64)
    assert torch.equal(net(x), alone(x))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net(x).square().mean().backward()
    torch.optim.SGD(learning.values(), lr=1.0).step()
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in learning if "lora_B" in name}  # at first A has no gradient
    assert not torch.equal(net(x), alone(x))


# ---- reading


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_of_blocks_are_quantised_and_nothing_else(kind):
    net, plain = fitted(kind, dtype=torch.bfloat16), Net().bfloat16()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    coarse = {f"blocks.{i}.{layer}.weight" for i in range(3) for layer in ("one", "two")}
    for name, weight in plain.named_parameters():
        ours = net.get_parameter(name)
        if name in coarse:
            assert ours.dtype in (torch.int8, torch.uint8) and not ours.requires_grad
        else:
            assert torch.equal(ours, weight) and ours.dtype == torch.bfloat16
    assert net.state_dict().keys() == plain.state_dict().keys()


class Lazy(Mapping):
    """Makes tensors when they are asked for, and counts how many are there at once."""

    def __init__(self, state):
        self.state, self.live, self.most = state, weakref.WeakSet(), 0

    def __getitem__(self, name):
        tensor = self.state[name].clone()
        self.live.add(tensor)
        self.most = max(self.most, len(self.live))
        return tensor

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_taken_one_by_one(kind):
    state = Lazy(Net().state_dict())
    net = fitted(kind, state=state)
    assert state.most == 2  # the next is made before the last is let go
    assert torch.equal(net(normal(3, 64)), fitted(kind)(normal(3, 64)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stored_in_fp8_are_read(kind):
    stored = {name: weight.to(torch.float8_e4m3fn) for name, weight in Net().state_dict().items()}
    wide = {name: weight.float() for name, weight in stored.items()}
    for one, other in zip(
        fitted(kind, state=stored, dtype=torch.float32).parameters(), fitted(kind, state=wide).parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_read_so(one_of_a_family, kind, tmp_path):
    model = one_of_a_family.lay_out(tmp_path)
    family = families.find(model)
    plain = family.load(model, encoders=False).net
    parts = family.load(model, encoders=False, base_weights=kind)
    layers = {name: one for name, one in parts.net.named_modules() if isinstance(one, QuantizedLinear)}
    assert {type(plain.get_submodule(name)) for name in layers} == {nn.Linear}
    assert not any("norm" in name for name in layers)
    names = [released_names(net, lambda state: family.to_released(state, parts.config)) for net in (parts.net, plain)]
    assert names[0] == names[1]
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(weight, parts.net.get_parameter(name))
        elif weight.numel() > 1000:
            there = layers[name.removesuffix(".weight")].dequantized(torch.float32)
            assert (there - weight).norm() / weight.norm() < 0.12

    def outline(net):
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    read = outline(parts.net)
    assert outline(family.load(model, encoders=False, base_weights=kind, network=False).net) == read
    if one_of_a_family.family != "toy":  # which has no files
        assert outline(family.load(model, encoders=False, base_weights=kind, fake=FakeTensorMode()).net) == read


def test_nf4_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="base_weights is nf4, which needs bitsandbytes"):
        quantize_linears(Net(), Quantisation("nf4", ("Block",)))
