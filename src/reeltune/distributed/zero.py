"""Gradients and optimizer state (ZeRO-2), and weights too (ZeRO-3), sharded over the processes by DeepSpeed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.core.errors import UserError, refuse
from reeltune.distributed.ddp import called, numbers, zeros
from reeltune.distributed.sharded_io import Piece, whole

OURS = ("optimizer", "scheduler", "zero_allow_untested_optimizer")  # the recipe says these
AUTO = "auto"  # what a settings file says of a value that the recipe gives


def settings(
    given: Mapping[str, Any], stage: int, *, offload: bool, bf16: bool, batch: int, accumulate: int, max_norm: float
) -> dict[str, Any]:
    """DeepSpeed's settings: ours, and those of a file that the recipe does not know.

    Raises UserError for every value in the file that contradicts the recipe.
    """
    recipe = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": _clip(max_norm),
    }
    problems = [f"{name} is the recipe's to say; leave it out" for name in OURS if name in given]
    problems += [
        f"{name} is {given[name]} and the recipe has {value}; write {AUTO}"
        for name, value in recipe.items()
        if given.get(name, AUTO) not in (AUTO, value)
    ]
    for name, asked in (("bf16", bf16), ("fp16", False)):
        enabled = given.get(name, {}).get("enabled", AUTO)
        if enabled not in (AUTO, asked):
            problems.append(f"{name} enabled is {enabled} and the recipe's mixed_precision says {asked}; write {AUTO}")
    refuse("deepspeed_config_file", problems)
    more = {name: value for name, value in given.items() if name not in (*recipe, "bf16", "fp16", "train_batch_size")}
    zero = {name: value for name, value in given.get("zero_optimization", {}).items() if value != AUTO}
    zero["stage"] = stage
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        **more,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,  # the loop divides the loss and says which micro-step is the last
        "gradient_clipping": _clip(max_norm),
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _clip(max_norm: float) -> float:
    """DeepSpeed says 0 where nothing is clipped."""
    return 0.0 if max_norm == math.inf else max_norm


class Zero:
    """The network and optimizer as DeepSpeed has them. The process group is there already.

    `net` is what to call in training.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]):
        self.plain, self.stage = net, config["zero_optimization"]["stage"]
        self.deepspeed, self.zero, *_ = _deepspeed().initialize(
            model=net, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.net, self.optimizer = called(net, self.deepspeed), self.zero.optimizer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def rehearse(self, loss: Tensor) -> None:
        """Nothing: DeepSpeed cannot throw gradients away, so the backward pass is first made in the first step."""

    def step(
        self,
        parameters: list[nn.Parameter],
        max_norm: float,
        soften: Callable[[list[nn.Parameter], Tensor], None] | None = None,
    ) -> Tensor:
        """Clips to max_norm, steps and clears the gradients. Returns their norm before clipping."""
        assert soften is None  # a recipe that asks for it is refused
        self.zero.clip_grad = _clip(max_norm)
        self.deepspeed.step()
        return torch.as_tensor(self.deepspeed.get_global_grad_norm())

    # ---- what this process keeps

    def make_state(
        self,
        names: Mapping[str, str],
        keys: Callable[[str], list[str]],
        scalars: Callable[[str], Mapping[str, float]],
    ) -> None:
        """Optimizer state, all zero, of the kinds that the parameters are said to have; names: ours -> released."""
        for flat_N, group in self._groups(names):
            name = next(filter(keys, group), None)
            if name is not None:
                self.optimizer.state[flat_N] = zeros(self.optimizer, flat_N, keys(name), scalars(name))

    def pieces(self, names: Mapping[str, str]) -> Iterator[Piece]:
        """fp32 weights and optimizer state of what learns, and the other weights that are named as they are."""
        for name, parameter in self.plain.named_parameters():
            if name not in names:
                continue
            released = names[name]
            if not parameter.requires_grad:
                yield self._resting(f"weights/{released}", parameter)
                continue
            place = self._place(parameter)
            if place is None:
                continue
            flat_N, first, start, count, total = place
            kept = {f"weights/{released}": flat_N}
            for key, state_N in self.optimizer.state.get(flat_N, {}).items():
                if isinstance(state_N, Tensor) and state_N.shape == flat_N.shape:
                    kept[f"optimizer/{released}/{key}"] = state_N
            for label, tensor_N in kept.items():
                yield Piece(label, tensor_N.detach().narrow(0, first, count), start, total)

    def scalars(self, names: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Released name -> what its optimizer state has that is one number."""
        state = self.optimizer.state
        groups = self._groups(names)
        return {name: numbers(state[flat_N]) for flat_N, group in groups if flat_N in state for name in group}

    def _place(self, parameter: Any) -> tuple[Tensor, int, int, int, int] | None:
        """(flat fp32 tensor, place in it, place in the flattened parameter, elements, elements of the whole)."""
        zero, rank, total = self.zero, self.deepspeed.global_rank, self._numel(parameter)
        if self.stage == 3:
            group, first, count = zero.grad_position[zero.get_param_id(parameter)]
            start = min(rank * count, total)  # equal parts, the last ones filled up
            return zero.fp32_partitioned_groups_flat[group], first, start, min(count, total - start), total
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat_N = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return (
            flat_N,
            mapping.hp_fragment_address.start,
            mapping.lp_fragment_address.start,
            (mapping.hp_fragment_address.numel),
            total,
        )

    def _groups(self, names: Mapping[str, str]) -> Iterator[tuple[Tensor, list[str]]]:
        """Each flat tensor, with the released names of all parameters in it, kept by this process or not."""
        of = {id(parameter): names[name] for name, parameter in self.plain.named_parameters() if name in names}
        zero = self.zero
        if self.stage == 3:
            pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        else:
            pairs = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        return ((flat_N, [of[id(parameter)] for parameter in group]) for flat_N, group in pairs)

    def _numel(self, parameter: Any) -> int:
        return parameter.ds_numel if self.stage == 3 else parameter.numel()

    def _resting(self, name: str, parameter: Any) -> Piece:
        if self.stage == 2:
            return whole(name, parameter)
        own_N, total = parameter.ds_tensor.view(-1), parameter.ds_numel
        start = min(self.deepspeed.global_rank * own_N.numel(), total)
        return Piece(name, own_N[: total - start], start, total)


def _deepspeed() -> Any:
    """The library, quiet, and without its own all-reduce on the CPU, which it would compile first."""
    try:
        import deepspeed
    except ImportError as missing:
        raise UserError("recipe", "engine zero2 or zero3 needs DeepSpeed; pip install 'reeltune[zero]'") from missing
    from deepspeed.ops import __compatible_ops__ as compatible

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compatible["deepspeed_shm_comm"] = False
    return deepspeed
