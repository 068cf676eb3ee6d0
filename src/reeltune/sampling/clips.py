"""`reeltune sample`: clips of prompts by one network, for several seeds, with adapters at several strengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from reeltune.config.recipe import Recipe, Validation
from reeltune.core.errors import UserError, first_words, lacks_memory, refuse
from reeltune.distributed.engine import Engine
from reeltune.run.adapters import MOST_STRENGTH
from reeltune.run.folder import within_checkpoint
from reeltune.run.model import choose_family, encode_options
from reeltune.run.sizes import size_rules
from reeltune.sampling.numbers import free_numbers
from reeltune.sampling.other_expert import OtherExpert
from reeltune.sampling.prompts import Request, drawn_controls, notice_cut, requests_of
from reeltune.sampling.sample import Setup, make_clip
from reeltune.sampling.sheet import write_sheet
from reeltune.sampling.trained import Trained, load_trained, of_both


def sample_clips(
    recipe: Recipe, *, adapters: Sequence[str] = (), strengths: Sequence[float] = (), seeds: Sequence[int] = ()
) -> list[Path]:
    """A clip for each of validation_prompts into output_dir/samples, beside those that are there, by the weights of
    resume_from_checkpoint, or the recipe's.

    adapters: FILE:strength each. strengths: a clip for each, with every adapter at its own strength times that, and a
    picture of them all, a row for each prompt and seed. seeds: a clip for each, in place of seed, seed + 1 and so on.
    Returns the files of clips, and of the picture. Raises UserError.
    """
    validation, folder = recipe.validation, Path(recipe.output.output_dir) / "samples"
    _refuse(recipe, adapters, strengths, seeds)
    recipe = of_both(recipe)
    family, mode, objective = choose_family(recipe)
    drawn, _ = drawn_controls(recipe, family, mode)
    requests = requests_of(recipe, family, mode, size_rules(recipe, family), drawn)
    requests = [replace(one, seed=own) for one in requests for own in seeds or (one.seed,)]
    notice_cut(family, [("negative_prompt", validation.negative_prompt)])
    training = recipe.training
    columns = strengths or (1.0,)
    with free_numbers(folder, len(columns) * len(requests)) as numbers, _told_when_full():
        engine = Engine(training.mixed_precision, allow_tf32=training.allow_tf32, deterministic=training.deterministic)
        trained = load_trained(recipe, family, engine.device, adapters)
        other = OtherExpert.of(recipe, family, engine.device)
        if strengths and not (trained.adapters or (other and other.adapter)):
            raise UserError("sample", "strengths are given and no adapter; give --adapters, or a checkpoint with one")
        setup = Setup(family, mode, trained.parts, objective, engine.autocast, encode_options(recipe), other)
        made = [folder / f"{number}.mp4" for number in numbers]
        clips = [made[i : i + len(columns)] for i in range(0, len(made), len(columns))]
        frames = _make(setup, other, trained, validation, requests, clips, columns)
        if not strengths:
            return made
        sheet = folder / f"{numbers[0]}-{numbers[-1]}.png"
        write_sheet(
            sheet,
            frames,
            rows=[f"seed {request.seed}: {request.prompt}" for request in requests],
            columns=[f"strength {strength:g}" for strength in strengths],
        )
        return [*made, sheet]


@contextmanager
def _told_when_full() -> Iterator[None]:
    """Within, lack of memory while clips are made becomes UserError; that of loading says more, and is one already."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(
            "memory",
            f"memory is full while clips are made ({first_words(error)}); make smaller ones, by video_sample_n_frames, "
            "video_sample_size or fix_sample_size, or set low_vram or vae_tiling",
        ) from error


def _refuse(recipe: Recipe, adapters: Sequence[str], strengths: Sequence[float], seeds: Sequence[int]) -> None:
    problems = []
    if not recipe.validation.validation_prompts:
        problems.append("validation_prompts is empty, so there is nothing to make; give a prompt or more")
    problems += [f"output_dir {line}" for line in within_checkpoint(Path(recipe.output.output_dir))]
    if adapters and recipe.model.expert == "both":
        problems.append(
            f"adapters is {' '.join(adapters)} and expert is both, which are two networks, and an adapter is of one; "
            "set expert to the one that it is of, and give the other's in other_expert_adapter"
        )
    problems += [
        f"strengths has {strength:g}; give numbers up to {MOST_STRENGTH:g}; 1 is as it was trained"
        for strength in strengths
        if not abs(strength) <= MOST_STRENGTH
    ]
    if any(seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        problems.append(f"seeds is {' '.join(map(str, seeds))}; give whole numbers from 0, none of them twice")
    refuse("sample", problems)


def _make(
    setup: Setup,
    other: OtherExpert | None,
    trained: Trained,
    validation: Validation,
    requests: Sequence[Request],
    clips: Sequence[Sequence[Path]],
    factors: Sequence[float],
) -> list[list[np.ndarray]]:
    """Returns each clip's middle frame, uint8_HWC, as `clips` has their paths: a row a request, a column a factor."""
    frames: list[list[np.ndarray]] = [[] for _ in requests]
    for column, factor in enumerate(factors):
        shown = setup if other is None or factor == 1 else replace(setup, other=other.times(factor))
        with trained.at(factor, keep=len(factors) > 1):
            for row, request in enumerate(requests):
                pixels_BFCHW = make_clip(
                    shown,
                    trained.parts.net,
                    request,
                    request.batch(),
                    clips[row][column],
                    steps=validation.preview_steps,
                    guidance_scale=validation.guidance_scale,
                    negative_prompt=validation.negative_prompt,
                    shown=trained.told(factor),
                )
                assert pixels_BFCHW is not None  # it was to be written
                frames[row].append(pixels_BFCHW[0, pixels_BFCHW.shape[1] // 2].permute(1, 2, 0).numpy().copy())
    return frames
