"""Blocks whose passes torch compiles: one graph for each kind of block, counted, and nothing else in their place."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reeltune.core.errors import UserError
from reeltune.memory.blocks import Contexts

COMPILERS = {"cpu": ("CXX", ("g++", "clang++")), "cuda": ("CC", ("gcc", "clang"))}  # of torch's and of triton's code


def inductor(graph: Any, inputs: Sequence[Any]) -> Any:
    """The compiled passes of a graph.

    Among deterministic kernels no code is chosen by a trial of its time, which another run could end otherwise: sums
    come in the order that the code has. On an H100 the trial spares 1.2 % of a step of Wan2.1 1.3B (measured,
    2026-11-27).
    """
    from torch._inductor.compile_fx import compile_fx  # imported by those who compile

    settings = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fallback_random": True,  # dropout drops what it drops uncompiled
    }
    return compile_fx(graph, list(inputs), config_patches=settings)


def refuse_missing(device_type: str) -> None:
    """Raises UserError where torch has not what it compiles with for such a device."""
    variable, names = COMPILERS.get(device_type, COMPILERS["cpu"])
    wanted = os.environ.get(variable)
    if not any(map(shutil.which, (wanted,) if wanted else names)):
        where = f"{wanted}, which {variable} names," if wanted else " or ".join(names)
        raise UserError(
            "recipe",
            f"compile is blocks, for which torch needs a compiler on this machine, and {where} is not found; install "
            f"gcc (as by apt-get install g++), name another in {variable}, or set compile to none",
        )
    if device_type == "cuda" and find_spec("triton") is None:
        raise UserError(
            "recipe",
            "compile is blocks, for which torch needs triton on a GPU, and it is not installed; pip install "
            "triton, or set compile to none",
        )


Pass = Callable[..., Any]


class Graphs:
    """What the forward passes of blocks become: compiled when they are called, counted, for all blocks of a class."""

    def __init__(self, functions: Iterable[Pass], *, dynamic: bool, change: Callable[[Any], object] | None):
        self.count = 0  # each of a forward and a backward pass
        self._change = change
        compiled = partial(torch.compile, backend=self._counted, fullgraph=True, dynamic=dynamic)
        self.passes: dict[Pass, Pass] = {function: compiled(function) for function in functions}

    def _counted(self, graph: Any, inputs: Sequence[Any]) -> Pass:
        self.count += 1
        if self._change is not None:
            self._change(graph)
        return inductor(graph, inputs)


class Compiled:
    """These blocks, whose forward pass is compiled with its backward pass wherever it is to have one.

    Without gradients, as in validation, they compute as if nothing was compiled, in whatever batches; and so they do
    before `begin`. This comes before all else that wraps a forward pass.

    again: a backward pass may run twice over the same activations. change: what is done to each graph before it is
    compiled, from `begin` on.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, again: bool = False):
        self._again = again
        self.change: Callable[[Any], object] | None = None
        self._graphs: Graphs | None = None
        self._functions = {block: type(block).forward for block in blocks}
        for block in blocks:
            block.forward = partial(self._forward, block, block.forward)

    def keep(self, blocks: Sequence[nn.Module], contexts: Callable[[], Contexts]) -> None:
        """These blocks recompute all but what `contexts`, one of kept.KEPT, keeps; that is compiled with them."""
        # It warns of in-place operations, which EasyAnimate's blocks have: a step so compiled is the plain one (tests).
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        self._functions |= {block: recomputing(type(block).forward, contexts) for block in blocks}

    @property
    def count(self) -> int:
        """Graphs compiled so far, for all networks that share them."""
        return 0 if self._graphs is None else self._graphs.count

    @property
    def computes(self) -> bool:
        """Whether what is compiled computes now."""
        return self._graphs is not None and torch.is_grad_enabled()

    def begin(self, sizes: int, label: str, *others: Compiled) -> None:
        """From here on blocks are compiled: with static shapes for one number of tokens, with dynamic ones for several.

        sizes: how many numbers of tokens there are. others: blocks of networks of the same sizes, which share what is
        compiled. label: names the size that comes first. torch's cache on the disk is kept apart by it, as dynamic
        shapes are compiled with the first size in view; and by whether a backward pass may run twice, which torch
        forgets: it gave such a pass the code of one that writes over activations (torch 2.13, 2026-11-26).
        """
        import torch._dynamo.config as graphs
        import torch._functorch.config as passes

        torch.compiler.reset()
        torch.compiler.config.cache_key_tag = f"{label}, backward twice: {self._again}"
        functions = [function for one in (self, *others) for function in one._functions.values()]
        graphs.recompile_limit = len(functions) * sizes
        graphs.optimize_ddp = False  # it cuts up whole networks, and these are blocks
        graphs.specialize_float = True  # sides are left open, and not a block's constants
        passes.donated_buffer = not self._again
        shared = Graphs({*functions}, dynamic=sizes > 1, change=self.change)
        for one in (self, *others):
            one._graphs = shared

    def _forward(self, block: nn.Module, plain: Callable, *given: Any, **named: Any) -> Any:
        if self._graphs is None or not self.computes:
            return plain(*given, **named)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return self._graphs.passes[self._functions[block]](block, *given, **named)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                "recipe",
                f"compile is blocks, and torch {torch.__version__} cannot compile {type(block).__name__} after "
                f"{self.count} compilations ({type(error).__name__}: {reason}); set compile to none",
            ) from error


@cache  # one for all blocks of a class, which is what one compilation serves
def recomputing(forward: Callable[..., Any], contexts: Callable[[], Contexts]) -> Callable[..., Any]:
    """A block's forward pass, of which the backward pass recomputes all but what is kept."""

    def kept(block: nn.Module, *given: Any, **named: Any) -> Any:
        return checkpoint(forward, block, *given, use_reentrant=False, context_fn=contexts, **named)

    return kept
