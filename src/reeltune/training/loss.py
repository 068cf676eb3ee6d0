"""The loss of an encoded batch, by the recipe's settings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from reeltune.config import recipe
from reeltune.core.types import Draw, Encoded
from reeltune.diffusion.loss import Loss, diffusion_loss
from reeltune.sampling.sample import Setup


def training_loss(setup: Setup, net: nn.Module, encoded: Encoded, draws: Sequence[Draw], settings: recipe.Loss) -> Loss:
    """The loss of a micro-step. net: what is trained, perhaps wrapped; it autocasts by itself. draws: of the samples of
    `encoded`, in order."""
    return diffusion_loss(
        setup.family.denoise,
        net,
        setup.objective,
        encoded,
        setup.parts.null,
        [draw.seed for draw in draws],
        [draw.stratum for draw in draws],
        motion_sub_loss_ratio=settings.motion_sub_loss_ratio if settings.motion_sub_loss else None,
        loss_outlier_threshold=settings.loss_outlier_threshold,
    )
