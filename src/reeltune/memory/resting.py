"""What a device has no room for while something else learns there: it waits in the CPU's memory, all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from reeltune.memory.blocks import to_device, to_host


class Resting:
    """Tensors that leave the device together, and come back to it.

    tensors: gives all of them, and whether each may have changed since it came; asked whenever they leave. Each keeps
    its place in the CPU's memory, page-locked, while it is away from there, so that what did not change is not sent.
    Tensors that were in the CPU's memory anyway, as blocks_to_swap and some optimizers have them, stay there.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[tuple[Tensor, bool]]],
        device: torch.device,
        *,
        to_host: Callable[[Tensor], Tensor] = to_host,
        to_device: Callable[[Tensor, torch.device], Tensor] = to_device,
    ):
        self._tensors, self._device, self._to_host, self._to_device = tensors, device, to_host, to_device
        self._homes: dict[int, tuple[Tensor, Tensor]] = {}  # by id: what is away, or was, and where
        self.is_away = False

    def leave(self) -> None:
        """Returns once all has arrived in the CPU's memory."""
        if self.is_away:
            return
        before, self._homes = self._homes, {}
        for tensor, may_have_changed in self._tensors():
            if tensor.device != self._device or id(tensor) in self._homes:
                continue
            _, home = before.get(id(tensor), (tensor, None))
            if home is None or home.shape != tensor.shape or home.dtype != tensor.dtype:
                home = self._to_host(tensor.data)
            elif may_have_changed:
                home.copy_(tensor.data, non_blocking=True)
            tensor.data = home
            self._homes[id(tensor)] = tensor, home
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self.is_away = True

    def come(self) -> None:
        if not self.is_away:
            return
        for tensor, home in self._homes.values():
            tensor.data = self._to_device(home, self._device)
        self.is_away = False
