"""What a frozen base in 8 or 4 bits takes and what it does to a network's answers: `python -m benchmarks.base_weights`.

Bytes are of storages, of a block as wide as Wan2.1-Fun-1.3B's, all of its tensors counted. Errors are of the demo's
tiny networks, of which that of wan_fun alone is trained: norm of the answers' difference from those of fp32 weights,
over the norm. The held-out loss is the demo's, clip by clip beside that of fp32 weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.peak import Peak
from reeltune import families
from reeltune.demo.clips import write_data_set
from reeltune.demo.main import FAMILIES, of_untrained, recipe_of
from reeltune.diffusion.loss import settle
from reeltune.families import weights
from reeltune.families.spec import Family
from reeltune.memory.quantized import Quantisation
from reeltune.memory.size import size_bytes
from reeltune.run.data import gather
from reeltune.run.model import choose_family, encode_options
from reeltune.sampling.sample import Setup
from reeltune.sampling.validate import HeldOut
from tests.families.tiny_wan import network, tiny_checkpoint

KINDS = ("fp8", "int8", "nf4")
WIDTH, HEADS = 1536, 12
NOISE = 0.5  # level at which the network is asked


def held_bytes(net: nn.Module) -> int:
    return size_bytes([*net.parameters(), *net.buffers()])


def bytes_per_weight() -> dict[str, float]:
    plain = network("control_v1.1", width=WIDTH, heads=HEADS, layers=1)
    state, count = plain.state_dict(), sum(weight.numel() for weight in plain.blocks.parameters())
    found = {}
    for kind in ("bf16", *KINDS):
        with torch.device("meta"):
            net = network("control_v1.1", width=WIDTH, heads=HEADS, layers=1)
        coarse = None if kind == "bf16" else Quantisation(kind, ("WanTransformerBlock",))
        weights.fit(net, state, "here", torch.bfloat16, "cpu", coarse)
        found[f"base_weights_bytes_{kind}"] = held_bytes(net.blocks) / count
    return found


def read_peaks(folder: Path) -> dict[str, float]:
    """Own memory at most while a network is read, over what it then has."""
    model = tiny_checkpoint(folder, "control_v1.1", width=WIDTH, heads=HEADS, layers=2)
    family = families.find(model)
    found = {}
    for kind in KINDS:
        family.load(model, encoders=False, base_weights=kind, network=False)  # what is imported is not the network's
        with Peak() as peak:
            net = family.load(model, encoders=False, dtype=torch.bfloat16, base_weights=kind).net
        found[f"base_weights_read_peak_{kind}"] = peak.bytes / held_bytes(net)
    return found


def networks(family: Family, model: Path) -> dict[str, nn.Module]:
    """By kind; fp32, and bf16 weights computed with in fp32, among them."""
    found = {
        "fp32": family.load(model, encoders=False).net,
        "bf16": family.load(model, encoders=False, dtype=torch.bfloat16).net.float(),
    }
    return found | {kind: family.load(model, encoders=False, base_weights=kind).net for kind in KINDS}


@torch.no_grad()
def errors(name: str, folder: Path, data: tuple[Path, Path]) -> dict[str, float]:
    """Of the answers, and of the demo's trained network the held-out losses."""
    shown = FAMILIES[name]
    folder.mkdir()
    recipe = recipe_of(data[0].parent, *data, shown.write(folder), folder / "run", steps=1)
    recipe = of_untrained(recipe, steps=1, expert=shown.expert) if shown.about else recipe
    family, mode, objective = choose_family(recipe)
    inputs = gather(recipe, family, mode, show_progress=False)
    setup = Setup(family, mode, family.load(folder), objective, options=encode_options(recipe))
    held_out = HeldOut.build(setup, inputs.held_out_reader, inputs.rules, held_out_levels=4, output_dir=folder / "run")
    encoded = setup.encode(held_out.read(held_out.draws[0]))
    x0, cond = settle(encoded, [0], setup.parts.null)
    level_B = objective.timestep(torch.full((1,), NOISE))
    nets = networks(family, folder)
    exact = family.denoise(nets["fp32"], x0, level_B, cond)
    found = {}
    for kind in ("bf16", *KINDS):
        answer = family.denoise(nets[kind], x0, level_B, cond)
        found[f"base_weights_error_{name}_{kind}"] = float((answer - exact).norm() / exact.norm())
    if not shown.about:
        start = held_out.measure(nets["fp32"], 0)
        assert start is not None
        found["base_weights_held_out_fp32"] = start["loss"]
        for kind in ("bf16", *KINDS):
            row = held_out.measure(nets[kind], 1)
            assert row is not None
            found[f"base_weights_held_out_{kind}"] = row["difference"]
            found[f"base_weights_band_{kind}"] = (row["band95"][1] - row["band95"][0]) / 2
    return found


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "wide").mkdir()
        found = read_peaks(Path(name) / "wide") | bytes_per_weight()
        data = write_data_set(Path(name) / "data", clips=2, stills=0, held_out=8)
        for family in FAMILIES:
            if family != "toy":
                found |= errors(family, Path(name) / family, data)
    for what, value in found.items():
        print(f"{what} {value:.3g}")
    return found


if __name__ == "__main__":
    main()
