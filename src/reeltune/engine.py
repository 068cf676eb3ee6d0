"""Devices, precision, processes. The only file that knows accelerate."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reeltune.errors import UserError


class Engine:
    """One per process. Wraps the trained network and its optimizer; everything else stays plain PyTorch.

    Raises UserError if the precision cannot run here, or if the launcher started several processes that
    accelerate does not see (they would each train alone).
    """

    def __init__(self, mixed_precision: str = "no", *, allow_tf32: bool = False):
        on_cpu = not torch.cuda.is_available()
        if on_cpu and mixed_precision == "fp16":
            raise UserError(
                "recipe", "mixed_precision is fp16, which needs a GPU and there is none here; use bf16 or no"
            )
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        AcceleratorState._reset_state()  # or a second run in this process would inherit the first one's precision
        some_unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # such as ref_conv without full_ref
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[some_unused])
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.accelerator.num_processes:
            raise UserError(
                "launch",
                f"{launched} processes were started but each sees {self.accelerator.num_processes}: they would train "
                "apart; start with accelerate launch --multi_gpu --num_processes N "
                "(and ACCELERATE_USE_CPU=true without a GPU)",
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def prepare(self, net: nn.Module, optimizer):
        """The network and optimizer to train with; the network autocasts in its own forward."""
        net = self.accelerator.prepare_model(net)
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer = self.accelerator.prepare_optimizer(optimizer)
        return net, optimizer

    def unwrap(self, net: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(net, keep_torch_compile=False)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def backward(self, loss: Tensor, net: nn.Module, *, last: bool) -> None:
        """Adds gradients; ranks exchange them only at the last micro-step of a step."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(net):
            self.accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scales gradients down to max_norm; returns their norm before that, still on the device."""
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, still on the device."""
        return value.detach() if self.world == 1 else self.accelerator.reduce(value.detach(), "mean")

    def gather(self, thing: Any) -> list:
        """The thing of each rank, on every rank; any picklable value."""
        return [thing] if self.world == 1 else gather_object([thing])

    def any(self, flag: bool) -> bool:
        """True if it is true on any rank."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def scaler_state(self) -> dict | None:
        """fp16's loss scale, part of an exact resume."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict | None) -> None:
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: the allocator's on a GPU, the process's on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place_in_launch() -> tuple[int, int, torch.device]:
    """(process, processes, device) by what launchers set, without joining the others: they need not run together."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    return rank, world, torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())


class Stopwatch:
    """Splits a step's time by kind of work without waiting for the device.

    On a GPU it leaves events in the stream and reads them when asked (at the logging interval); on the CPU
    it reads the clock.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float]] = [("", self._now())]

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on `name`."""
        self.marks.append((name, self._now()))

    def seconds(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds by name; on a GPU this waits until the step is done."""
        total = dict.fromkeys(names, 0.0)
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            if self.on_gpu:
                after.synchronize()
                total[name] += before.elapsed_time(after) / 1000
            else:
                total[name] += after - before
        return total


class FlopCount:
    """FLOPs of a training step of the network, counted by torch at the first step of each shape.

    Three times the forward pass, attention included: recomputed activations are not counted, so that
    `mfu` is utilisation by the model, not by the hardware (https://arxiv.org/abs/2204.02311, appendix B).
    """

    def __init__(self, wanted: bool):
        self.wanted = wanted
        self.known: dict[Any, int] = {}

    @contextlib.contextmanager
    def forward(self, shape: Any) -> Iterator[None]:
        """Around a forward pass of that shape."""
        if not self.wanted or shape in self.known:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.known[shape] = 3 * counter.get_total_flops()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 / fp16 FLOP/s of a known GPU, from NVIDIA's data sheets; None elsewhere."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


# Dense (no sparsity) bf16 tensor-core figures of NVIDIA's data sheet for each; the more specific name first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
