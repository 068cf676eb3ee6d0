"""Noise -> clip, through the very functions that train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.types import Batch, Described, Encoded
from reeltune.data.loader import joined
from reeltune.data.media import write_clip
from reeltune.diffusion import denoise
from reeltune.diffusion.loss import Cond, settle
from reeltune.diffusion.objective import Objective
from reeltune.distributed.engine import Engine
from reeltune.families.spec import Family, Parts
from reeltune.run.model import choose_family, encode_options
from reeltune.run.sizes import size_rules
from reeltune.sampling.prompts import Request, prompt_requests
from reeltune.sampling.trained import load_trained

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

    def encode(self, batch: Batch) -> Encoded:
        """Sample by sample, because networks give other last bits in other batches; or as it came from the cache."""
        batch = batch.to(self.parts.device)
        encoded = batch.encoded or joined([self._encode_one(one) for one in batch.singles()])
        if "text" in encoded.keep:
            encoded.keep = encoded.keep | dict.fromkeys(self.family.caption, encoded.keep["text"])
        return encoded

    def _encode_one(self, batch: Batch) -> Encoded:
        described = None
        if not self.family.caption_sees_picture:
            known = self._describe(batch.text[0])
            described = Described({name: value.to(self.parts.device) for name, value in known.items()})
        return self.family.encode(self.parts, batch, self.mode, options=self.options, described=described)

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


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
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
    write: bool = True,
    weights: Mapping[str, str] | None = None,
) -> None:
    """Writes one clip, and its prompt, seed and settings into a .json of the same name; without `write` neither.

    weights: path and digest, into the .json too; previews lie beside the run whose weights they show.
    Raises CannotWriteError.
    """
    scheduler = denoise.sampler(setup.objective)
    with at_rest(net):
        encoded = setup.encode(batch)
        x0, cond = settle(encoded, [request.seed], setup.parts.null)
        x0 = denoise.sample(
            setup.denoise,
            net,
            setup.objective,
            cond,
            setup.parts.null | encoded.null,
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
            return
        pixels_BFCHW = setup.family.decode(setup.parts, x0)
    write_pixels(path, ((pixels_BFCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), request.fps)
    settings = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": type(scheduler).__name__,
        **batch.draws[0].shape._asdict(),
        "fps": request.fps,
        "control": request.control,
        "entry": request.entry,
        **({} if weights is None else {"weights": dict(weights)}),
    }
    with whole_file(path.with_suffix(".json")) as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_pixels(path: Path, pixels_BFCHW: Tensor, fps: float) -> None:
    write_clip(path, pixels_BFCHW[0].permute(0, 2, 3, 1).cpu().numpy(), fps)


def sample_clips(recipe: Recipe) -> list[Path]:
    """`reeltune sample`: a clip for each of validation_prompts into output_dir/samples, beside those that are there, by
    the weights of resume_from_checkpoint, or the recipe's."""
    validation, folder = recipe.validation, Path(recipe.output.output_dir) / "samples"
    if not validation.validation_prompts:
        raise UserError("validation_prompts", "is empty, so there is nothing to make; give a prompt or more")
    family, mode, objective = choose_family(recipe)
    prompts, paths, seed = validation.validation_prompts, validation.validation_paths, recipe.training.seed
    requests = prompt_requests(family, mode, prompts, paths, size_rules(recipe, family), seed=seed)
    engine = Engine(recipe.training.mixed_precision, allow_tf32=recipe.training.allow_tf32)
    parts, weights = load_trained(recipe, family, engine.device)
    setup = Setup(family, mode, parts, objective, engine.autocast, encode_options(recipe))
    first = 1 + max((int(path.stem) for path in folder.glob("*.mp4") if path.stem.isdecimal()), default=-1)
    made = [folder / f"{first + i}.mp4" for i in range(len(requests))]
    for path, request in zip(made, requests, strict=True):
        steps, scale = validation.preview_steps, validation.guidance_scale
        batch = request.batch()
        make_clip(setup, parts.net, request, batch, path, steps=steps, guidance_scale=scale, weights=weights)
    return made
