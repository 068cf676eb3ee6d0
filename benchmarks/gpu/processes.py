"""NCCL with one process under DDP and FSDP, started by torchrun: that it exchanges and trains."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu.report import Part

NEAR = 2e-2  # of the losses: FSDP computes blocks in bf16 of weights that autocast would cast
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
MODULE = "benchmarks.gpu.one_process"


def measure(part: Part, device: torch.device) -> None:
    for wrapper in ("ddp", "fsdp"):
        name = f"torchrun, one process, {wrapper}"
        with part.attempt(name):
            part.row(name, **run([*TORCHRUN, "-m", MODULE, wrapper], device, timeout_s=max(part.left_s(), 60)))


def run(words: list[str], device: torch.device, *, timeout_s: float) -> dict[str, Any]:
    """Raises RuntimeError for a launch that fails, or does not train as without a wrapper."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return judged(done.stdout, device)


def judged(printed: str, device: torch.device) -> dict[str, Any]:
    """printed: by MODULE. Raises RuntimeError where that did not train as without a wrapper."""
    told = json.loads(printed.splitlines()[-1])
    expected = "nccl" if device.type == "cuda" else "gloo"
    apart = [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(told["losses"], told["plain"], strict=True)]
    if told["backend"] != expected or told["sum"] != 2**20 or not all(far <= NEAR for far in apart):
        raise RuntimeError(f"it did not train as without a wrapper: {told}")
    return {"backend": told["backend"], "losses_apart": max(apart), "step_s": told["step_s"]}
