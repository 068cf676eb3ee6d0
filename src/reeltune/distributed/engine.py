"""Devices, precision, processes. The only file that uses accelerate."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler, gather_object
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import deterministic as fills
from torch.utils.flop_counter import FlopCounterMode

from reeltune.core.errors import UserError
from reeltune.distributed import fsdp, zero
from reeltune.distributed.ddp import Direct
from reeltune.distributed.fsdp_step import OnShards
from reeltune.distributed.launch import START, EngineName, Parallelism, place, refuse_left_over
from reeltune.distributed.zero import Zero
from reeltune.memory.blocks import move

DTYPES = {  # by the names in recipes and flags
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Within, processes that wait for others in vain end in words."""
    try:
        yield
    except RuntimeError as missing:  # gloo has no error of its own
        if not isinstance(missing, torch.distributed.DistError) and "connectFullMesh" not in str(missing):
            raise
        world, where = (os.environ.get(name) for name in ("WORLD_SIZE", "MASTER_ADDR"))
        raise UserError(
            "launch",
            f"{world} processes were to meet at {where} and did not within rank_timeout_seconds + 60 "
            f"({str(missing).splitlines()[0]}); start as many as each is told of: {START}",
        ) from missing


class Engine:
    """One per process. Wraps the trained network and its optimizer; everything else stays plain PyTorch.

    Raises UserError if the precision cannot run here, or if the launcher started several processes that
    accelerate does not see (they would each train alone).
    """

    def __init__(
        self,
        mixed_precision: str = "no",
        *,
        allow_tf32: bool = False,
        deterministic: bool = False,
        on_cpu: bool = False,
        parallelism: Parallelism | None = None,
        rank_timeout_seconds: float = 1800,
    ):
        refuse_left_over()
        on_cpu = on_cpu or not torch.cuda.is_available()
        if on_cpu and mixed_precision == "fp16":
            raise UserError(
                "recipe", "mixed_precision is fp16, which needs a GPU and there is none here; use bf16 or no"
            )
        choose_kernels(allow_tf32=allow_tf32, deterministic=deterministic)
        # Or a second run in this process would inherit the first one's precision and, where no group holds it, device.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        patience = timedelta(seconds=rank_timeout_seconds + 60)
        handlers: list[KwargsHandler] = [InitProcessGroupKwargs(timeout=patience)]
        with _meeting():
            self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=handlers)
        _, launched = place()
        if launched != self.world:
            raise UserError(
                "launch",
                f"{launched} processes were started but each sees {self.world}: they would train apart; {START}",
            )
        self.parallelism = parallelism or Parallelism()
        if self.world % self.context:
            raise UserError(
                "launch",
                f"context_parallel is {self.context}, of which the number of processes, {self.world}, is no multiple; "
                + START,
            )
        # Checkpoints are agreed on over the CPU, beside what the devices are doing, and nothing else meanwhile. Without
        # shares too: processes that were told of different engines must come as far as to compare that.
        new_group: Callable[..., Any] = torch.distributed.new_group  # its type has what it gives to outsiders too
        with _meeting():  # some may have been told of more processes than these
            self.cpu_group: ProcessGroup | None = (
                new_group(timeout=patience, backend="gloo") if self.world > 1 else None
            )
        self.dtype = DTYPES[mixed_precision]

    @property
    def device(self) -> torch.device:
        """A GPU with its number: accelerate names the only one without, which torch.cuda.set_device refuses."""
        device = self.accelerator.device
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def context(self) -> int:
        """Processes, next to each other, that have the same samples and share their tokens."""
        return self.parallelism.context

    @property
    def place(self) -> tuple[int, int]:
        """(which samples this process has, how many processes have others)."""
        return self.rank // self.context, self.world // self.context

    def context_mesh(self) -> DeviceMesh:
        """The mesh that diffusers wants: its dimension `ulysses` is the processes of a clip."""
        shape = self.world // self.context, 1, self.context
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def name(self) -> EngineName:
        """One process has nothing to shard."""
        return self.parallelism.engine if self.world > 1 else "ddp"

    @property
    def sharded(self) -> bool:
        """Whether no process has all of the optimizer's state."""
        return self.name != "ddp"

    @property
    def runs_together(self) -> bool:
        """Whether the network answers only if all processes ask it."""
        return self.name in ("zero3", "fsdp") or self.context > 1

    def shard(self, net: nn.Module, blocks: tuple[str, ...], *, swapped: Sequence[nn.Module] = ()) -> nn.Module:
        """The network, which now autocasts in its own forward; `prepare` follows, once it has an optimizer.

        blocks: class names to shard by, where the launcher gave none. swapped: modules that stay in the CPU's memory.
        """
        if not self.sharded:
            move(net, self.device, besides=swapped)
        net = self.accelerator.prepare_model(net, device_placement=False, evaluation_mode=True)
        if self.name == "fsdp":
            fsdp.shard(
                net,
                self.parallelism.blocks or blocks,
                device=self.device,
                world=self.world,
                dtype=self.dtype,
                keep_gathered=self.parallelism.keep_gathered,
                offload=self.parallelism.offload,
            )
        return net

    def prepare(self, net: nn.Module, optimizer: Any, *, batch: int, accumulate: int, max_norm: float) -> Direct | Zero:
        """What steps the network. batch: samples of this process in a micro-step, of which a step has `accumulate`."""
        if self.name == "fsdp":
            return OnShards(self.accelerator, net, optimizer)
        if self.name not in ("zero2", "zero3"):
            return Direct(self.accelerator, net, optimizer, ddp=self.name == "ddp" and self.world > 1)
        config = zero.settings(
            self.parallelism.deepspeed or {},
            stage=int(self.name[-1]),
            offload=self.parallelism.offload,
            bf16=self.dtype == torch.bfloat16,
            batch=batch,
            accumulate=accumulate,
            max_norm=max_norm,
        )
        return Zero(net, optimizer, config)

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, still on the device."""
        return value.detach() if self.world == 1 else self._reduce(value.detach(), "mean")

    def gather(self, thing: Any) -> list:
        """The thing of each rank, on every rank; any picklable value."""
        return [thing] if self.world == 1 else gather_object([thing])

    def of_samples(self, thing: Any) -> list:
        """What `gather` gives, but of one process where several have the same samples."""
        return self.gather(thing)[:: self.context]

    def first(self, thing: Any) -> Any:
        """What rank 0 has, on every rank."""
        return self.gather(thing)[0]

    def give_from(self, rank: int, tensor: Tensor) -> None:
        """Puts the bits of that process's tensor into all others', wherever they lie."""
        if self.world > 1:
            there = tensor.detach().cpu().contiguous()
            torch.distributed.broadcast(there.view(-1).view(torch.uint8), rank, group=self.cpu_group)
            tensor.copy_(there)

    @contextlib.contextmanager
    def same_bits(self) -> Iterator[None]:
        """Holds what trains to deterministic kernels, if these are asked for. Only if torch has to refuse what has
        none, attention sums up gradients in a fixed order; where it may warn, it does not (pytorch,
        aten/src/ATen/native/transformers/cuda/ attention_backward.cu). Raises UserError for an operation without such a
        kernel."""
        if not torch.are_deterministic_algorithms_enabled():
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise UserError(
                "recipe",
                f"deterministic is true, and torch {torch.__version__} has no such kernel for what trains "
                f"({str(error).splitlines()[0]}); set deterministic to false",
            ) from error
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def any(self, flag: bool) -> bool:
        """True if it is true on any rank."""
        if self.world == 1:
            return flag
        return bool(self._reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    def _reduce(self, value: Tensor, how: str) -> Tensor:
        reduced: Any = self.accelerator.reduce(value, how)  # of whatever type it was given
        return reduced

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def main_first(self) -> contextlib.AbstractContextManager:
        """What is inside is done by rank 0, then by the others."""
        return self.accelerator.main_process_first()

    def scaler_state(self) -> dict | None:
        """fp16's loss scale, part of an exact resume."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, state: dict | None) -> None:
        if state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    @property
    def device_bytes(self) -> int | None:
        """All of a GPU's memory."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.device).total_memory

    def peak_memory_bytes(self) -> int:
        """The most memory so far: the allocator's on a GPU, the process's on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_kernels(*, allow_tf32: bool = False, deterministic: bool = False) -> None:
    """allow_tf32: for products of fp32 matrices, and for convolutions, which torch computes in TF32 unless it is told
    not to. deterministic: of an operation that has no kernel with the same bits each time, torch warns, outside of
    `Engine.same_bits`. Before the first matrix product (https://docs.pytorch.org/docs/stable/notes/randomness.html)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports torch's whole compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    fills.fill_uninitialized_memory = False  # pyright: ignore  # nothing reads it, and it takes time


def place_in_launch() -> tuple[int, int, torch.device]:
    """(process, processes, device) by what launchers set, without joining the others: they need not run together.

    Raises UserError as `place`.
    """
    rank, world = place()
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
        self.marks: list[tuple[str, Any]] = [("", self._now())]  # (what was done until then, event or seconds)

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

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.known: dict[Any, int] = {}

    @contextlib.contextmanager
    def forward(self, shape: Any) -> Iterator[None]:
        """Counts a forward pass of that shape, entered around it."""
        if not self.enabled or shape in self.known:
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
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
