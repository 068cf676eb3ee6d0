"""What a model family must say about itself: values and a few plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Described, Encoded, Geometry, MaskLaw, SizeLaw
from reeltune.diffusion.objective import Objective
from reeltune.families.tokenizers import check_vocabulary
from reeltune.memory.quantized import Quantisation


@dataclass
class Parts:
    """A family's networks, loaded. `net` is trained; the frozen ones only encode and decode.

    Under `low_vram` the frozen networks live on the CPU and visit the device inside `borrow`.
    """

    net: nn.Module
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # "vae", "text", "image"
    null: dict[str, Tensor] = field(default_factory=dict)  # condition name -> its blank value (default: zeros)
    extras: dict[str, Any] = field(default_factory=dict)  # tokenizers and the like
    config: dict[str, Any] = field(default_factory=dict)  # the transformer's own config.json, as read
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    low_vram: bool = False
    loaders: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)  # frozen networks that are not read yet

    def read_frozen(self) -> None:
        """Reads every frozen network now."""
        for name in list(self.loaders):
            self._read(name)

    def _read(self, name: str) -> None:
        network: Any = self.loaders[name]()
        if name.startswith("text") and (own := f"tokenizer{name.removeprefix('text')}") in self.extras:
            check_vocabulary(self.extras[own], network)
        self.frozen[name] = network
        del self.loaders[name]

    @contextmanager
    def borrow(self, name: str) -> Iterator[Any]:
        """The frozen network, of its own library's class, on the device, read if it is not yet; afterwards back on the
        CPU if `low_vram`."""
        if name in self.loaders:
            self._read(name)
        module = self.frozen[name]
        if next(module.parameters()).device.type != self.device.type:
            module.to(self.device)
        try:
            yield module
        finally:
            if self.low_vram and self.device.type != "cpu":
                module.to("cpu")


@dataclass(frozen=True)
class Loading:
    """How a family's networks are read."""

    dtype: torch.dtype  # of the trained network
    frozen_dtype: torch.dtype | None  # of VAE and encoders; None: as stored
    device: torch.device  # of the trained network; "meta": its weights are not read
    transformer_path: Path | None  # other weights for the same network: a file, or a saved folder
    fake: AbstractContextManager | None = None
    """torch's FakeTensorMode: weights are fake tensors made within, and their values are not read."""
    quantisation: Quantisation | None = None
    """How linear layers of the trained network, which then do not learn, are quantised while it is read."""


def plain(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Captions as they are."""
    return list(captions)


@dataclass(frozen=True)
class TokenLimit:
    """How much of a caption one of a family's encoders reads."""

    reader: str  # "the text encoder"
    tokenizer: Path  # its folder
    tokens: int  # at most, those around the caption included
    as_read: Callable[[Any, Sequence[str]], list[str]] = plain
    """(tokenizer, captions) -> what is tokenised: the caption in its template."""
    special: bool = True
    """The tokenizer adds its own marks of beginning and end."""
    or_its_own: bool = False
    """The tokenizer's own limit counts, where it is less."""


def as_drawn(batch: Batch, mode: str) -> dict[str, Tensor]:
    """keep_B of a family in which the draw alone decides what is dropped."""
    return dict(batch.keep)


@dataclass(frozen=True)
class Family:
    """One released model family or variant of it. Variants are values: `replace(BASE, ...)`, never subclasses."""

    name: str  # "wan_fun/control_v1.1"
    source: str  # where the numbers below come from
    geometry: Geometry
    objective: Objective
    modes: tuple[str, ...]  # train modes that its channels allow, the natural one first
    needs: dict[str, tuple[str, ...]]  # mode -> inputs it cannot do without: "control", "camera", "mask", "ref"
    drop: dict[str, float]  # condition name -> share of samples it is blanked in (text is a recipe field)
    blocks: tuple[str, ...]  # class names to shard, recompute and compile
    size_law: SizeLaw
    read: Callable[[Path, Family, Loading], Parts]
    """The trained network, and loaders of the frozen ones. Raises UserError listing every bad key."""
    encode_clips: Callable[[Parts, Batch, str, dict[str, Any]], Encoded]
    """(parts, batch, mode, options) -> what the frozen networks make of all but the captions, in float32.

    options: the recipe's settings that change it: add_full_ref_image_in_self_attention."""
    describe: Callable[[Parts, list[str], Tensor | None], Described]
    """(parts, captions, first frame of each clip as pixels_BCHW where caption_sees_picture) -> Described; no grad."""
    denoise: Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]
    """(net, x_BCThw, timestep_B, cond) -> answer_BCThw"""
    decode: Callable[[Parts, Tensor], Tensor]
    """(parts, x0_BCThw) -> pixels_BFCHW; [-1, 1] is what can be shown, and a VAE may leave it"""
    to_released: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    """(state_dict of net, config) -> the same tensors under the released names"""
    from_released: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
    """Its inverse, a bijection on the released key list."""
    save: Callable[..., None]
    """(folder, state_dict of net, config, *, diffusers=False): weights and config.json in the released form, or
    diffusers'."""
    options: dict[str, Any] = field(default_factory=dict)  # what config_path or the checkpoint says beside sizes
    caption: tuple[str, ...] = ("text",)
    """Conditions that the caption makes, "text" first: dropped together, and blanked in guidance's blind pass."""
    caption_sees_picture: bool = False
    """The text encoder is shown the clip's first frame beside the caption."""
    keep: Callable[[Batch, str], dict[str, Tensor]] = as_drawn
    """(batch, mode) -> keep_B of an Encoded: what the draw keeps (batch.keep), and what mask and reference say."""
    token_limits: tuple[TokenLimit, ...] = ()
    """The limit of each encoder of captions."""
    frozen_files: dict[str, Path] = field(default_factory=dict)
    """All that `encode` reads of the checkpoint: frozen networks, tokenizers, the network's config."""
    native_fps: float = 16.0
    """Frames per second of the clips it was made for, at which clips without another rate are played."""
    encode_version: int = 1
    """Raise it when `encode` or `describe` makes something else of the same input: caches are then filled anew."""
    masks: dict[str, MaskLaw] = field(default_factory=dict)
    """Mode that needs a mask -> which masks it is trained with, where MaskLaw() is not."""
    vae_tiles: bool = True
    """Its VAE can take large clips in tiles (diffusers' `enable_tiling`)."""
    least_frames: int = 1
    """Pixel frames below which the loss counts nothing; such clips are left out of the plan."""
    most_frames: int | None = None
    """Pixel frames for which the network has positions; recipes that ask for more are refused. None: for any number."""
    split: Callable[[nn.Module, DeviceMesh], None] | None = None
    """(net, mesh of the dimensions data, ring, ulysses): from now on each process of a clip computes a part of its
    tokens. Raises UserError for a network that so many cannot share. None: there is no such way."""
    finish: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None
    """(x0_BCThw as sampled, cond) -> x0_BCThw with what the conditions fix put back. None: they fix nothing."""
    boundary: float | None = None
    """The noise level from which on the expert "high" answers, below it "low"; None: one network answers at all
    levels."""
    experts: dict[str, Family] = field(default_factory=dict, repr=False, compare=False)
    """Each of them that is there, as a family of its own: its network, and an objective of its own levels."""
    expert: str | None = None
    """Which of them this is."""
    weights: Path | None = None
    """Where its network's weights are, if not in the checkpoint's folder or its `transformer`."""

    def load(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        low_vram: bool = False,
        encoders: bool = True,
        network: bool = True,
        network_device: torch.device | str | None = None,
        vae_tiling: bool = False,
        transformer_path: str | Path | None = None,
        fake: AbstractContextManager | None = None,
        base_weights: str | None = None,
    ) -> Parts:
        """The network in `dtype` on the device; VAE and encoders in `frozen_dtype`, or as stored.

        Without `encoders` VAE and encoders are read when they are first borrowed, and null stays empty; without
        `network` its weights are not read, and it stays on the meta device. transformer_path: other weights for the
        same network. fake: as of Loading. base_weights: the kind of Quantisation of its blocks. Raises UserError
        listing every missing, unexpected and misshapen key.
        """
        device = torch.device(device)
        place = torch.device(network_device or device) if network else torch.device("meta")
        other = None if transformer_path is None else Path(transformer_path)
        quantisation = None if base_weights is None else Quantisation(base_weights, self.blocks)
        parts = self.read(Path(path), self, Loading(dtype, frozen_dtype, place, other, fake, quantisation))
        parts.device, parts.low_vram = device, low_vram
        if vae_tiling:
            self._tile(parts)
        if encoders:
            parts.read_frozen()
            parts.null = self.blank_caption(parts)
        return parts

    def _tile(self, parts: Parts) -> None:
        """Raises UserError if its VAE has none."""
        if not self.vae_tiles:
            raise UserError("recipe", f"vae_tiling is true, which {self.name} has not; leave it out")
        read = parts.loaders["vae"]

        def read_tiled() -> nn.Module:
            vae: Any = read()
            vae.enable_tiling()
            return vae

        parts.loaders["vae"] = read_tiled

    def blank_caption(self, parts: Parts) -> dict[str, Tensor]:
        """Condition name -> what a dropped caption leaves; of an encoder that sees pictures each clip has its own."""
        if self.caption_sees_picture:
            return {}
        return {name: value[0] for name, value in self.describe(parts, [""], None).cond.items()}

    @torch.no_grad()
    def encode(
        self,
        parts: Parts,
        batch: Batch,
        mode: str,
        *,
        options: dict[str, Any] | None = None,
        described: Described | None = None,
    ) -> Encoded:
        """What the frozen networks make of a batch that is on the device already, in float32.

        described: what `describe` makes of the captions, if it is known already.
        """
        if described is None:
            picture_BCHW = batch.pixels_BFCHW[:, 0] if self.caption_sees_picture else None
            described = self.describe(parts, batch.text, picture_BCHW)
        clips = self.encode_clips(parts, batch, mode, options or {})
        return replace(clips, cond=described.cond | clips.cond, keep=self.keep(batch, mode), null=described.null)


def needed(x: Tensor | None) -> Tensor:
    """A batch's control, camera or mask in a mode that needs it, where it is always there."""
    assert x is not None
    return x


def check_mode(family: Family, mode: str | None) -> str:
    """The train mode to use: `mode`, or the family's natural one.

    Raises UserError that lists the modes which the checkpoint can do.
    """
    if mode is None:
        return family.modes[0]
    if mode not in family.modes:
        raise UserError(
            "recipe",
            f"train_mode is {mode!r}, which a checkpoint of {family.name} cannot do; it can do "
            f"{' and '.join(family.modes)}; set train_mode to {family.modes[0]}",
        )
    return mode


def check_expert(family: Family, expert: str | None) -> Family:
    """The family of the network to train: one of two experts, the only network, or with `both` the family as it was
    found, whose two experts are `learning`.

    Raises UserError where two leave a choice that is not made, and for a choice that there is not.
    """
    if not family.experts:
        if expert is not None:
            rule = f"but a checkpoint of {family.name} has one network for all noise levels; leave it out"
            raise UserError("recipe", f"expert is {expert!r}, {rule}")
        return family
    if expert in family.experts:
        return family.experts[expert]
    two = (
        f"a checkpoint of {family.name} has two networks: high answers at noise levels from {family.boundary:g} on, "
        "low below"
    )
    if expert is None:
        raise UserError("recipe", f"expert is left out, and {two}; give expert high, low or both")
    if expert == "both" and len(family.experts) == 2:
        return family
    there = " and ".join(family.experts)
    remedy = f"give expert {there}, or a checkpoint with both" if there else "download it again"
    raise UserError("recipe", f"expert is {expert!r}, but the checkpoint holds the weights of {there} alone; {remedy}")


def learning(family: Family) -> list[Family]:
    """Each network that learns, as a family of its own, the noisier first. family: what `check_expert` gave."""
    if family.expert is not None or not family.experts:
        return [family]
    return [replace(one, geometry=family.geometry) for one in family.experts.values()]
