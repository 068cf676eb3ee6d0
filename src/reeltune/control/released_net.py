"""Networks of which a release is one file of weights, and the size of the pictures that they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from reeltune.control.device import require_device
from reeltune.core.errors import UserError
from reeltune.core.reading import absent, few
from reeltune.families.weights import differences, fit, read

# controlnet-aux's detect_resolution, with which the released controls were made: of the shorter side.
SIDE_PX = 512
STEP_PX = 64  # of both sides (controlnet-aux, resize_image)
MOST_PX = 4 * SIDE_PX  # of the longer side: of a banner of 1:40 a frame would take 20 GB
Net = TypeVar("Net", bound=nn.Module)


def open_net(make: Callable[[], Net], given: Path | None, names: Sequence[str], device: str) -> tuple[Net, Path]:
    """(a network with the weights of a file, that file). given: the file, or the folder that has it by one of `names`.

    Tensors alone are read, never code. Raises UserError for a file that is not there, or is another network's.
    """
    file = _file(given, names)
    require_device(device)
    with torch.device("meta"):
        net = make()
    state = read(file)
    if strange := differences(net.state_dict(), state):
        count = f"{len(strange)} of its tensors are not those of {names[0]}"
        raise UserError(str(file), [f"{count}; {_wanted(names)}", *few(strange, 4)])
    fit(net, state, str(file), torch.float32, device)
    return net.to(device).requires_grad_(False).eval(), file


def _wanted(names: Sequence[str]) -> str:
    return f"give the released file {' or '.join(names)}, or its folder"


def _file(given: Path | None, names: Sequence[str]) -> Path:
    wanted = _wanted(names)
    if given is None:
        raise UserError("detector", f"no weights are named; {wanted}")
    if given.is_file():
        return given
    if not given.is_dir():
        raise UserError(str(given), f"{absent(given)}; {wanted}")
    there = [given / name for name in names if (given / name).is_file()]
    if not there:
        raise UserError(str(given), f"has none of these; {wanted}")
    return there[0]


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that a picture is brought to: shorter side SIDE_PX, both in steps of STEP_PX."""
    shorter, longer = sorted((height, width))
    scale = min(SIDE_PX / shorter, MOST_PX / longer)
    tall, wide = (max(round(side * scale / STEP_PX), 1) * STEP_PX for side in (height, width))
    return tall, wide


def shown(rgb_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 H W 3 of that height and width, as controlnet-aux makes it: by area, or Lanczos where it grows."""
    grows = min(size) > min(rgb_HW3.shape[:2])
    return cv2.resize(rgb_HW3, size[::-1], interpolation=cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA)


def planes(rgb_HW3: np.ndarray, device: str) -> Tensor:
    """float32 1 3 H W, 0 to 255."""
    return torch.from_numpy(rgb_HW3).to(device).permute(2, 0, 1)[None].float()
