"""FlashAttention 4, of the package flash-attn-4 (https://github.com/Dao-AILab/flash-attention), as an operator of
torch's: what compiles, keeps or counts torch's own kernels of attention does so with it.

Letters: B clips, H heads, L tokens, S tokens that are looked at, D width of a head.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula

from reeltune.core import versions
from reeltune.core.errors import UserError, first_words

NAME, PACKAGE = "flash_4", "flash-attn-4"
DEVICES, WIDTHS = ("cuda",), 8  # and of which a head's width is a multiple: 16 bytes
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of scaled_dot_product_attention
NONE = "No available kernel"  # as torch begins where it has none
NOT_WHOLE = ImportError, AttributeError, TypeError, ValueError, OSError  # of a package beside others that do not fit it


def installed() -> str | None:
    """The package's version; None: it is not there."""
    return versions.installed(PACKAGE)


def refuse_missing() -> None:
    """Raises UserError where the package is not there."""
    if installed() is None:
        raise UserError(
            "recipe",
            f"attention is {NAME}, a kernel of the package {PACKAGE}, which is not installed; pip install {PACKAGE}, "
            "or use another, or auto",
        )


class Preferred(TorchFunctionMode):
    """Within it FlashAttention 4 computes attention, in this thread alone. torch's compiler does not see it:
    `in_graph` is for what is compiled.

    others: whether torch computes what it cannot. If not, that raises RuntimeError.
    """

    def __init__(self, *, others: bool):
        super().__init__()
        self._compute = COMPUTE[others]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (self._compute if func is scaled_dot_product_attention else func)(*args, **kwargs)


def in_graph(graph: GraphModule, *, others: bool) -> None:
    """Has FlashAttention 4 compute the attention of a graph that is to be compiled. others: as of `Preferred`."""
    for module in graph.modules():  # what is recomputed is a graph within the graph
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if node.target is scaled_dot_product_attention:
                    node.target = COMPUTE[others]
            module.recompile()


def or_torch(*args: Any, **kwargs: Any) -> Tensor:
    """torch's scaled_dot_product_attention, by FlashAttention 4 where it can."""
    answer = _computed(*args, **kwargs)
    return scaled_dot_product_attention(*args, **kwargs) if isinstance(answer, str) else answer


def alone(*args: Any, **kwargs: Any) -> Tensor:
    """torch's scaled_dot_product_attention, by FlashAttention 4. Raises RuntimeError where it cannot."""
    answer = _computed(*args, **kwargs)
    if isinstance(answer, str):
        raise RuntimeError(f"{NONE}: {answer}")
    return answer


COMPUTE = {True: or_torch, False: alone}


def _computed(*args: Any, **kwargs: Any) -> Tensor | str:
    """What attention gives; or why FlashAttention 4 cannot compute it."""
    named = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    query, key, value = (autocast(named[name]) for name in ARGUMENTS[:3])
    if (reason := _why_not(query, named)) is not None:
        return reason
    scale = named.get("scale")
    return _attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)[0]


def autocast(tensor: Tensor) -> Tensor:
    """A tensor as attention gets it: where autocast is on, cast by it."""
    cast = tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if cast else tensor


def _why_not(query_BHLD: Tensor, named: dict[str, Any]) -> str | None:
    """Why it cannot compute a call of torch's attention; None: it can, as far as can be said before."""
    if query_BHLD.device.type not in DEVICES:
        return f"{NAME} computes on a GPU, and not on {query_BHLD.device.type}"
    if query_BHLD.dtype not in (torch.float16, torch.bfloat16):
        return f"{NAME} computes in fp16 and bf16, and not in {query_BHLD.dtype}"
    if query_BHLD.ndim != 4 or query_BHLD.shape[-1] % WIDTHS:
        return f"{NAME} takes heads whose width is a multiple of {WIDTHS}, and this is of {list(query_BHLD.shape)}"
    for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"):
        value = named.get(name)
        if isinstance(value, Tensor) or value:
            return f"{NAME} is not asked for attention with {name}"
    return None


# ---- the operators, whose tensors are B H L D, and B L H D in memory


def forward_pass(query_BHLD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(softmax(scale query key^T) value, BHLD; the logarithms of its sums, BHL in fp32)

    Raises RuntimeError for what the package does not compute on this device.
    """
    given = (_in_rows(tensor) for tensor in (query_BHLD, key_BHSD, value_BHSD))
    out_BLHD, sums_BHL, *_ = _run(_kernels()[0], *given, softmax_scale=scale, return_lse=True)
    return out_BLHD.transpose(1, 2), sums_BHL


def backward_pass(
    grad_BHLD: Tensor,
    query_BHLD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    out_BHLD: Tensor,
    sums_BHL: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; summed in a fixed order where torch is to use deterministic algorithms.

    Raises RuntimeError as `forward_pass`.
    """
    given = (_in_rows(tensor) for tensor in (query_BHLD, key_BHSD, value_BHSD, out_BHLD, grad_BHLD))
    fixed = torch.are_deterministic_algorithms_enabled()
    grads = _run(_kernels()[1], *given, sums_BHL.contiguous(), softmax_scale=scale, deterministic=fixed)[:3]
    query, key, value = (grad_BLHD.transpose(1, 2) for grad_BLHD in grads)
    return query, key, value


_attention = custom_op("reeltune::flash_4", forward_pass, mutates_args=(), device_types=DEVICES)
_attention_backward = custom_op("reeltune::flash_4_backward", backward_pass, mutates_args=(), device_types=DEVICES)
OPERATOR: Any = torch.ops.reeltune.flash_4.default


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, L, _ = query.shape
    return _room(query, value.shape[-1]), query.new_empty((B, H, L), dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _room(query, query.shape[-1]), _room(key, key.shape[-1]), _room(value, value.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)  # of the sums, which nothing else reads


def _gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


_attention.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.reeltune.flash_4)
def _flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Two products of L x S x D for each head, two operations a number; of shapes."""
    B, H, L, D = query
    return 2 * B * H * L * key[-2] * (D + value[-1])


@register_flop_formula(torch.ops.reeltune.flash_4_backward)
def _backward_flops(grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Five products (https://arxiv.org/abs/2307.08691, section 3.1)."""
    return 5 * _flops(query, key, value) // 2


def _in_rows(tensor_BHLD: Tensor) -> Tensor:
    """B L H D, one row after the other. Compiled code gives a dimension of 1 no stride, which the package refuses."""
    rows_BLHD = tensor_BHLD.transpose(1, 2).contiguous()
    return rows_BLHD.flatten().view(rows_BLHD.shape)


def _room(like_BHLD: Tensor, width: int) -> Tensor:
    B, H, L, _ = like_BHLD.shape
    return like_BHLD.new_empty((B, L, H, width)).transpose(1, 2)


@cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The package's forward and backward pass, without its own autograd: as torch itself takes them
    (torch.nn.attention.activate_flash_attention_impl)."""
    try:
        module = importlib.import_module("flash_attn.cute.interface")
    except NOT_WHOLE as error:
        raise RuntimeError(f"{NONE}: {PACKAGE} is not there, or not whole ({first_words(error)})") from error
    return module._flash_attn_fwd, module._flash_attn_bwd


def _run(kernel: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """The package says what it cannot do by an assertion, or its compiler by an error of its own."""
    try:
        return kernel(*given, **named)
    except (AssertionError, NotImplementedError, *NOT_WHOLE, *_compilers_errors()) as error:
        raise RuntimeError(f"{NONE}: {PACKAGE} {installed()} says: {first_words(error)}") from error


def _compilers_errors() -> tuple[type[Exception], ...]:
    """The base of the errors of nvidia-cutlass-dsl, which compiles the package's kernels, once that is imported."""
    error = getattr(sys.modules.get("cutlass.base_dsl.common"), "DSLBaseError", None)
    return () if error is None else (error,)
