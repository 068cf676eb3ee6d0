"""Weights in safetensors files, each tensor read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from reeltune.core.reading import as_user_error
from reeltune.families import tensor_files


class Stored(Mapping[str, Tensor]):
    """The tensors of a file or folder by name, each read when asked for; `outline` has them on the meta device.

    Raises UserError for files that are missing or cannot be read.
    """

    def __init__(self, path: Path):
        self.outline = tensor_files.tensors_of(path, "meta")
        self._file = {name: file for file in tensor_files.files_of(path) for name in tensor_files.header_of(file)}

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        with as_user_error(file, "cannot be read"), safe_open(file, "pt", device="cpu") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)
