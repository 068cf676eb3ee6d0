"""What each tool does with an adapter's file: the change that it makes to each layer, by its own rules.

Read from the tools' sources, 2026-11: ComfyUI (comfy/lora.py, comfy/weight_adapter), WanVideoWrapper
(nodes_model_loading.py), diffusers 0.42 (loaders/lora_pipeline.py, lora_conversion_utils.py), musubi-tuner
(networks/lora.py), VideoX-Fun and EasyAnimate (utils/lora_utils.py). diffusers runs in the tests as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from reeltune.adapters import fused, loader_rules
from reeltune.adapters.adapter import LowRank
from reeltune.adapters.networks import Layer, Network, Spelling

Tensors = Mapping[str, Tensor]
Pairs = tuple[tuple[str, str], ...]  # endings of (A, B)
PEFT: Pairs = ((".lora_A.weight", ".lora_B.weight"),)
SLOT: Pairs = ((".lora_A.default.weight", ".lora_B.default.weight"),)
KOHYA: Pairs = ((".lora_down.weight", ".lora_up.weight"),)
ANY = PEFT + SLOT + KOHYA
CHANGES = {".diff": "weight", ".diff_b": "bias"}


@dataclass(frozen=True)
class Names:
    """One way of naming a layer's tensors that a tool reads."""

    prefix: str
    joined: str
    spelling: Spelling
    pairs: Pairs = ANY


@dataclass(frozen=True)
class Loader:
    tool: str
    names: Mapping[str, tuple[Names, ...]]
    """Network -> what it reads; networks that it cannot run are not there."""
    alpha: Literal["optional", "needed"] = "optional"
    changes: tuple[str, ...] = ()
    """Which of CHANGES it adds to weights and biases."""
    changes_linear_alone: bool = False
    blocks_alone: bool = False
    """It changes layers of blocks, and leaves out others."""
    renamed: Callable[[Tensors, Network], dict[str, Tensor]] = lambda tensors, network: dict(tensors)
    """What it makes of the names before it reads them."""
    refuses: Callable[[Tensors, Network], str | None] = lambda tensors, network: None
    """Why it stops with an error, or would do something else than the file means."""


@dataclass(frozen=True)
class Applied:
    layers: dict[str, LowRank] = field(default_factory=dict)
    """What is added to each layer, by released name."""
    changes: dict[str, Tensor] = field(default_factory=dict)
    """What is added to other parameters."""
    unused: tuple[str, ...] = ()
    """The file's tensors of which nothing came; tools say so in a log, or not at all."""
    refused: str | None = None


BLOCKS = ("blocks.", "transformer_blocks.", "single_transformer_blocks.")


def applied(loader: Loader, tensors: Tensors, network: Network) -> Applied:
    """What a tool makes of a file in that network. tensors: by their names in the file. Those on the meta device are
    taken for what their alphas say."""
    if network.name not in loader.names:
        return Applied(refused=f"it has no network of {network.title}")
    if why := loader.refuses(tensors, network):
        return Applied(refused=why)
    renamed = loader.renamed(tensors, network)
    out, used = Applied(), set[int]()
    modules: dict[tuple[Names, str], dict[str, str]] = defaultdict(dict)
    for key in renamed:
        for way, module, part in _parts(loader, key, network):
            modules[way, module].setdefault(part, key)
    for (way, module), keys in modules.items():
        refused = _apply(loader, network, way, module, {part: renamed[key] for part, key in keys.items()}, out, used)
        if refused:
            return Applied(refused=refused)
    unused = tuple(name for name, tensor in tensors.items() if id(tensor) not in used)
    return Applied(out.layers, out.changes, unused)


def _parts(loader: Loader, key: str, network: Network) -> Iterator[tuple[Names, str, str]]:
    """(how it is named, the module as it is there, the ending): the first way in which the network has it."""
    for way in loader.names[network.name]:
        endings = [ending for pair in way.pairs for ending in pair] + [".alpha"]
        endings += loader.changes
        for ending in endings:
            if key.startswith(way.prefix) and key.endswith(ending):
                module = key.removeprefix(way.prefix).removesuffix(ending)
                if network.find(module, way.spelling, way.joined) or network.module(module, way.spelling, way.joined):
                    yield way, module, ending
                    return


def _apply(
    loader: Loader, network: Network, way: Names, module: str, parts: Tensors, out: Applied, used: set[int]
) -> str | None:
    """Adds to `out` what the tool makes of one module's tensors; a word of an error where it ends in one."""
    layers = network.find(module, way.spelling, way.joined)
    if loader.blocks_alone and not all(released.startswith(BLOCKS) for _, released in layers):
        return None
    pair = next((pair for pair in way.pairs if pair[0] in parts and pair[1] in parts), None)
    if pair is not None and layers:
        A, B, alpha = parts[pair[0]], parts[pair[1]], parts.get(".alpha")
        if alpha is None and loader.alpha == "needed":
            return f"it ends in an error: {module} has no alpha"
        scale = 1.0 if alpha is None else float(alpha.reshape(-1)[0]) / A.shape[0]
        change = LowRank(A, B, scale * A.shape[0])
        out.layers.update(_pieces(change, layers))
        used |= {id(A), id(B)} | (set() if alpha is None else {id(alpha)})
    for ending, kind in CHANGES.items():
        name = network.module(module, way.spelling, way.joined)
        if ending in parts and name is not None and (layers or not loader.changes_linear_alone):
            out.changes[network.parameter(name, kind)] = parts[ending]
            used.add(id(parts[ending]))
    return None


def _pieces(change: LowRank, layers: Sequence[tuple[Layer, str]]) -> dict[str, LowRank]:
    """Changes by released name; of layers that are one there each has its rows."""
    if len(layers) == 1:
        return {layers[0][1]: change}
    pieces = fused.split(change, fused.outputs_of(change, len(layers)))
    return {released: piece for layer, released in layers if (piece := pieces[layer.part]) is not None}


# ---- the tools

DOTS = Names("diffusion_model.", ".", "released")
LOW = Names("lora_unet_", "_", "released")
TWICE_LOW = Names("lora_unet__", "_", "released")
BARE = Names("", ".", "released")
IN_DIFFUSERS = Names("transformer.", ".", "diffusers", PEFT)
FUN = (DOTS, TWICE_LOW, LOW, BARE)
IN_EASYANIMATE = tuple(Names(prefix, "_", "released", KOHYA) for prefix in ("lora_unet__", "lora_unet_"))

LOADERS = (
    Loader(
        "ComfyUI",
        {
            "wan_fun": (DOTS, LOW),
            "hunyuan_video": (
                Names("diffusion_model.", ".", "comfyui"),
                Names("diffusion_model.", ".", "original"),
                Names("transformer.", ".", "original"),
                Names("lora_unet_", "_", "comfyui"),
            ),
        },
        changes=tuple(CHANGES),
        renamed=loader_rules.of_fun,
        refuses=loader_rules.magnitudes_of_the_base,
    ),
    Loader(
        "WanVideoWrapper",
        {"wan_fun": (DOTS, LOW)},
        changes=tuple(CHANGES),
        renamed=loader_rules.standardised,
        refuses=loader_rules.taken_for_control,
    ),
    Loader(
        "diffusers",
        {
            "wan_fun": (
                Names("diffusion_model.", ".", "released", PEFT + KOHYA),
                Names("lora_unet_", "_", "released", KOHYA),
                IN_DIFFUSERS,
            ),
            "hunyuan_video": (
                Names("diffusion_model.", ".", "original", PEFT),
                Names("transformer.", ".", "original", PEFT),
                IN_DIFFUSERS,
            ),
            "cogvideox_fun": (IN_DIFFUSERS,),
        },
        changes=(".diff_b",),
        changes_linear_alone=True,
        refuses=loader_rules.of_diffusers,
    ),
    Loader(
        "musubi-tuner",
        {
            "wan_fun": (Names("lora_unet_", "_", "released", KOHYA),),
            "hunyuan_video": (Names("lora_unet_", "_", "original", KOHYA),),
        },
        alpha="needed",
        blocks_alone=True,
        refuses=loader_rules.magnitudes_left_out,
    ),
    Loader(
        "VideoX-Fun",
        {"wan_fun": FUN, "cogvideox_fun": FUN, "hunyuan_video": FUN, "easyanimate": FUN},
        refuses=loader_rules.pairs_and_alphas_alone,
    ),
    Loader("EasyAnimate", {"easyanimate": IN_EASYANIMATE}, refuses=loader_rules.kohya_alone),
)
BY_TOOL = {loader.tool: loader for loader in LOADERS}
