"""The model that an adapter changes: its parameters by released name, each read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from reeltune import families
from reeltune.checkpoint.folder import their_weights
from reeltune.config.recipe import Model
from reeltune.families import configs, weights
from reeltune.families.spec import check_expert
from reeltune.families.stored import Stored
from reeltune.run.experts import own_part


class Base(Mapping[str, Tensor]):
    """The parameters in a model's folder, or in other weights for it, by released name; `outline` has them on the meta
    device.

    expert: whose weights, of a model of two networks; left out, it has names and shapes alone, which are those of both.
    Raises UserError for a folder that holds no model that is known.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config_path: str | None = None,
        transformer_path: str | None = None,
        expert: str | None = None,
    ):
        self.family = families.find(model, config_path=config_path)
        self._whose = transformer_path or expert or not self.family.experts
        if expert is not None:
            self.family = check_expert(self.family, expert)
        own = self.family.weights or their_weights(Path(model))
        self._stored = Stored(own if transformer_path is None else weights.saved_transformer(transformer_path))
        names = {id(tensor): name for name, tensor in self._stored.outline.items()}
        self.config = configs.read_config(own)
        ours = self.family.from_released(dict(self._stored.outline), self.config)
        self.outline = self.family.to_released(ours, self.config)
        self._names = {released: names[id(tensor)] for released, tensor in self.outline.items()}

    def __getitem__(self, name: str) -> Tensor:
        if not self._whose:
            check_expert(self.family, None)
        return self._stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def base_of(model: Model) -> Base:
    """The Base of a recipe's model. Raises UserError as Base."""
    return Base(
        model.pretrained_model_name_or_path,
        config_path=model.config_path,
        transformer_path=own_part(model.transformer_path, model.expert),
        expert=model.expert,
    )
