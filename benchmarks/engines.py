"""Each engine in two processes beside one alone, at equal global batch; its saves beside the disk; one file again.

Tiny networks on the CPU, over gloo, a core a process: what the engines cost here is overhead alone. On GPUs, whose
arithmetic is faster and whose exchange runs beside it, the shares are other ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from reeltune.families import weights
from reeltune.training.loop import train
from tests.distributed import processes
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

SHARDED = ("fsdp", *(("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()))
GROUP, STEPS, WARM_UP = 4, 16, 4
SMALL = {"width": 96, "heads": 4, "layers": 4}  # for the steps
LARGE = {"width": 512, "heads": 8, "layers": 8}  # for the files
BLOCK = 8 * 2**20  # bytes of a plain write


def run(model: Path, data: Path, folder: Path, engines: tuple[str, ...], **changes) -> dict[str, list[dict]]:
    """Engine ("alone" is one process) -> the rows of its metrics.jsonl."""
    folder.mkdir()
    settings = {"fix_sample_size": (64, 64), "held_out_share": 0.0, "checkpointing_steps": 10**6, **changes}
    recipes = {
        engine: recipe(
            model,
            data,
            folder / engine,
            engine=None if engine == "alone" else engine,
            train_batch_size=GROUP if engine == "alone" else GROUP // 2,
            **settings,
        )
        for engine in engines
    }
    if "alone" in recipes:
        torch.set_num_threads(1)
        assert train(recipes["alone"]) == 0
    shared = [made for engine, made in recipes.items() if engine != "alone"]
    started = processes.forked(shared, 2, folder, flushed=True)
    assert started.end(silence_seconds=900) == [0, 0], started.print()
    files = {engine: folder / engine / "metrics.jsonl" for engine in engines}
    return {engine: [json.loads(line) for line in file.read_text().splitlines()] for engine, file in files.items()}


def step_s(rows: list[dict]) -> float:
    """Median seconds of a step, reading and encoding left out."""
    steps = [row for row in rows if row["kind"] == "step"][WARM_UP:]
    return statistics.median(row["forward_backward_s"] + row["optimizer_s"] for row in steps)


def disk_mb_s(folder: Path, size_bytes: int) -> float:
    """Of a plain write of so many bytes in one file, to the disk, which has nothing else left to write."""
    block = os.urandom(BLOCK)
    os.sync()
    begin = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for _ in range(-(-size_bytes // BLOCK)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    (folder / "plain").unlink()
    return size_bytes / 1e6 / seconds


def consolidated(warm: Path, checkpoint: Path, out: Path) -> tuple[float, float]:
    """(megabytes of the checkpoint's weights per second, peak memory over the largest tensor); read back, compared."""
    words = [sys.executable, "-m", "benchmarks.export_peak", str(warm), str(checkpoint), str(out), "80GB"]
    exact = processes.environment(MALLOC_MMAP_THRESHOLD_="1000000")
    done = subprocess.run(words, env=exact, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    sizes = [4 * tensor.numel() for tensor in weights.peek(out).values()]  # as they are trained, in float32
    return sum(sizes) / 1e6 / told["seconds"], told["peak_bytes"] / max(sizes)


def main() -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data_set(folder / "data", clips=8, stills=0)
        small = tiny_checkpoint(folder / "small", "control_v1.1", **SMALL)
        large = tiny_checkpoint(folder / "large", "control_v1.1", **LARGE)
        rows = run(small, data, folder / "steps", ("alone", "ddp", *SHARDED), max_train_steps=STEPS, logging_steps=1)
        alone_s = step_s(rows["alone"])
        for engine in ("ddp", *SHARDED):
            found[f"step_{engine}"] = step_s(rows[engine]) / alone_s
            print(f"a step of {engine} in two processes: {step_s(rows[engine]):.3f} s, in one {alone_s:.3f} s")
        large_runs = partial(run, large, data, engines=("ddp", *SHARDED))
        rows = large_runs(folder / "files", max_train_steps=1)
        beside = large_runs(folder / "beside", max_train_steps=2, checkpointing_steps=1)
        for engine in ("ddp", *SHARDED):
            saved, first = (next(row for row in of[engine] if row["kind"] == "save") for of in (rows, beside))
            mb_s, plain_mb_s = saved["bytes"] / 1e6 / saved["seconds"], disk_mb_s(folder, saved["bytes"])
            found[f"save_s_{engine}"], found[f"save_ratio_{engine}"] = saved["blocked_seconds"], mb_s / plain_mb_s
            found[f"save_beside_s_{engine}"] = first["blocked_seconds"]
            print(
                f"a save of {engine}: {saved['bytes'] / 1e6:.0f} MB in {saved['seconds']:.2f} s, {mb_s:.0f} MB/s; "
                f"the plain disk {plain_mb_s:.0f} MB/s; in the background it takes {first['seconds']:.2f} s, of which "
                f"training waits {first['blocked_seconds']:.2f} s"
            )
        for engine in SHARDED:
            warm = folder / "steps" / engine / f"checkpoint-{STEPS}"
            mb_s, tensors = consolidated(warm, folder / "files" / engine / "checkpoint-1", folder / f"out-{engine}")
            found[f"export_mb_s_{engine}"], found[f"export_peak_{engine}"] = mb_s, tensors
            print(
                f"one file of {engine}'s checkpoint: {mb_s:.0f} MB/s, peak memory {tensors:.2f} of the largest tensor"
            )
    return found


if __name__ == "__main__":
    main()
