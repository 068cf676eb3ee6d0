"""FlashAttention 4 in the place of torch's attention, with a stand-in for what a GPU would compute."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.memory import attention, flash_4
from reeltune.memory.attention_trial import Call, Trial, tried
from reeltune.memory.blocks import recompute
from reeltune.memory.compiled import Compiled
from reeltune.memory.kept import KEPT
from reeltune.training.attention_choice import _for_all
from reeltune.training.prefetch import encodes_ahead
from tests.unit.flash_4_stand_in import stand_in  # noqa: F401
from tests.unit.test_attention import CPU, LENGTH, WIDTH, Block, Operators, net_of

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("stand_in")


def given(*, dtype=BF16, width=16, keys=7):
    made = torch.Generator().manual_seed(0)
    lengths = 5, keys, keys
    return [torch.randn(2, 3, length, width, generator=made).to(dtype).requires_grad_() for length in lengths]


def answer_and_gradients(tensors, **named):
    answer = scaled_dot_product_attention(*tensors, **named)
    return [
        answer,
        *torch.autograd.grad(answer, tensors, torch.linspace(-1, 1, answer.numel()).view(answer.shape).to(BF16)),
    ]


@pytest.mark.parametrize(
    "named", [{}, {"scale": 0.3}, {"attn_mask": None, "is_causal": False, "dropout_p": 0.0}], ids=str
)
def test_it_computes_what_torch_computes(named, stand_in):  # noqa: F811
    tensors = given()
    theirs = answer_and_gradients(tensors, **named)
    with attention.preferring(["flash_4"]):
        ours = answer_and_gradients(tensors, **named)
    assert stand_in == {"forward": 1, "backward": 1}
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == BF16
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [16, 8])
def test_what_it_gives_lies_in_memory_as_compiled_code_expects_it(width):
    tensors = [tensor.detach() for tensor in given()]
    tensors[2] = tensors[2][..., :width]  # values may be narrower than keys
    torch.library.opcheck(flash_4._attention, (*tensors, 0.25), test_utils=("test_schema", "test_faketensor"))
    answer, sums = flash_4.forward_pass(*tensors, 0.25)
    whole = (torch.ones_like(answer), *tensors, answer, sums, 0.25)
    torch.library.opcheck(flash_4._attention_backward, whole, test_utils=("test_schema", "test_faketensor"))
    one = tensors[0][:1].as_strided((1, 3, 5, 16), (0, 80, 16, 1))  # as compiled code has a single clip
    assert flash_4.forward_pass(one, one, one, 0.25)[0].shape == (1, 3, 5, 16)


def test_gradients_come_in_a_fixed_order_where_torch_is_to_be_deterministic(stand_in):  # noqa: F811
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with attention.preferring(["flash_4"]):
            answer_and_gradients(given())
    finally:
        torch.use_deterministic_algorithms(False)
    assert stand_in == {"forward": 1, "backward, deterministic": 1}


def test_autocast_gives_it_what_it_takes(stand_in):  # noqa: F811
    with attention.preferring(["flash_4"]), torch.autocast("cpu", BF16):
        assert scaled_dot_product_attention(*given(dtype=torch.float32)).dtype == BF16
    assert stand_in["forward"] == 1


@pytest.mark.parametrize(
    ("tensors", "named", "reason"),
    [
        ({}, {"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, "is not asked for attention with attn_mask"),
        ({"keys": 5}, {"is_causal": True}, "is not asked for attention with is_causal"),
        ({}, {"dropout_p": 0.5}, "is not asked for attention with dropout_p"),
        ({"dtype": torch.float32}, {}, "computes in fp16 and bf16, and not in torch.float32"),
        ({"width": 12}, {}, r"a multiple of 8, and this is of \[2, 3, 5, 12\]"),
    ],
)
def test_what_it_does_not_take_is_torchs_or_told(tensors, named, reason, stand_in):  # noqa: F811
    tensors = given(**tensors)
    with attention.preferring(["flash_4", "flash", "math"]):
        ours = scaled_dot_product_attention(*tensors, **{**named, "dropout_p": 0.0})
    theirs = scaled_dot_product_attention(*tensors, **{**named, "dropout_p": 0.0})
    if "dropout_p" not in named:
        torch.testing.assert_close(ours, theirs)
        assert not stand_in
    with (
        pytest.raises(RuntimeError, match=f"^No available kernel: flash_4 .*{reason}"),
        attention.preferring(["flash_4"]),
    ):
        scaled_dot_product_attention(*tensors, **named)


def test_what_the_package_asserts_is_told_in_words():
    block = Block()
    attention.Attention([block], "flash_4")
    with pytest.raises(
        UserError, match=r"attention is flash_4, a kernel that flash-attn-4 4.0.0 does not have .*float32"
    ):
        block(torch.zeros(1, LENGTH, WIDTH))
    with pytest.raises(RuntimeError, match=r"No available kernel: flash-attn-4 4.0.0 says: head_dim is too large"):
        flash_4.forward_pass(*given(width=264), 1.0)


class CompilerError(Exception):
    """In the place of nvidia-cutlass-dsl's."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CompilerError("no such layout\nat line 7"), r"^No available kernel: flash-attn-4 4.0.0 says: no such layout$"),
        (AssertionError(), r"^No available kernel: flash-attn-4 4.0.0 says: AssertionError$"),
        (NotImplementedError("not on 8.9"), r"^No available kernel: .* says: not on 8.9$"),
        (TypeError("unexpected keyword"), r"^No available kernel: .* says: unexpected keyword$"),
        (torch.OutOfMemoryError("out of memory"), "^out of memory$"),
    ],
    ids=repr,
)
def test_what_the_package_raises_is_its_answer_and_what_torch_raises_is_not(error, told, monkeypatch):
    def kernel(*_, **__):
        raise error

    monkeypatch.setattr(flash_4, "_kernels", lambda: (kernel, kernel))
    compiler = SimpleNamespace(DSLBaseError=CompilerError)
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", compiler)
    with pytest.raises(RuntimeError, match=told):
        flash_4.forward_pass(*given(), 1.0)


def test_where_it_is_not_installed_that_is_told(monkeypatch):
    attention.refuse_missing("flash_4", CPU, BF16)
    assert "by flash-attn-4 4.0.0's kernel flash_4" in attention.notices("flash_4")[0]
    assert attention.candidates("cuda") == ("flash", "cudnn", "efficient", "flash_4")
    monkeypatch.setattr(flash_4, "installed", lambda: None)
    assert attention.candidates("cuda") == ("flash", "cudnn", "efficient")
    with pytest.raises(
        UserError, match="the package flash-attn-4, which is not installed; pip install flash-attn-4, or"
    ):
        attention.refuse_missing("flash_4", CPU, BF16)


@pytest.mark.parametrize("error", [ImportError("a"), AttributeError("a"), OSError("a")], ids=repr)
def test_a_package_that_is_not_whole_is_told(error, monkeypatch):
    def broken(name):
        assert name == "flash_attn.cute.interface"
        raise error

    monkeypatch.undo()  # the stand-in
    flash_4._kernels.cache_clear()
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match=r"^No available kernel: flash-attn-4 is not there, or not whole \(a\)$"):
        flash_4._kernels()


@pytest.mark.parametrize("lacks", [False, True])
def test_several_processes_take_it_if_each_has_it(lacks):
    found = Trial({"flash": [3.0], "cudnn": [2.0], "flash_4": [1.0]}, {"efficient": "is not there"})
    other = "a process has no such kernel on cuda" if lacks else None
    asked = []

    def gather(own):
        asked.append(own)
        return [own, other if len(asked) == 1 else None]

    engine = SimpleNamespace(device=CPU, dtype=BF16, gather=gather)
    kept = _for_all(found, build({}), engine)
    if not lacks:
        assert kept == found and asked == [None]
    else:  # and cudnn, which this process itself has not, is asked of next
        assert kept.passes_s == {"flash": [3.0]}
        own = "a process has no such kernel on cpu"
        assert kept.left_out == {"efficient": "is not there", "flash_4": other, "cudnn": own}


def test_encoders_may_be_at_work_meanwhile():
    """Which what is chosen for the whole process forbids."""
    from_clips = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "train_data_meta": "m.json"}
    for kernel, beside in (("flash_4", True), ("flash", False)):
        assert encodes_ahead(build({**from_clips, "attention": kernel}), on_gpu=True) is beside
    assert encodes_ahead(build({**from_clips, "attention": "flash_4", "encode_ahead": True}), on_gpu=True)
    with pytest.raises(UserError, match="attention is flash and encode_ahead is true"):
        build({**from_clips, "attention": "flash", "encode_ahead": True})


def test_it_is_on_trial_beside_torchs(stand_in):  # noqa: F811
    query, key, value = (tensor.detach() for tensor in given())
    found = tried([Call((query, key, value), {}, 1)], ["flash", "flash_4"])
    assert found.passes_s.keys() == {"flash", "flash_4"} and not found.left_out
    assert stand_in["backward"] == 2 + len(found.passes_s["flash_4"])
    masked = Call((query, key, value), {"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, 1)
    found = tried([masked], ["flash", "flash_4"])
    assert found.left_out == {"flash_4": "No available kernel: flash_4 is not asked for attention with attn_mask"}


def test_its_arithmetic_is_counted():
    tensors = given()
    counts = []
    for kernels in (["flash_4"], ["math"]):
        with attention.preferring(kernels), FlopCounterMode(display=False) as counter:
            answer_and_gradients(tensors)
        counts.append(counter.get_total_flops())
    assert counts[0] == 3.5 * 2 * 2 * 2 * 3 * 5 * 7 * 16
    assert counts[1] == counts[0] * 6 / 7  # which keeps the scores


def loss_and_gradients(prepare):
    net = net_of(depth=2).to(BF16)
    prepare(list(net))
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)
    with Operators() as forward:
        loss = net(x).float().square().mean()
    with Operators() as backward:
        loss.backward()
    return forward, backward, [loss.detach(), *(weight.grad for weight in net.parameters())]


@pytest.mark.parametrize(("kept", "again"), [(None, 4), ("attention_kept", 2), ("products_kept", 2)])
def test_where_blocks_recompute_it_is_kept_like_torchs(kept, again, stand_in):  # noqa: F811
    """Attention over as many keys as queries is, and that to a few is computed again."""

    def prepare(blocks):
        attention.Attention(blocks, "flash_4")
        recompute(blocks, keep=None if kept is None else KEPT[kept])

    _, _, plain = loss_and_gradients(lambda blocks: attention.Attention(blocks, "flash_4"))
    forward, backward, numbers = loss_and_gradients(prepare)
    assert (forward.counts[flash_4.OPERATOR], backward.counts[flash_4.OPERATOR]) == (4, again)
    assert stand_in["backward"] == 8
    for ours, theirs in zip(numbers, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, "attention_kept"])
def test_compiled_blocks_have_it(kept, stand_in, monkeypatch):  # noqa: F811
    from torch._dynamo import lookup_backend

    monkeypatch.setattr("reeltune.memory.compiled.inductor", lookup_backend("aot_eager"))

    def prepare(blocks):
        compiled = Compiled(blocks)
        if kept is not None:
            compiled.keep(blocks, KEPT[kept])
        attention.Attention(blocks, "flash_4", compiled)
        compiled.begin(1, "a test")

    _, _, plain = loss_and_gradients(lambda blocks: attention.Attention(blocks, "flash_4"))
    before = stand_in["forward"]
    net = net_of(depth=2).to(BF16)
    prepare(list(net))
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)
    loss = net(x).float().square().mean()
    loss.backward()
    assert stand_in["forward"] - before == 4 + (0 if kept is None else 2)
    for ours, theirs in zip([loss.detach(), *(weight.grad for weight in net.parameters())], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        query = self.into(x).unflatten(-1, (2, -1)).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return scaled_dot_product_attention(query, query, query, attn_mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_it_does_not_take_is_told_alike_of_compiled_blocks(is_compiled):
    block = Masked().to(BF16)
    compiled = Compiled([block]) if is_compiled else None
    attention.Attention([block], "flash_4", compiled)
    if compiled is not None:
        compiled.begin(1, "a test")
    with pytest.raises(UserError) as told:
        block(torch.zeros(1, LENGTH, WIDTH, dtype=BF16))
    assert told.value.problems == [
        "attention is flash_4, a kernel that flash-attn-4 4.0.0 does not have for what this network asks of it, such "
        "as a mask or the width of its heads (No available kernel: flash_4 is not asked for attention with attn_mask); "
        "use another, or auto"
    ]
