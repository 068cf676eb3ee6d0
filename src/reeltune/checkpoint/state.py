"""What a checkpoint holds, by released name, whichever engine wrote it; read by whichever engine goes on from it.

Names of tensors: weights/NAME, optimizer/NAME/KEY, average/NAME.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.adapters import saved
from reeltune.checkpoint.folder import ADAPTER, SHARES, is_adapter, is_shared, parts, weights_in
from reeltune.core.errors import refuse
from reeltune.core.reading import as_user_error, brief, read_table
from reeltune.distributed import sharded_io
from reeltune.distributed.ddp import numbers
from reeltune.distributed.sharded_io import COPY, Piece
from reeltune.families import weights

OUTLINE = "outline.json"  # beside the shares: shapes, and numbers of the optimizer's state


def has_average(checkpoint: Path) -> bool:
    """Whether it keeps a moving average of what it keeps, each part of it if it has parts."""
    if both := parts(checkpoint):
        return all(map(has_average, both.values()))
    if is_shared(checkpoint):
        return any(name.startswith("average/") for name in Shared(checkpoint).sizes)
    if is_adapter(checkpoint):
        return (checkpoint / f"{ADAPTER}_ema").is_dir()
    return weights.has_weights(checkpoint / "transformer_ema")


class Shared:
    """A checkpoint that several processes wrote."""

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint / SHARES
        self._metadata = sharded_io.metadata_of(self.folder)
        self.sizes = sharded_io.sizes(self._metadata)
        outline = read_table(self.folder / OUTLINE, COPY)
        with as_user_error(self.folder / OUTLINE, "is damaged", COPY):
            self.shapes: dict[str, list[int]] = dict(outline["shapes"])
            self._scalars: dict[str, dict[str, float]] = dict(outline["scalars"])
            if not all(isinstance(number, int | float) for of in self._scalars.values() for number in of.values()):
                raise ValueError("a number of the optimizer's state is none")
            for name, shape in self.shapes.items():
                if min(shape, default=0) < 0 or self.sizes[f"weights/{name}"][0] != math.prod(shape):
                    raise ValueError(f"{name} has shape {brief(shape)}")
        self._keys: dict[str, list[str]] = {}
        for name in self.sizes:
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                of, _, key = rest.rpartition("/")
                self._keys.setdefault(of, []).append(key)

    @staticmethod
    def write_outline(
        partial: Path, shapes: Mapping[str, Sequence[int]], scalars: Mapping[str, Mapping[str, float]]
    ) -> None:
        (partial / SHARES / OUTLINE).write_text(json.dumps({"shapes": shapes, "scalars": scalars}) + "\n")

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def keys(self, name: str) -> list[str]:
        """The keys of the weight's optimizer state that are tensors of its shape."""
        return self._keys.get(name, [])

    def scalars(self, name: str) -> dict[str, float]:
        """The values in the weight's optimizer state that are single numbers."""
        return self._scalars.get(name, {})

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Reads these pieces, in place. Raises UserError naming what is missing, or is of another size."""
        sharded_io.read(self.folder, pieces, self._metadata)

    def fill_network(self, net: nn.Module, names: Mapping[str, str]) -> None:
        """Reads the named weights of a network, in place. names: ours -> released. Raises as `fill`."""
        weights = dict(net.named_parameters())
        self.fill(sharded_io.whole(f"weights/{released}", weights[name]) for name, released in names.items())

    def weights(self, *, average: bool = False) -> Weights:
        """Weights by released name; with `average` the moving average in place of those that have one."""
        labels = {name: f"average/{name}" for name in self.shapes if average and f"average/{name}" in self}
        return Weights(self, {name: labels.get(name, f"weights/{name}") for name in self.shapes})


class Weights(Mapping[str, Tensor]):
    """Weights of a sharded checkpoint, each read whole when it is asked for; `outline` has them on the meta device."""

    def __init__(self, shared: Shared, labels: Mapping[str, str]):
        self._shared, self._labels = shared, labels
        self.outline = {name: self._empty(name, "meta") for name in labels}

    def _empty(self, name: str, device: str) -> Tensor:
        _, dtype = self._shared.sizes[self._labels[name]]
        return torch.empty(self._shared.shapes[name], dtype=dtype, device=device)

    def __getitem__(self, name: str) -> Tensor:
        kept = self._empty(name, "cpu")
        self._shared.fill([sharded_io.whole(self._labels[name], kept)])
        return kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)


class Whole:
    """A checkpoint that one process wrote, read like a Shared one.

    state: as `folder.load` gives it. learning: released names, in the order of the optimizer's parameters. names: ours
    -> released.
    """

    def __init__(self, checkpoint: Path, state: Mapping[str, Any], learning: Sequence[str], names: Mapping[str, str]):
        self.where = str(checkpoint)
        by_place: dict[int, dict[str, Any]] = state["optimizer"]["state"]
        self._state = {learning[i]: values for i, values in by_place.items()}
        stored = saved.read(checkpoint / ADAPTER) if is_adapter(checkpoint) else weights.read(weights_in(checkpoint))
        self._tensors = {f"weights/{name}": weight for name, weight in stored.items()}
        for name, values in self._state.items():
            self._tensors |= {f"optimizer/{name}/{key}": values[key] for key in self._elementwise(name)}
        for name, average in (state["average"] or {}).items():
            self._tensors[f"average/{names[name]}"] = average

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _elementwise(self, name: str) -> list[str]:
        """The keys of the weight's optimizer state that are tensors of its shape."""
        shape = self._tensors[f"weights/{name}"].shape
        state = self._state.get(name, {})
        return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]

    def keys(self, name: str) -> list[str]:
        return self._elementwise(name)

    def scalars(self, name: str) -> dict[str, float]:
        return numbers(self._state.get(name, {}))

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Reads these pieces, in place. Raises UserError naming what is missing."""
        pieces = list(pieces)
        refuse(self.where, [f"{piece.name} is missing" for piece in pieces if piece.name not in self._tensors])
        for piece in pieces:
            stored_N = self._tensors[piece.name].reshape(-1)
            piece.values_N.copy_(stored_N[piece.start : piece.start + piece.values_N.numel()])
