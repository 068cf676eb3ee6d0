"""The one of two networks that does not learn: it answers at the noise levels of its own when clips are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.config.recipe import Recipe
from reeltune.families.spec import Family
from reeltune.families.tensor_files import notice
from reeltune.run.model import load_other_expert, other_expert


@dataclass(frozen=True)
class OtherExpert:
    """Read when a clip is made first, and kept."""

    name: str  # high or low
    boundary: float  # timestep from which on high answers
    read: Callable[[], nn.Module]
    path: str

    @classmethod
    def of(cls, recipe: Recipe, family: Family, device: torch.device) -> OtherExpert | None:
        """family: of the network that learns. None for one that is alone; says so where another is meant to be.

        Raises UserError for weights of other_expert_path that are not there, or do not fit.
        """
        if family.expert is None or family.boundary is None:
            return None
        said = recipe.model.other_expert_path
        other = other_expert(family, said)
        if other is None or other.expert is None:
            notice(
                f"{recipe.model.pretrained_model_name_or_path} holds the weights of expert {family.expert} alone: "
                "previews are made by it at all noise levels, and show less than both together would; give the other's "
                "as other_expert_path"
            )
            return None
        boundary = family.objective.timestep(torch.tensor(family.boundary)).item()
        if said is not None:  # now, by names and shapes alone: it is read when a clip is made first
            load_other_expert(recipe, family, device, network=False)
        path = said or str(other.weights)
        return cls(other.expert, boundary, partial(load_other_expert, recipe, family, device), path)

    @cached_property
    def net(self) -> nn.Module:
        return self.read().eval()

    @property
    def told(self) -> dict[str, Any]:
        """Of a clip's .json."""
        return {"other_expert": {"name": self.name, "path": self.path}}

    def answers(self, timestep_B: Tensor) -> bool:
        """Whether it does there, by the first of the timesteps, which are all one while clips are made."""
        return bool(timestep_B[0] >= self.boundary) == (self.name == "high")
