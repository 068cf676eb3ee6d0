"""`python -m benchmarks gpu`: all that one card can prove, in one command, as far as its budget reaches.

Writes gpu.json after each row; its figures are of the GPU alone. Where there is none, the same code is rehearsed on the
CPU at tiny sizes, says so, and writes gpu_rehearsal.json. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.report import Part, Report, Row, say
from benchmarks.gpu.sizes import FULL, TINY, Scale

PARTS = {  # part -> share of the budget; in this order, and what one leaves is the next one's
    "ceilings": 0.06,
    "steps": 0.42,
    "plan": 0.01,
    "exact": 0.18,
    "parity": 0.01,
    "encoding": 0.15,
    "saving": 0.06,
    "processes": 0.11,
}
ABOUT = "All that one card can prove, in one command. Without a GPU it rehearses on the CPU, and says so."
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "av", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=ABOUT)
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of gpu.json [this one]")
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds for all of it [480]")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU at tiny sizes, as where there is no GPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--ways", type=int, metavar="N", help="of the part steps the first N rows [all]")
    arguments = parser.parse_args(argv)
    rehearse = arguments.rehearse or not torch.cuda.is_available()
    if rehearse and torch.cuda.is_available():
        parser.error("--rehearse is for a machine without a GPU: set CUDA_VISIBLE_DEVICES= before the command")
    scale, device = (TINY, torch.device("cpu")) if rehearse else (FULL, torch.device("cuda", 0))
    file = arguments.out / ("gpu_rehearsal.json" if rehearse else "gpu.json")
    report = Report(file, about(scale, device), budget_s=arguments.budget)
    say("\n".join(f"{key}: {value}" for key, value in report.about.items()))
    with tempfile.TemporaryDirectory(prefix="reeltune-gpu-") as folder, ExitStack() as held:
        run(report, scale, device, Path(folder), arguments.only, arguments.ways, held)
    conclude(report, scale)
    return int(bool(report.failures))


def about(scale: Scale, device: torch.device) -> Row:
    found: Row = {"figures": scale.note or "of the GPU", "at": datetime.now(UTC).isoformat(timespec="seconds")}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"gpu": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return found | {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not here"


def run(
    report: Report,
    scale: Scale,
    device: torch.device,
    folder: Path,
    only: Sequence[str],
    ways: int | None,
    held: ExitStack,
) -> None:
    """Every part is imported within itself: what one lacks is no other's matter."""
    state: dict = {}
    checkpoints = {name: folder / "checkpoints" / name for name in scale.networks}
    first = next(iter(scale.networks))

    def prepare() -> None:
        from benchmarks.gpu import networks
        from benchmarks.gpu.forecast import Forecast

        for name, network in scale.networks.items():
            networks.checkpoint(checkpoints[name], network, scale.encoders)
        if {"steps", "plan"} <= {*only}:
            state["forecast"] = forecast = Forecast(scale, folder / "checkpoints", folder, ways)
            held.callback(forecast.close)

    def ceilings(part: Part) -> None:
        from benchmarks.gpu.ceilings import measure

        measure(part, scale, device)

    def steps(part: Part) -> None:
        from benchmarks.gpu.steps import against_product, measure

        measure(part, scale, device, checkpoints, ways)
        against_product(part, report.parts.get("ceilings", {}).get("rows", []))

    def plan(part: Part) -> None:
        from benchmarks.gpu.forecast import compare

        compare(part, state["forecast"], report.parts["steps"]["rows"], device)

    def exact(part: Part) -> None:
        from benchmarks.gpu.exact import measure

        measure(part, folder / "exact")

    def parity(part: Part) -> None:
        from benchmarks.gpu.goldens import measure

        measure(part, device)

    def encoding(part: Part) -> None:
        from benchmarks.gpu.encoding import measure

        measure(part, scale, device, checkpoints[first], scale.networks[first])

    def saving(part: Part) -> None:
        from benchmarks.gpu.saving import measure

        measure(part, scale, device, checkpoints[first], scale.networks[first])

    def processes(part: Part) -> None:
        from benchmarks.gpu.processes import measure

        measure(part, device)

    with report.part("prepare", 0.0):
        prepare()
    works: dict[str, Callable[[Part], None]] = {work.__name__: work for work in (ceilings, steps, plan, exact, parity)}
    works |= {work.__name__: work for work in (encoding, saving, processes)}
    shares = {name: share for name, share in PARTS.items() if name in only}
    for name, share in shares.items():
        with report.part(name, share / sum(shares.values())) as part:
            works[name](part)


def conclude(report: Report, scale: Scale) -> None:
    from benchmarks.gpu.page import page

    say("\n" + page(report))
    for name in report.failures:
        say(f"FAILED: {name}")
    say(f"{report.file} is written; {scale.note or 'its figures are of this GPU'}")
