"""`python -m benchmarks [NAME ...] [--write FILE]`: measures, prints what was reached beside its goal.

Exits with 1 if a goal is missed. `python -m benchmarks gpu` is a command of its own: benchmarks/gpu/command.py.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks import idle


class Goal(NamedTuple):
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("at most", self.most))
        return ", ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)

    def reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


FAMILIES = ("wan_fun", "easyanimate", "hunyuan_video", "cogvideox_fun")
UNTRAINED = ("wan2.1_t2v", "wan2.1_i2v", "wan2.2_a14b", "wan2.2_5b")  # more of the demo's networks
MODULES = (
    "data_read",
    "control",
    "loop",
    "start_up",
    "cache",
    "forecast",
    "idle",
    "engines",
    "memory",
    "optimizer",
    "encoding",
    "base_weights",
    "adapter_save",
)  # each has main() -> {name: number}
OPTIMIZERS = {"adamw": "AdamW", "8bit": "8-bit AdamW", "came": "CAME", "adafactor": "Adafactor"}
BASES = ("bf16", "fp8", "int8", "nf4")
SAVINGS = {
    "recompute_half": "half of the blocks recomputed",
    "recompute_all": "all blocks recomputed",
    "recompute_but_attention": "all blocks recomputed but attention over the clip",
    "recompute_but_products": "all blocks recomputed but attention over the clip and linear layers",
    "compiled": "blocks compiled, once they are",
    "recompute_all_compiled": "all blocks recomputed, compiled, over uncompiled ones",
    "recompute_but_products_compiled": "all blocks recomputed but those, compiled, over compiled ones",
    "offload": "activations offloaded",
    "recompute_and_offload": "all blocks recomputed, their inputs offloaded",
    "in_backward": "step in the backward pass, no clipping",
    "in_backward_clipped": "step in the backward pass, clipped",
    "swap": "blocks that do not learn swapped",
}
MEANING = {  # name: (what it is, goal)
    "read_256_ratio": ("clips read to 256 px, over bare decode and resize", Goal(least=0.85)),
    "read_512_ratio": ("clips read to 512 px, over bare decode and resize", Goal(least=0.85)),
    "read_256_per_core": ("clips per second and core, to 256 px", None),
    "read_512_per_core": ("clips per second and core, to 512 px", None),
    "read_256": ("clips per second on all cores, to 256 px", None),
    "read_512": ("clips per second on all cores, to 512 px", None),
    "control_canny_per_core": ("frames of 720p per second and core, edges drawn, decoded before", Goal(least=40)),
    "control_canny_ratio": ("the same over OpenCV's Canny alone, without hysteresis in time", None),
    "control_decode_per_core": ("the same frames decoded alone", None),
    "control_file_per_core": ("the same from clip to control clip: decoded twice, drawn, encoded, checked", None),
    "loop_ratio": ("our step, over a bare forward, backward and optimizer step", Goal(most=1.03)),
    "loop_ours_s": ("seconds of our step, reading and encoding left out", None),
    "loop_bare_s": ("seconds of the bare step", None),
    "scan_cold_s": ("seconds to scan 100,000 rows for the first time", None),
    "scan_warm_s": ("seconds to scan them again", Goal(most=1.0)),
    "scan_two_changed_s": ("seconds to scan them after two files changed", None),
    "first_step_s": ("seconds from the command to the first step, 100,000 rows scanned before", Goal(most=4.0)),
    **{
        f"cache_step_{family}_{side}": (f"cached step over live step, tiny {family}, {side} px", Goal(most=1.0))
        for family in FAMILIES
        for side in (64, 128)
    },
    "cache_write_ratio": ("encoding alone over filling a cache, in seconds", None),
    "cache_read_ratio": ("reading a cache at random over the plain disk", None),
    "cache_read_gb_s": ("gigabytes per second read from a cache", None),
    **{
        f"plan_rows_1e{power}_{unit}": (f"{words} to plan and count an epoch of 10^{power} rows", goal)
        for power, goals in ((4, (Goal(most=1), None)), (6, (Goal(most=60), Goal(most=1))))
        for unit, words, goal in zip(("s", "gb"), ("seconds", "gigabytes at most"), goals, strict=True)
    },
    **{
        f"plan_memory_{family}": (f"memory by plan over the allocator's, tiny {family}", Goal(least=0.95, most=1.05))
        for family in FAMILIES
    },
    **{
        f"memory_{weights}_{optimizer}{fused}": (
            f"bytes per trained parameter, {weights}, {words}{', step in the backward pass' if fused else ''}",
            None,
        )
        for weights in ("fp32", "bf16_stochastic")
        for optimizer, words in OPTIMIZERS.items()
        for fused in ("", "_in_backward")
    },
    **{
        f"memory_{unit}_{name}": (f"{words}: {what} of a step over those without", None)
        for name, words in SAVINGS.items()
        for unit, what in (("seconds", "seconds"), ("bytes", "bytes of activations"))
    },
    "optimizer_rounding_ratio": ("800 bf16 weights rounded in one piece, over one by one", None),
    "optimizer_foreach_ratio": ("AdamW's step by foreach over one by one, 800 weights on the CPU", None),
    "optimizer_fused_ratio": ("the same, fused, whose last bits are others on the CPU", None),
    "optimizer_norm_ratio": ("norm of 800 gradients by foreach over one by one on the CPU", None),
    "optimizer_bf16_ratio": ("AdamW's step of bf16 weights, rounded, over that of fp32 ones", None),
    **{
        f"encoding_{family}_{size}_{count}": (
            f"VAE of {family}, {size}: processor time of {count} clips together over that one by one",
            None,
        )
        for family in FAMILIES
        for size, count in (("small", 2), ("small", 4), ("large", 2))
    },
    **{f"base_weights_bytes_{kind}": (f"bytes per frozen parameter of a block, {kind}", None) for kind in BASES},
    **{
        f"base_weights_read_peak_{kind}": (
            f"own memory at most while a network is read to {kind}, over its bytes",
            None,
        )
        for kind in BASES[1:]
    },
    **{
        f"base_weights_error_{family}_{kind}": (
            f"relative error of the answers with {kind} weights, tiny {family}",
            None,
        )
        for family in (*FAMILIES, *UNTRAINED)
        for kind in BASES
    },
    "base_weights_held_out_fp32": ("held-out loss of the demo's network before training, fp32 weights", None),
    **{
        f"base_weights_{number}_{kind}": (what.format(kind), None)
        for kind in BASES
        for number, what in {
            "held_out": "what {} weights add to it, clip by clip",
            "band": "half of the 95 % band of that, {}",
        }.items()
    },
    **{
        f"adapter_save_{what}": (f"{what} of a whole network's checkpoint over an adapter's, rank 32", Goal(least=20))
        for what in ("bytes", "seconds")
    },
    **{
        name.format(engine): (what.format(engine), None)
        for engine in ("ddp", "zero2", "zero3", "fsdp")
        for name, what in {
            "step_{}": "step of {} in two processes over one alone, equal global batch, tiny, CPU: overhead only",
            "save_s_{}": "seconds that a save of {} blocks if waited for, two processes, a network of 33 M",
            "save_ratio_{}": "its bytes per second over the plain disk's",
            "save_beside_s_{}": "seconds that it blocks if written in the background",
            "export_mb_s_{}": "megabytes of fp32 weights per second from a checkpoint of {} to one file, read back",
            "export_peak_{}": "peak memory of that, in largest tensors",
        }.items()
    },
    **{f"idle_{n}": (f"share of {n} ranks' time spent waiting (simulated)", Goal(most=0.01)) for n in idle.RANKS},
    **{f"idle_apart_{n}": (f"the same, each of {n} drawing its own size", None) for n in idle.RANKS},
    **{
        f"repeats_{n}": (f"repeats among all samples of {n} ranks, 100 epochs of 200,000 clips", Goal(most=0.005))
        for n in idle.RANKS
    },
}


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "av", "numpy"))
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {versions}"


def table(found: dict[str, float]) -> str:
    lines = ["| what | measured | goal |", "|---|---:|---|"]
    for name, value in found.items():
        what, goal = MEANING[name]
        told = "" if goal is None else f"{goal}{'' if goal.reached(value) else ', missed'}"
        lines.append(f"| {what} | {value:.3g} | {told} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        return importlib.import_module("benchmarks.gpu.command").main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    names = f"of {', '.join(MODULES)}; all if left out. gpu, which takes words of its own, stands alone"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--write", type=Path, help="put the tables in this page; others there stay")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(MODULES))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(MODULES)}")
    names = arguments.names or MODULES
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[name] = importlib.import_module(f"benchmarks.{name}").main()
        if found[name]:
            print(f"\n{table(found[name])}\n")
    print(machine())
    if arguments.write:
        write(arguments.write, {name: table(numbers) for name, numbers in found.items() if numbers})
    goals = [(MEANING[name][1], value) for numbers in found.values() for name, value in numbers.items()]
    return int(any(goal is not None and not goal.reached(value) for goal, value in goals))


def write(page: Path, tables: dict[str, str]) -> None:
    """Puts the tables in their sections of the page, and leaves all else there as it is, other sections first."""
    told = page.read_text(encoding="utf-8") if page.exists() else HEAD.format(page)
    head, *there = re.split(r"^## ", told, flags=re.MULTILINE)
    head += "".join(f"## {text}" for text in there if text.partition("\n")[0] not in MODULES)
    sections = {title: text.strip() for title, _, text in (section.partition("\n") for section in there)}
    when = f"{date.today()}, {machine()}; load average of the last 15 minutes {os.getloadavg()[2]:.1f}."
    sections |= {name: f"{when}\n\n{told}" for name, told in tables.items()}
    known = [f"## {name}\n\n{sections[name]}\n" for name in MODULES if name in sections]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([head.strip() + "\n", *known]), encoding="utf-8")


HEAD = """\
# Benchmarks

`make bench` measures all of this; `python -m benchmarks NAME --write {}` one section.
"""


if __name__ == "__main__":
    sys.exit(main())
