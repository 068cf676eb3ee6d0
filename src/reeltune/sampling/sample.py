"""Noise -> clip, through the very functions that train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.core.files import whole_file
from reeltune.core.types import Batch, Described, Encoded
from reeltune.data.loader import joined
from reeltune.data.media import write_clip
from reeltune.diffusion import denoise
from reeltune.diffusion.loss import Cond, settle
from reeltune.diffusion.objective import Objective
from reeltune.families.spec import Family, Parts
from reeltune.families.tensor_files import notice
from reeltune.sampling.other_expert import BothExperts, OtherExpert
from reeltune.sampling.prompts import Request

CAPTIONS = 128  # remembered: at most 1.1 GB, at 512 x 4096 floats each


@dataclass(frozen=True)
class Setup:
    """All that a network is trained with, beside its weights."""

    family: Family
    mode: str
    parts: Parts
    objective: Objective
    autocast: Callable[[], AbstractContextManager] = nullcontext
    options: dict[str, Any] = field(default_factory=dict)
    other: OtherExpert | BothExperts | None = None  # that makes clips together with the network, or in its place

    def encode(self, batch: Batch) -> Encoded:
        """Encodes a batch in groups of `vae_mini_batch`, by itself sample by sample, because networks give other last
        bits in other batches; or as it came from the cache."""
        batch = batch.to(self.parts.device)
        together = self.options.get("vae_mini_batch", 1)
        encoded = batch.encoded or joined([self._encode_group(group) for group in batch.groups(together)])
        if "text" in encoded.keep:
            encoded.keep = encoded.keep | dict.fromkeys(self.family.caption, encoded.keep["text"])
        return encoded

    def _encode_group(self, batch: Batch) -> Encoded:
        """Captions are encoded alone, whose bits are then the same in every group."""
        described = joined_captions([self._described(one.text, one.pixels_BFCHW) for one in batch.groups(1)])
        return self.family.encode(self.parts, batch, self.mode, options=self.options, described=described)

    def guided_away(self, batch: Batch, negative_prompt: str) -> Cond:
        """What the caption's conditions are in guidance's blind pass over a batch of one; {}: those of a blank caption.

        The negative prompt goes the way of every caption; https://arxiv.org/abs/2207.12598, with another condition in
        place of none.
        """
        if not negative_prompt:
            return {}
        seen_BFCHW = (
            batch.to(self.parts.device).pixels_BFCHW if self.family.caption_sees_picture else batch.pixels_BFCHW
        )
        cond = self._described([negative_prompt], seen_BFCHW).cond
        return {name: cond[name] for name in self.family.caption}

    def _described(self, captions: list[str], pixels_BFCHW: Tensor) -> Described:
        """What encoders make of one caption; one that sees pictures is shown the first frame of the clip."""
        if self.family.caption_sees_picture:
            with torch.no_grad():
                return self.family.describe(self.parts, captions, pixels_BFCHW[:, 0])
        known = self._describe(captions[0])
        return Described({name: value.to(self.parts.device, non_blocking=True) for name, value in known.items()})

    @cached_property
    def _describe(self) -> Callable[[str], dict[str, Tensor]]:
        """Caption -> its conditions on the CPU, encoded once for as long as it is remembered."""

        def describe(caption: str) -> dict[str, Tensor]:
            cond = self.family.describe(self.parts, [caption], None).cond
            return {name: value.cpu() for name, value in cond.items()}

        return lru_cache(maxsize=CAPTIONS)(describe)

    def denoise(self, net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: Cond) -> Tensor:
        with self.autocast():
            return self.family.denoise(net, x_BCThw, timestep_B, cond)

    def networks(self, net: nn.Module) -> list[nn.Module]:
        """All that learn and make clips: `net`, or both experts."""
        return [half.net for half in self.other.halves.values()] if isinstance(self.other, BothExperts) else [net]

    def denoise_together(
        self, net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: Cond, *, write: bool = True
    ) -> Tensor:
        """One denoising pass by the expert whose noise level it is. Without `write` nobody looks at the clip: only what
        learns, which may be spread over processes, is asked."""
        asked = net if self.other is None else self.other.answering(net, timestep_B, write=write)
        return torch.zeros_like(x_BCThw) if asked is None else self.denoise(asked, x_BCThw, timestep_B, cond)


def joined_captions(each: Sequence[Described]) -> Described:
    """One batch of several."""
    cond, null = (
        {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
        for tables in ([one.cond for one in each], [one.null for one in each])
    )
    return Described(cond, null)


@contextmanager
def at_rest(*nets: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def make_clip(
    setup: Setup,
    net: nn.Module,
    request: Request,
    batch: Batch,
    path: Path,
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    write: bool = True,
    shown: Mapping[str, Any] | None = None,
) -> Tensor | None:
    """Writes one clip, and its prompt, seed and settings into a .json of the same name; without `write` neither.

    shown: which weights and adapters it shows, into the .json too; previews lie beside the run whose they are.
    Returns what was written, uint8_BFCHW on the CPU. Raises CannotWriteError.
    """
    scheduler = denoise.sampler(setup.objective)
    with at_rest(*setup.networks(net)):
        encoded = setup.encode(batch)
        x0, cond = settle(encoded, [request.seed], setup.parts.null)
        x0 = denoise.sample(
            partial(setup.denoise_together, write=write),
            net,
            setup.objective,
            cond,
            setup.parts.null | encoded.null | setup.guided_away(batch, negative_prompt),
            x0.shape,
            scheduler=scheduler,
            seeds=[request.seed],
            steps=steps,
            guidance=guidance_scale,
            caption=setup.family.caption,
            device=x0.device,
        )
        if setup.family.finish is not None:
            x0 = setup.family.finish(x0, cond)
        if not write:
            return None
        decoded_BFCHW = setup.family.decode(setup.parts, x0)
    pixels_BFCHW = _pixels(decoded_BFCHW, path)
    write_pixels(path, pixels_BFCHW, request.fps)
    settings = {
        "prompt": request.prompt,
        "negative_prompt": negative_prompt,
        "seed": request.seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": type(scheduler).__name__,
        **batch.draws[0].shape._asdict(),
        "fps": request.fps,
        "control": request.control,
        **(request.drawn.told if request.drawn else {}),
        "entry": request.entry,
        **({} if setup.other is None else setup.other.told),
        **(shown or {}),
    }
    with whole_file(path.with_suffix(".json")) as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return pixels_BFCHW


def _pixels(decoded_BFCHW: Tensor, path: Path) -> Tensor:
    """uint8, on the CPU, of numbers from -1 to 1. What is no number is black, which is said."""
    is_number = torch.isfinite(decoded_BFCHW)
    if not is_number.all():
        share = 1 - is_number.float().mean().item()
        notice(
            f"{path}: {share:.0%} of what was decoded are no finite numbers, and black in the clip; the weights are "
            "not sound, or an adapter is too strong: look at an earlier checkpoint, or at a lower strength"
        )
        decoded_BFCHW = decoded_BFCHW.nan_to_num(nan=-1, posinf=-1, neginf=-1)
    return ((decoded_BFCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def write_pixels(path: Path, pixels_BFCHW: Tensor, fps: float) -> None:
    write_clip(path, pixels_BFCHW[0].permute(0, 2, 3, 1).cpu().numpy(), fps)
