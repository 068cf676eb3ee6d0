"""What operators make of fake tensors by memory, against what they make when they are run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reeltune.estimate import repeated_ops
from reeltune.estimate.memory_tracker import tensors_in

aten = torch.ops.aten
WITH_VALUES = torch.ones(6)
KNOWN = {
    "new": lambda x, y: x + y,
    "of other dtypes": lambda x, y: (x > y, x.half(), x / 2, x.to(torch.float64)),
    "view": lambda x, y: x.view(4, -1)[1:, 2:].transpose(0, 1),
    "several views": lambda x, y: x.chunk(2, dim=1),
    "of other strides": lambda x, y: (x.transpose(1, 2) + 1, y[:, 1:] * 2),
    "in place": lambda x, y: x.mul_(y),
    "in place, of one twice": lambda x, y: x.addcmul_(y, y, value=0.5),
    "nothing": lambda x, y: torch._foreach_add_([x, y], 1.0),
    "several": lambda x, y: aten.native_layer_norm(x, [6], None, None, 1e-5),
    "one and nothing": lambda x, y: aten.native_layer_norm_backward(
        x, y, [6], x[..., :1], y[..., :1], None, None, [True, False, False]
    ),
    "of a list": lambda x, y: torch.cat([x, y, x], dim=-1),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None]),
    "convolution": lambda x, y: F.conv1d(x, y[:, :, :3].reshape(-1, 4, 3)),
    "complex": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(2, 4, 3, 2)) * 2j),
}
RUN = {
    "into one that is given": lambda x, y: torch.add(x, y, out=x),
    "with another shape": lambda x, y: x.squeeze_(),
    "conjugate": lambda x, y: torch.view_as_complex(x.view(2, 4, 3, 2)).conj(),
    "of values": lambda x, y: x + WITH_VALUES,
}


class Through(TorchDispatchMode):
    """Hands on every operator."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, types, args, kwargs or {})


def told(tensors):
    """All that there is of tensors without values."""
    storages = [id(tensor.untyped_storage()) for tensor in tensors]
    return [
        (
            *(type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device),
            *(tensor.requires_grad, tensor.is_conj(), tensor.untyped_storage().nbytes(), storages.index(storage)),
        )
        for tensor, storage in zip(tensors, storages, strict=True)
    ]


@pytest.mark.parametrize("call", [*KNOWN, *RUN])
def test_what_is_made_by_memory_is_what_is_made_by_running(call, monkeypatch):
    monkeypatch.setattr(repeated_ops, "_known", {})
    fake, ran = FakeTensorMode(allow_non_fake_inputs=True), []

    def dispatch(fake, func, *given, real=FakeTensorMode.dispatch):
        if func.namespace == "aten":  # and not a question for the device
            ran.append(func)
        return real(fake, func, *given)

    def made(run):
        with fake:
            x, y = torch.empty(2, 4, 6), torch.empty(2, 4, 6)
        ran.clear()
        with Through(run):
            out = {**KNOWN, **RUN}[call](x, y)
        return type(out), told([*tensors_in(out), x, y])

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    expected = made(fake.__torch_dispatch__)
    for _ in range(3):
        assert made(lambda *given: repeated_ops.run(fake, *given)) == expected
    assert (len(ran) > 0) == (call in RUN)


def test_calls_that_differ_are_told_apart(monkeypatch):
    monkeypatch.setattr(repeated_ops, "_known", {})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x, whole = torch.empty(4, 6), torch.empty(4, 6, dtype=torch.int64)
    with Through(lambda *given: repeated_ops.run(fake, *given)):
        by_number = [(whole * number).dtype for number in (1, 1.0, True, 1j)]
        by_dtype = [(one + 1).dtype for one in (x, x.half(), x.double())]
        by_stride = [(one + 1).stride() for one in (x, x.t().contiguous().t())]
        by_offset = [x[:, first : first + 3].t().storage_offset() for first in (0, 1, 2)]
        by_shape = [(one * 2).shape for one in (x, x[:, :3], x[None])]
    assert by_number == [torch.int64, torch.float32, torch.int64, torch.complex64]
    assert by_dtype == [torch.float32, torch.float16, torch.float64]
    assert by_stride == [(6, 1), (1, 4)]
    assert by_offset == [0, 1, 2]
    assert by_shape == [(4, 6), (4, 3), (1, 4, 6)]


def test_a_view_is_of_the_tensor_that_is_given_this_time():
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for _ in range(3):
        with fake:
            x, y = torch.empty(2, 4, 6), torch.empty(2, 4, 6)
        with Through(lambda *given: repeated_ops.run(fake, *given)):
            assert y.view(48).untyped_storage() is y.untyped_storage()
        assert repeated_ops.run(fake, aten.mul_.Tensor, (type(x),), (x, y), {}) is x
