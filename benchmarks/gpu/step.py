"""What a training step does once its batch is encoded, by the code that trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import networks
from benchmarks.gpu.sizes import CHANNELS, IMAGE_TOKENS, TEXT_TOKENS, Encoders, Network, Scale
from reeltune.config.parse import build
from reeltune.config.recipe import Recipe
from reeltune.core.types import Crop, Draw, Encoded, Posterior, Shape
from reeltune.diffusion.loss import Loss, settle
from reeltune.distributed.engine import Engine
from reeltune.families.spec import Family, Parts
from reeltune.families.wan_fun.family import CONTROL_V1_1
from reeltune.memory import attention
from reeltune.memory.attention_trial import asked, soonest, tried
from reeltune.run.model import choose_family, encode_options, load_parts
from reeltune.sampling.sample import Setup
from reeltune.training.learner import learner_of
from reeltune.training.loss import training_loss

RATE = 1e-5


def recipe_of(checkpoint: Path, **changes: Any) -> Recipe:
    """As a cached run in bf16, recomputed, with one clip to a batch."""
    settings = {
        "pretrained_model_name_or_path": str(checkpoint),
        "train_mode": "control_ref",
        "cache_folder": "of which nothing is read",
        "cache_variants": 1,
        "mixed_precision": "bf16",
        "trained_weights": "bf16_stochastic",
        "gradient_checkpointing": True,
        "preview_count": 0,
    }
    return build({**settings, **changes})


def draw_of(clip: Shape) -> Draw:
    return Draw(0, clip, Crop(clip.height, clip.width, 0, 0), tuple(range(clip.frames)), 0, seed=0)


def encoded(clip: Shape, encoders: Encoders, device: torch.device) -> Encoded:
    """What VAE and encoders could have made of a clip with a control clip and a reference picture."""
    chance = torch.Generator(device).manual_seed(1)

    def values(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=chance, device=device)

    T, h, w = CONTROL_V1_1.geometry.latent(clip)

    def latents(frames: int) -> Posterior:
        return Posterior(values(CHANNELS, frames, h, w), values(CHANNELS, frames, h, w))

    cond: dict[str, Tensor | Posterior] = {
        "text": values(TEXT_TOKENS, encoders.text["d_model"]),
        "image": values(IMAGE_TOKENS, encoders.image["hidden_size"]),
        "control": latents(T),
        "ref": latents(1),
    }
    return Encoded(latents(T), cond)


class Step:
    """A full network is made on the device; one beneath adapters is read from its checkpoint, as a run reads it."""

    def __init__(self, recipe: Recipe, network: Network, scale: Scale):
        training = recipe.training
        self.recipe, self.engine = recipe, Engine(training.mixed_precision, deterministic=training.deterministic)
        attention.refuse_missing(training.attention, self.engine.device, self.engine.dtype)
        family, mode, objective = choose_family(recipe)
        parts = _parts(recipe, family, network, scale, self.engine.device)
        self.setup = Setup(family, mode, parts, objective, self.engine.autocast, encode_options(recipe))
        self.learner = learner_of(recipe, family, parts, self.engine, batch=1, accumulate=1)
        if (compiled := self.learner.network.compiled) is not None:
            compiled.begin(1, "x".join(map(str, scale.clip)))
        self.encoded, self.count = encoded(scale.clip, scale.encoders, self.engine.device), 0
        self.draws = [draw_of(scale.clip)]

    def choose_attention(self) -> str:
        """The kernel, which `auto` finds as in a run from a cache."""
        if (asked_for := self.recipe.training.attention) != attention.AUTO:
            return asked_for
        own, kernels = self.learner.network.attention, attention.candidates(self.engine.device.type)
        found = soonest(tried(asked(own.blocks, self._loss), kernels).passes_s)
        if found is None:
            return attention.AUTO
        own.prefer(attention.in_order(found, kernels))
        return f"{attention.AUTO}, {found}"

    def __call__(self, after: Callable[[str], object] = lambda _: None) -> Tensor:
        """The loss, still on the device. after: called with each of PHASES that is over."""
        self.count += 1
        with self.engine.same_bits():
            loss = self._loss()
            after("forward")
            self.learner.backward(loss.value, last=True)
            after("backward")
            self.learner.step(self.count, RATE)
            after("step")
        return loss.value.detach()

    def _loss(self) -> Loss:
        draws = [replace(draw, seed=self.count) for draw in self.draws]
        return training_loss(self.setup, self.learner.net, self.encoded, draws, self.recipe.loss)


def _parts(recipe: Recipe, family: Family, network: Network, scale: Scale, device: torch.device) -> Parts:
    if not recipe.adapter.rank:
        outline = networks.transformer(network, scale.encoders)
        dtype = torch.float32 if recipe.model.trained_weights == "fp32" else torch.bfloat16
        return Parts(networks.filled(outline, device, dtype), device=device)
    parts = load_parts(recipe, family, device, encoders=False)
    networks.fill(parts.net)
    return parts


def flops(network: Network, clip: Shape, encoders: Encoders) -> int:
    """Of a step, attention included; what is recomputed is not counted, as `mfu` in a run's metrics."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # whose products torch can count anywhere
        net = _faked(networks.transformer(network, encoders))
        x0, cond = settle(encoded(clip, encoders, torch.device("cpu")), [0], {})
        with FlopCounterMode(display=False) as counter:
            CONTROL_V1_1.denoise(net, x0, torch.full((1,), 500.0), cond)
    return 3 * counter.get_total_flops()


def _faked(net: nn.Module) -> nn.Module:
    for module in net.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape)))
    return net
