"""Two networks that make a clip together, each at its own noise levels: one that learns and the other one of the model,
or both of a run that trains both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.config.recipe import Recipe
from reeltune.diffusion.objective import Objective
from reeltune.families.spec import Family
from reeltune.families.tensor_files import notice
from reeltune.run.experts import own_part
from reeltune.run.model import load_other_expert, other_expert


@dataclass(frozen=True)
class OtherExpert:
    """Read when a clip is made first, and kept."""

    name: str  # high or low
    boundary: float  # timestep from which on high answers
    read: Callable[..., nn.Module]  # given `strength`, of the adapter
    path: str
    adapter: str | None = None  # in its weights
    strength: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, family: Family, device: torch.device) -> OtherExpert | None:
        """The expert beside the one that learns. family: of the network that learns. None for one that is alone; says
        so where another is meant to be.

        Raises UserError for weights of other_expert_path that are not there, or do not fit.
        """
        if family.expert is None or family.boundary is None:
            return None
        said, adapter = recipe.model.other_expert_path, recipe.model.other_expert_adapter
        other = other_expert(family, said)
        if other is None or other.expert is None:
            notice(
                f"{recipe.model.pretrained_model_name_or_path} holds the weights of expert {family.expert} alone: "
                "previews are made by it at all noise levels, and show less than both together would; give the other's "
                "as other_expert_path"
            )
            return None
        boundary = family.objective.timestep(torch.tensor(family.boundary)).item()
        if said is not None or adapter is not None:  # now, by names and shapes: it is read when a clip is made first
            load_other_expert(recipe, family, device, network=False)
        path = own_part(said, other.expert) or str(other.weights)
        read = partial(load_other_expert, recipe, family, device)
        return cls(other.expert, boundary, read, path, own_part(adapter, other.expert))

    @cached_property
    def net(self) -> nn.Module:
        return self.read(strength=self.strength).eval()

    def times(self, factor: float) -> OtherExpert:
        """This expert with its adapter so much stronger: read anew, unless that changes nothing."""
        return self if self.adapter is None or factor == 1 else replace(self, strength=self.strength * factor)

    @property
    def told(self) -> dict[str, Any]:
        """What the .json of a clip says of the other expert."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter, "strength": self.strength}
        return {"other_expert": {"name": self.name, "path": self.path, **adapter}}

    def answering(self, net: nn.Module, timestep_B: Tensor, *, write: bool) -> nn.Module | None:
        """The one that does there, by the first of the timesteps, which are all one while clips are made: `net`, that
        of the expert beside this one, or this one; None in place of it without `write`, where nobody looks."""
        if bool(timestep_B[0] >= self.boundary) != (self.name == "high"):
            return net
        return self.net if write else None


@dataclass(frozen=True)
class Half:
    """One of two networks that both learn."""

    objective: Objective  # of its own noise levels
    share: float  # of the levels of both
    net: nn.Module
    come: Callable[[], None]  # to where it computes; the other leaves


@dataclass(frozen=True)
class BothExperts:
    """The networks of a run that trains both, each of which makes clips at its own noise levels."""

    boundary: float  # timestep from which on high answers
    halves: Mapping[str, Half]  # of high and low

    @property
    def told(self) -> dict[str, Any]:
        """Nothing that the .json of a clip need say: all is of the run itself."""
        return {}

    def answering(self, net: nn.Module, timestep_B: Tensor, *, write: bool) -> nn.Module:
        """The network that answers there, as OtherExpert has it; all processes ask it alike."""
        half = self.halves["high" if timestep_B[0] >= self.boundary else "low"]
        half.come()
        return half.net
