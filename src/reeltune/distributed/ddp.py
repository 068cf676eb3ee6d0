"""One process and DDP: torch's optimizer on the network's own parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from reeltune.distributed.sharded_io import Piece, share, whole


class Direct:
    """`net` is what to call in training; under DDP every process has all of it, under FSDP (`OnShards`) each its share.

    accelerator: accelerate's, which knows the devices and fp16's loss scale.
    """

    def __init__(self, accelerator: Any, net: nn.Module, optimizer: Any, *, ddp: bool):
        self.accelerator, self.plain = accelerator, net
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.ddp = None
        if ddp:
            devices = None if accelerator.device.type == "cpu" else [accelerator.device]
            # Some parameters are unused in some modes, such as ref_conv without full_ref. Buffers never change.
            self.ddp = DistributedDataParallel(
                net, device_ids=devices, find_unused_parameters=True, broadcast_buffers=False
            )
        self.net = net if self.ddp is None else called(net, self.ddp)
        is_torch = isinstance(optimizer, torch.optim.Optimizer)  # others step without a loss scale
        self.optimizer = accelerator.prepare_optimizer(optimizer) if is_torch else optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients. DDP exchanges them only at the last micro-step of a step; FSDP, which keeps no more than its
        share of them, always."""
        with contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync():
            self.accelerator.backward(loss)

    def rehearse(self, loss: Tensor) -> None:
        """A backward pass whose gradients are thrown away."""
        self.backward(loss, last=True)
        self._clear()

    def step(
        self,
        parameters: list[nn.Parameter],
        max_norm: float,
        soften: Callable[[list[nn.Parameter], Tensor], None] | None = None,
    ) -> Tensor:
        """Clips to max_norm, steps and clears the gradients. Returns their norm before clipping, still on the device.

        soften: what is done with clipped gradients, given their parameters and that norm, before the step.
        """
        norm = self._clip(parameters, max_norm)
        if soften is not None:
            soften([self._stepped(parameter) for parameter in parameters], norm)
        self.optimizer.step()
        self._clear()
        return norm

    def _clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Leaves clipped gradients with what the optimizer steps. Returns their norm before."""
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def _clear(self) -> None:
        self.optimizer.zero_grad()

    # ---- what this process keeps

    def make_state(
        self,
        names: Mapping[str, str],
        keys: Callable[[str], list[str]],
        scalars: Callable[[str], Mapping[str, float]],
    ) -> None:
        """Optimizer state, all zero, of the kinds that each parameter is said to have; names: ours -> released."""
        for name, parameter in self._learning():
            if made := keys(names[name]):
                stepped = self._stepped(parameter)
                self._inner.state[stepped] = zeros(self._inner, stepped, made, scalars(names[name]))

    def pieces(self, names: Mapping[str, str]) -> Iterator[Piece]:
        """Weights that are named and optimizer state, views of what trains."""
        for name, parameter in self.plain.named_parameters():
            if name in names:
                yield self._piece(f"weights/{names[name]}", parameter)
        for name, parameter in self._learning():
            stepped = self._stepped(parameter)
            for key, value in self._inner.state.get(stepped, {}).items():
                if isinstance(value, Tensor) and value.shape == stepped.shape:
                    yield self._state_piece(f"optimizer/{names[name]}/{key}", value, parameter)

    def scalars(self, names: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Released name -> what its optimizer state has that is one number."""
        states = ((name, self._inner.state.get(self._stepped(w), {})) for name, w in self._learning())
        return {names[name]: numbers(state) for name, state in states if state}

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, w) for name, w in self.plain.named_parameters() if w.requires_grad)

    def _stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer has of it."""
        return parameter

    def _state_piece(self, name: str, value: Tensor, parameter: nn.Parameter) -> Piece:
        """This process's piece of optimizer state that has a number for each of the parameter's."""
        return self._piece(name, value)

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        return piece(name, tensor, self.rank, self.world)


def called(plain: nn.Module, call: Callable) -> nn.Module:
    """A network as its family sees it: called through what wraps it in training, all else its own."""
    return cast("nn.Module", _Called(plain, call))


class _Called:
    """No module itself: its parameters would have other names."""

    def __init__(self, plain: nn.Module, call: Callable):
        self._plain, self._call = plain, call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


def piece(name: str, tensor: Tensor, rank: int, world: int) -> Piece:
    """What this process keeps of a tensor, sharded or not."""
    if not isinstance(tensor, DTensor):
        return whole(name, tensor)
    return share(name, tensor.to_local(), tensor.shape, rank, world)


def zeros(
    optimizer: torch.optim.Optimizer, stepped: Tensor, keys: Iterable[str], scalars: Mapping[str, float]
) -> dict[str, Tensor]:
    """The optimizer's state of what it steps: zeros by these keys, and these numbers. A fused optimizer reads the
    numbers on the device of what it steps, any other on the CPU (torch 2.13, Optimizer.load_state_dict)."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    place = stepped.device if fused else torch.device("cpu")
    numbers_there = {key: torch.tensor(value, device=place) for key, value in scalars.items()}
    return {key: torch.zeros_like(stepped) for key in keys} | numbers_there


def numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """What of an optimizer's state is one number."""
    return {key: float(value) for key, value in state.items() if not isinstance(value, Tensor) or value.ndim == 0}
