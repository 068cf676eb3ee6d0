"""Adapters of any tool, read to the released names of a network: every tensor accounted for, or the file is refused.

The change of a layer is alpha / rank * B @ A; a file without alpha means rank (what every loader takes it for).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reeltune.adapters import fused
from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.files import Stored, file_of, stored_in
from reeltune.adapters.names import UNKNOWN, Form, Kind, Named, form_of, parse
from reeltune.adapters.networks import NETWORKS, SPELLINGS, Layer, Network, Spelling, general
from reeltune.adapters.sizes import Sizes, solve
from reeltune.adapters.writing import OURS
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import brief, few, grouped

TWICE = "is changed in two ways, and tools differ in which of them counts; take one of them out"


@dataclass(frozen=True)
class Found:
    """What a file is, beside its tensors."""

    file: Path
    form: Form
    networks: tuple[Network, ...]
    """Which it can be of: several where its names and sizes do not tell."""
    width: int | None
    alpha_from: str
    """Where the scale was said: "the file", "adapter_config.json", "its metadata", "you"; "" is nowhere."""
    stored: dict[str, Tensor]
    """The file's own tensors, by their names there."""
    metadata: dict[str, str]

    @property
    def network(self) -> Network:
        return self.networks[0]

    @property
    def tool(self) -> str:
        """Which wrote it, or whose form it is in."""
        return "reeltune's own form" if {"family", "base_model", "rank"} <= self.metadata.keys() else self.form.tool

    @property
    def title(self) -> str:
        return " or ".join(network.title_of(self.width) for network in self.networks)


def read_adapter(
    path: str | Path, base: Mapping[str, Tensor] | None = None, *, alpha: float | None = None, outline: bool = False
) -> tuple[Adapter, Found]:
    """The adapter in a safetensors file, a PEFT folder, or a checkpoint-N folder of ours, by released names.

    base: the network's parameters by released name, meta tensors or not: what the adapter is for is then held to it.
    alpha: for a file that says none. outline: A and B stay on the meta device; only headers and alphas are read.
    Raises one UserError with everything that is wrong: another model's or family's layers, shapes, halves of pairs,
    tensors of unknown use, an alpha that is 0 or no number, a rank over the layer's size, numbers that are not finite.
    """
    return adapter_of(stored_in(file_of(Path(path)), outline=outline), base, alpha=alpha)


def adapter_of(
    stored: Stored, base: Mapping[str, Tensor] | None = None, *, alpha: float | None = None
) -> tuple[Adapter, Found]:
    """What `read_adapter` gives, of a file that is read already."""
    where = str(stored.file)
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(where, f"alpha is {alpha:g}; give a number above 0")
    parsed = {key: parse(key) for key in stored.tensors}
    if parsed and set(parsed.values()) == {UNKNOWN}:
        names = ", ".join(few(sorted(parsed), 2))
        raise UserError(where, f"is no adapter: it has {names}; give one, or whole weights to transformer_path")
    refuse(where, few(grouped((key, one) for key, one in parsed.items() if isinstance(one, str))))
    named = [one for one in parsed.values() if isinstance(one, Named)]
    if not named:
        raise UserError(where, "has no tensors in it; give the file that training wrote")
    form = form_of(named)
    if isinstance(form, str):
        raise UserError(where, form)
    networks, spelling = _network(named, form, base, where)
    reader = _Reader(stored, networks[0], spelling, form, base, alpha)
    modules: dict[str, dict[Kind, str]] = defaultdict(dict)
    for one in named:
        reader.take(modules[one.module], one)
    layers, changes = reader.low_rank(modules), reader.changes(modules)
    whole = reader.whole(modules)
    reader.refuse_twice(layers, changes, whole)
    if not (layers or changes or whole or reader.problems):
        reader.wrong("has nothing that changes a layer; give the file that training wrote")
    sizes = solve(networks[0], layers)
    found_in = [network for network in networks if network is networks[0] or not solve(network, layers).problems]
    if base is None and not reader.problems:
        for problem in sizes.problems:
            reader.wrong(problem)
    reader.check(layers, changes | whole, sizes)
    refuse(where, few(reader.told()))
    about = {key: value for key, value in stored.metadata.items() if key != "format"}
    found = Found(
        stored.file,
        form,
        tuple(found_in),
        sizes.of.get("D"),
        reader.alpha_from(),
        stored.tensors,
        dict(stored.metadata),
    )
    return Adapter(layers, whole, changes, about), found


def network_of(base: Mapping[str, Tensor]) -> Network:
    """The network of parameters by released name; one that is in no table goes by the released names alone."""
    modules = {name: name.removesuffix(".weight").removesuffix(".bias") for name in base}
    for network in NETWORKS.values():
        if all(network.module(module, "released") for module in modules.values()):
            return network
    matrices = {modules[name] for name, tensor in base.items() if tensor.ndim == 2 and name.endswith(".weight")}
    others = {general(module)[0]: general(module)[0] for module in modules.values() if module not in matrices}
    bare = tuple(general(name)[0] for name, module in modules.items() if name == module)
    layers = tuple(Layer(name, "", "") for name in sorted({general(module)[0] for module in matrices}))
    return Network("", "this model", layers, others, bare)


def _network(
    named: list[Named], form: Form, base: Mapping[str, Tensor] | None, where: str
) -> tuple[list[Network], Spelling]:
    """Those whose layers have these names, and which names these are. Raises UserError where there is none."""
    own = None if base is None else network_of(base)
    candidates = ([] if own is None or own.name in NETWORKS else [own]) + list(NETWORKS.values())
    texts = sorted({one.module for one in named if one.kind != "whole"})
    missing = {
        (network.name, spelling): [text for text in texts if not _knows(network, text, spelling, form)]
        for network in candidates
        for spelling in SPELLINGS
    }
    fit: list[tuple[Network, Spelling]] = [
        (network, spelling) for network in candidates for spelling in SPELLINGS if not missing[network.name, spelling]
    ]
    if own is not None and fit and own not in [network for network, _ in fit]:
        raise UserError(where, f"is an adapter of {fit[0][0].title}, and this is {own.title}; give one made for that")
    if own is not None:
        fit = [(network, spelling) for network, spelling in fit if network is own]
        candidates = [own]
    if fit:
        spelling = fit[0][1]
        return [network for network, other in fit if other == spelling], spelling
    nearest = min(((n, s) for n in candidates for s in SPELLINGS), key=lambda pair: len(missing[pair[0].name, pair[1]]))
    left = missing[nearest[0].name, nearest[1]]
    if 2 * len(left) > len(texts):
        known = " and ".join(network.title for network in candidates)
        raise UserError(where, [f"is no adapter of {known}; it has", *few(left, 3)])
    raise UserError(where, few([f"{text} is no layer of {nearest[0].title}" for text in left]))


def _knows(network: Network, text: str, spelling: Spelling, form: Form) -> bool:
    return bool(network.find(text, spelling, form.joined)) or network.module(text, spelling, form.joined) is not None


class _Reader:
    """Makes layers of one file's tensors, and keeps what is wrong with it."""

    def __init__(
        self,
        stored: Stored,
        network: Network,
        spelling: Spelling,
        form: Form,
        base: Mapping[str, Tensor] | None,
        alpha: float | None,
    ):
        self.stored, self.network, self.form = stored, network, form
        self.spelling: Spelling = spelling
        self.base, self.given_alpha = base, alpha
        self.problems: list[tuple[str, str]] = []  # as `grouped` takes them
        self.own_alphas = 0

    def wrong(self, rule: str, what: str = "") -> None:
        self.problems.append((what, rule))

    def told(self) -> list[str]:
        return grouped(self.problems)

    def take(self, module: dict[Kind, str], one: Named) -> None:
        if one.kind in module:
            self.wrong(f"{one.key} and {module[one.kind]} are one thing under two names; take one of them out")
        module[one.kind] = one.key
        tensor = self.stored.tensors[one.key]
        if not tensor.is_floating_point() and one.kind != "alpha":
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.wrong(f"is stored as {dtype}; give the adapter in fp32, bf16 or fp16", one.key)
        elif one.kind != "alpha" and not tensor.is_meta and not torch.isfinite(tensor.float()).all():
            self.wrong("has numbers that are not finite; give an earlier checkpoint's", one.key)

    def low_rank(self, modules: Mapping[str, dict[Kind, str]]) -> dict[str, LowRank]:
        """The file's low-rank changes, by the layer's released name."""
        out: dict[str, LowRank] = {}
        for text, keys in modules.items():
            if not {"A", "B", "alpha", "magnitude", "bias"} & keys.keys():
                continue
            if not {"A", "B"} <= keys.keys():
                half = keys.get("A") or next(iter(keys.values()))
                self.wrong(
                    f"has no {'B' if 'A' in keys else 'A'} to go with it; the file is not whole; save it again", half
                )
                continue
            if (pair := self._pair(text, keys)) is None:
                continue
            found = self.network.find(text, self.spelling, self.form.joined)
            if not found:
                self.wrong("is a low-rank change of what is no linear layer; these alone are read", keys["A"])
            elif len(found) == 1:
                out[found[0][1]] = pair
            else:
                self._split(out, pair, found, keys["B"])
        return out

    def _split(self, out: dict[str, LowRank], pair: LowRank, found: list[tuple[Layer, str]], key: str) -> None:
        outputs, rows, width = fused.outputs_of(pair, len(found)), pair.B_OR.shape[0], pair.A_RI.shape[1]
        if sum(outputs) != rows or min(outputs) <= 0:
            self.wrong(f"has {rows} outputs, which are not {len(found)} layers of {width} inputs", key)
            return
        pieces = fused.split(pair, outputs)
        out |= {released: piece for layer, released in found if (piece := pieces[layer.part]) is not None}

    def _pair(self, text: str, keys: Mapping[Kind, str]) -> LowRank | None:
        A, B = (self.stored.tensors[keys[kind]] for kind in ("A", "B"))
        if min(A.ndim, B.ndim) < 2:
            self.wrong(
                f"is {tuple(A.shape)} and its B {tuple(B.shape)}, no matrices; save the adapter again", keys["A"]
            )
            return None
        if A.ndim != 2 or B.ndim != 2:
            what = "a low-rank change of a convolution; linear layers are read"
            self.wrong(f"is {tuple(A.shape)}: {what}", keys["A"])
            return None
        if A.shape[0] != B.shape[1] or not A.numel() or not B.numel():
            rule = f"is {tuple(A.shape)} and its B {tuple(B.shape)}, which have not one rank; save the adapter again"
            self.wrong(rule, keys["A"])
            return None
        rank = A.shape[0]
        least = min(A.shape[1], B.shape[0])
        if rank > least:
            self.wrong(f"has rank {rank}, and its layer has {least} at most; train with a rank up to that", keys["A"])
        self._check_settings(text, keys, rank)
        if (alpha := self._alpha(text, keys, rank)) is None:
            return None
        magnitude = None
        if "magnitude" in keys:
            magnitude = self.stored.tensors[keys["magnitude"]]
            if magnitude.shape[:1] != B.shape[:1] or magnitude.numel() != B.shape[0]:
                rule = f"is {tuple(magnitude.shape)} for {B.shape[0]} outputs; save the adapter again"
                self.wrong(rule, keys["magnitude"])
                return None
            magnitude = magnitude.reshape(-1)
        stabilised = bool(self.stored.settings.get("use_rslora")) and "alpha" not in keys
        return LowRank(A, B, alpha, stabilised, magnitude)

    def _check_settings(self, text: str, keys: Mapping[Kind, str], rank: int) -> None:
        """What PEFT's settings say of the layer, beside its alpha."""
        settings, where = self.stored.settings, self.stored.settings_from
        said = _by_pattern(settings.get("rank_pattern"), text, settings.get("r"))
        if said is not None and said != rank:
            rule = f"has rank {rank}, and r is {brief(said)} in {where}, by which its change is scaled; restore its own"
            self.wrong(rule, keys["A"])
        if settings.get("use_dora") is True and "magnitude" not in keys:
            self.wrong(f"has no magnitudes, and use_dora is true in {where}; save the adapter again", keys["A"])

    def _alpha(self, text: str, keys: Mapping[Kind, str], rank: int) -> float | None:
        """None, with the problem told, of what is no number above 0."""
        settings = self.stored.settings
        said: Any
        if "alpha" in keys:
            self.own_alphas += 1
            tensor = self.stored.tensors[keys["alpha"]]
            said = tensor.item() if tensor.numel() == 1 else list(tensor.shape)  # of others values are not read
            where = "in it" if tensor.numel() == 1 else "in it, numbers of that shape"
        elif settings:
            said = _by_pattern(settings.get("alpha_pattern"), text, settings.get("lora_alpha"))
            where = f"in {self.stored.settings_from}"
        else:
            return float(rank) if self.given_alpha is None else self.given_alpha
        is_number = isinstance(said, int | float) and not isinstance(said, bool)
        if is_number and math.isfinite(said) and said > 0:
            return float(said)
        shown = f"{said:g}" if is_number else brief(said)
        rule = "expected a number above 0, by which its change is scaled; save the adapter again with its own"
        self.wrong(f"is {shown} {where}; {rule}", f"alpha of {text}")
        return None

    def alpha_from(self) -> str:
        if self.own_alphas:
            return "the file"
        return self.stored.settings_from or ("" if self.given_alpha is None else "you")

    def changes(self, modules: Mapping[str, dict[Kind, str]]) -> dict[str, Tensor]:
        """The file's changes of whole weights, by released parameter name."""
        out = {}
        for text, keys in modules.items():
            for kind in ("diff", "diff_b", "bias"):
                if kind not in keys:
                    continue
                module = self.network.module(text, self.spelling, self.form.joined)
                if module is None:
                    self.wrong("changes several layers that are one there, which is not read", keys[kind])
                    continue
                name = self.network.parameter(module, "weight" if kind == "diff" else "bias")
                tensor = self.stored.tensors[keys[kind]]
                if name in out:
                    self.wrong(TWICE, name)
                elif kind == "bias":
                    pair = self._pair(text, keys) if {"A", "B"} <= keys.keys() else None
                    out[name] = tensor.float() * (1.0 if pair is None else pair.scale)
                else:
                    out[name] = tensor
        return out

    def whole(self, modules: Mapping[str, dict[Kind, str]]) -> dict[str, Tensor]:
        return {text: self.stored.tensors[keys["whole"]] for text, keys in modules.items() if "whole" in keys}

    def refuse_twice(self, layers: Iterable[str], *tensors: Mapping[str, Tensor]) -> None:
        """Keeps parameters that are changed in two ways."""
        counts = Counter(chain((f"{layer}.weight" for layer in layers), *tensors))
        for name in sorted(name for name, count in counts.items() if count > 1):
            self.wrong(TWICE, name)

    def check(self, layers: Mapping[str, LowRank], tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        """Keeps what does not go with the alpha that was given, or with the base's names and shapes."""
        if self.given_alpha is not None and (self.own_alphas or self.stored.settings):
            self.wrong("says its alpha itself; --alpha is for files that do not")
        elif self.given_alpha is not None and OURS in self.stored.metadata:
            self.wrong("was written by reeltune, with the scale in B; --alpha is for files of other tools")
        if self.base is None:
            return
        shapes = {f"{name}.weight": (pair.B_OR.shape[0], pair.A_RI.shape[1]) for name, pair in layers.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        missing = [name for name in shapes if name not in self.base]
        unlike = {
            n: tuple(self.base[n].shape) for n in shapes if n in self.base and tuple(self.base[n].shape) != shapes[n]
        }
        of = self.network.title_of(sizes.of.get("D"))
        if 2 * len(unlike) > len(shapes):
            (name, shape), others = next(iter(unlike.items())), len(unlike) - 1
            like = f"{name} (and {others:,} more) is {shapes[name]} in it and {shape} there"
            self.wrong(f"is of another model ({of}); give one that was trained on this one: {like}")
        else:
            for name, shape in unlike.items():
                self.wrong(f"is {shapes[name]} in it and {shape} in the model", name)
        for name in missing:
            self.wrong("is in it and not in the model; give one that was trained on this one", name)


def _by_pattern(patterns: Any, name: str, otherwise: Any) -> Any:
    """PEFT's rule: a key matches the whole name, or what of it stands behind a dot."""
    table = patterns if isinstance(patterns, dict) else {}
    return next((value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", name)), otherwise)


def counted(layers: Mapping[str, LowRank]) -> Iterator[tuple[int, float, int]]:
    """(rank, alpha, how many layers), most first."""
    counts = Counter((pair.rank, pair.alpha) for pair in layers.values())
    yield from ((rank, alpha, count) for (rank, alpha), count in counts.most_common())
