"""What learns: the network, its optimizer and its average, stepped, saved and loaded together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared, Whole
from reeltune.config.recipe import Memory, Model, Optimization
from reeltune.core.errors import UserError, refuse
from reeltune.distributed.ddp import piece
from reeltune.distributed.engine import Engine
from reeltune.distributed.sharded_io import Piece, whole
from reeltune.families.spec import Family, Parts
from reeltune.memory.blocks import blocks_of, offload_activations, recompute, swap
from reeltune.memory.levers import pulled_alone
from reeltune.memory.size import size_bytes
from reeltune.optim.optimizers import (
    MovingAverage,
    StochasticRounding,
    build_optimizer,
    clip_ceiling,
    rate_curve,
    set_rate,
    soften_outliers,
)
from reeltune.optim.step_in_backward import StepInBackward
from reeltune.optim.trainable import released_names, select


class Learner:
    """`net` is the network to call in training (it may be wrapped); `plain` the same without wrapping.

    found: the checkpoint that the run goes on from; `load_state` then reads what goes with its weights.
    """

    def __init__(
        self,
        family: Family,
        parts: Parts,
        engine: Engine,
        model: Model,
        optimization: Optimization,
        memory: Memory,
        *,
        seed: int,
        gradient_checkpointing: bool,
        batch: int,
        accumulate: int,
        found: Path | None = None,
    ):
        self.family, self.parts, self.engine, self.optimization = family, parts, engine, optimization
        self.names = released_names(parts.net, lambda state: family.to_released(state, parts.config))
        self.shapes = {name: list(w.shape) for name, w in parts.net.named_parameters()}
        if found is not None and checkpoint.is_shared(found):
            self._read_weights(found)
        if engine.context > 1 and family.split is not None:
            family.split(parts.net, engine.context_mesh())
        select(parts.net, self.names, model.trainable_modules, model.trainable_modules_low_learning_rate)
        self.swapped = self._save_memory(memory, gradient_checkpointing)
        self.plain = engine.shard(parts.net, family.blocks, swapped=self.swapped)
        groups = select(self.plain, self.names, model.trainable_modules, model.trainable_modules_low_learning_rate)
        self.learning = [parameter for group in groups for parameter in group["params"]]
        self.average = MovingAverage(self.plain, optimization.ema_decay) if optimization.use_ema else None
        build = partial(
            build_optimizer,
            learning_rate=optimization.learning_rate,
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            epsilon=optimization.adam_epsilon,
            weight_decay=optimization.adam_weight_decay,
            use_8bit_adam=optimization.use_8bit_adam,
            use_came=optimization.use_came,
            use_adafactor=optimization.use_adafactor,
        )
        rounding = model.trained_weights == "bf16_stochastic"
        optimizer = StochasticRounding(groups, build, seed) if rounding else build(groups)
        self.trainer = engine.prepare(
            self.plain,
            optimizer,
            batch=batch,
            accumulate=accumulate,
            max_norm=self._most_norm,
        )
        self.net, self.optimizer = self.trainer.net, self.trainer.optimizer
        self.fused = StepInBackward(optimizer, self.learning) if memory.step_in_backward else None
        self.plain.train()

    def _read_weights(self, found: Path) -> None:
        """Of a checkpoint that several processes wrote, into the network as it was loaded."""
        parameters = self.parts.net.named_parameters()
        Shared(found).fill(whole(f"weights/{self.names[name]}", weight) for name, weight in parameters)

    def _save_memory(self, memory: Memory, gradient_checkpointing: bool) -> list[nn.Module]:
        """Returns the blocks that wait in the CPU's memory."""
        refuse(
            "recipe",
            [
                f"{name} is {getattr(memory, name)} and there are {self.engine.world} processes, which must have all "
                "gradients and weights on their devices at once; leave it out, or start one process"
                for name in pulled_alone(vars(memory))
                if self.engine.world > 1
            ],
        )
        blocks = blocks_of(self.parts.net, self.family.blocks)
        swapped = swap(blocks, memory.blocks_to_swap, self.engine.device)
        if gradient_checkpointing:
            recompute([block for block in blocks if block not in swapped], memory.gradient_checkpointing_share)
        if memory.offload_activations:
            offload_activations(self.parts.net)
        return swapped

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, and how many of them learn."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        learning = [sizes[name] for name, weight in self.plain.named_parameters() if weight.requires_grad]
        return {"parameters": sum(sizes.values()), "trainable": sum(learning)}

    def held_bytes(self) -> dict[str, int]:
        """part -> bytes of it that this process has now."""
        parts = {
            "weights": list(self.plain.parameters()),
            "gradients": [weight.grad for weight in self.plain.parameters()],
            "optimizer state": self.optimizer.state_dict(),
            "the moving average": {} if self.average is None else self.average.weights,
        }
        return {part: size_bytes(tree) for part, tree in parts.items()}

    def rate_curve(self, total_steps: int) -> Callable[[int], float]:
        """Step -> learning rate."""
        optimization = self.optimization
        factor = rate_curve(
            optimization.lr_scheduler,
            warmup_steps=optimization.lr_warmup_steps,
            total_steps=total_steps,
            num_cycles=optimization.lr_num_cycles,
            power=optimization.lr_power,
            step_rules=optimization.lr_step_rules,
        )
        return lambda step: optimization.learning_rate * factor(step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """last: of the micro-steps of a step."""
        if self.fused is None:
            self.trainer.backward(loss, last=last)
        else:
            self.fused.backward(loss)

    def step(self, step: int, rate: float) -> Tensor:
        """Clips, steps and clears the gradients. Returns their norm before clipping, still on the device."""
        optimization = self.optimization
        start = optimization.abnormal_norm_clip_start
        ceiling = clip_ceiling(step, self._most_norm, optimization.initial_grad_norm_ratio, start)
        soften = partial(soften_outliers, max_norm=ceiling) if start is not None and step > start else None
        set_rate(self.optimizer, rate)
        norm = (
            self.trainer.step(self.learning, ceiling, soften)
            if self.fused is None
            else self.fused.step(ceiling, soften)
        )
        if self.average is not None:
            self.average.update()
        return norm

    @property
    def _most_norm(self) -> float:
        most = self.optimization.max_grad_norm
        return math.inf if most is None else most

    def weights(self) -> dict[str, Tensor]:
        """Of the whole network, by our names, as they train on."""
        return self.plain.state_dict()

    def write_weights(self, weights: dict[str, Tensor], average: dict[str, Tensor] | None, folder: Path) -> None:
        """transformer/ and, if there is an average, transformer_ema/, both in the released form."""
        self.family.save(folder / "transformer", weights, self.parts.config)
        if average is not None:
            self.family.save(folder / "transformer_ema", {**weights, **average}, self.parts.config)

    def pieces(self) -> Iterator[Piece]:
        """What this process keeps of weights, optimizer state and average, views of them all."""
        yield from self.trainer.pieces(self.names)
        for name, average in ({} if self.average is None else self.average.weights).items():
            yield piece(f"average/{self.names[name]}", average, self.engine.rank, self.engine.world)

    def scalars(self) -> dict[str, dict[str, float]]:
        """Released name -> what its optimizer state has that is one number."""
        return self.trainer.scalars(self.names)

    def write_outline(self, folder: Path, scalars: dict[str, dict[str, float]]) -> None:
        """What the pieces do not say: the network's config.json, shapes, and numbers of the optimizer's state."""
        state = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        self.family.save(folder / "transformer", state, self.parts.config)
        shapes = {self.names[name]: shape for name, shape in self.shapes.items()}
        Shared.write_outline(folder, shapes, scalars)

    def state(self) -> dict:
        """All but the weights that an exact resume needs, as it trains on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.engine.scaler_state(),
            "average": None if self.average is None else self.average.weights,
        }

    def load_state(self, found: Path) -> None:
        """Of the checkpoint whose weights are in the network already."""
        is_shared = checkpoint.is_shared(found)
        if is_shared != self.engine.sharded and self.optimization.use_came:
            raise UserError(
                "resume",
                f"use_came is true, whose state is another in each engine; {found.name} was written by "
                f"{'zero2 or zero3' if is_shared else 'ddp'} and engine is {self.engine.name}; restore it",
            )
        if is_shared or self.engine.sharded:
            held = Shared(found) if is_shared else self._whole(found)
            self.trainer.make_state(self.names, held.keys, held.scalars)
            # ZeRO has a state also for what never had a gradient, and there it stays zero.
            held.fill(piece for piece in self.pieces() if piece.name in held or "optimizer/" not in piece.name)
            return
        state = checkpoint.load(found)
        self.optimizer.load_state_dict(state["optimizer"])
        self.engine.load_scaler_state(state["scaler"])
        if self.average is not None and state["average"] is not None:
            for name, weight in self.average.weights.items():
                weight.copy_(state["average"][name])

    def _whole(self, found: Path) -> Whole:
        of = {id(weight): self.names[name] for name, weight in self.plain.named_parameters()}
        state = checkpoint.load(found)
        return Whole(found, state, [of[id(weight)] for weight in self.learning], self.names)
