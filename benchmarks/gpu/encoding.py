"""What a live clip costs before its step, and how much of that `encode_ahead` hides behind the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu import networks, step
from benchmarks.gpu.report import Part
from benchmarks.gpu.sizes import Network, Scale
from benchmarks.gpu.timing import in_a_row_s, median_s
from reeltune.core.types import Batch
from reeltune.families.wan_fun import conditions
from reeltune.sampling.sample import Setup
from reeltune.training.prefetch import Prefetcher

TOGETHER = (1, 2)  # clips of a call of the VAE (`vae_mini_batch`)
CAPTION = "A red kite over a beach, seen from below, its tail in the wind, while the camera pans from left to right."


def measure(part: Part, scale: Scale, device: torch.device, checkpoint: Path, network: Network) -> None:
    """checkpoint: of the network that trains meanwhile."""
    frozen = networks.frozen(scale, device, torch.bfloat16)
    steps = step.Step(step.recipe_of(checkpoint, gradient_checkpointing="attention_kept"), network, scale)
    loaded = steps.setup.family.load(checkpoint, encoders=False, network=False)
    parts = replace(loaded, net=steps.setup.parts.net, frozen=frozen, loaders={}, device=device)
    setup = replace(steps.setup, parts=parts)
    _apart(part, setup, scale, device)
    steps()
    plain_s = in_a_row_s(steps, device, rounds=scale.rounds)
    batches = iter([_batch(scale, number) for number in range(1 + scale.rounds)])
    encode_s = median_s(lambda: setup.encode(next(batches)), device, warm_up=1, rounds=scale.rounds)
    taken = {ahead: _trained(steps, setup, scale, device, ahead=ahead) for ahead in (False, True)}
    part.row("step alone", seconds=plain_s)
    part.row("encoding alone, caption new", seconds=encode_s, of_a_step=encode_s / plain_s)
    part.row("step with its encoding, in turn", seconds=taken[False])
    hidden = (taken[False] - taken[True]) / encode_s
    part.row("step with encode_ahead", seconds=taken[True], hidden_of_encoding=hidden)


@torch.no_grad()
def _apart(part: Part, setup: Setup, scale: Scale, device: torch.device) -> None:
    counts = {"warm_up": 1, "rounds": scale.rounds}
    batch = _batch(scale, 0).to(device)
    vae = setup.parts.frozen["vae"]
    for clips in TOGETHER:
        name = f"VAE, clips together: {clips}"
        with part.attempt(name):
            pixels_BFCHW = batch.pixels_BFCHW.expand(clips, -1, -1, -1, -1).contiguous()
            seconds = median_s(lambda given=pixels_BFCHW: conditions.encode_clip(vae, given), device, **counts)
            part.row(name, seconds=seconds, a_clip_s=seconds / clips, frames_s=clips * scale.clip.frames / seconds)
    with part.attempt("text, one caption"):
        part.row(
            "text, one caption",
            seconds=median_s(lambda: conditions.encode_text(setup.parts, [CAPTION]), device, **counts),
        )
    with part.attempt("picture features"):
        picture = torch.zeros((1, 3, *scale.clip[1:]), dtype=torch.uint8, device=device)
        part.row(
            "picture features",
            seconds=median_s(lambda: conditions.image_features(setup.parts, picture), device, **counts),
        )


def _batch(scale: Scale, number: int) -> Batch:
    """As a reader gives it: page-locked where there is a GPU. Its caption has not been encoded before."""
    chance = torch.Generator().manual_seed(number)
    shape = (1, scale.clip.frames, 3, *scale.clip[1:])
    pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance) for _ in range(2)]
    batch = Batch(
        draws=[replace(step.draw_of(scale.clip), seed=number)],
        text=[f"{CAPTION} {number}"],
        pixels_BFCHW=pixels[0],
        control_BFCHW=pixels[1],
        ref_frame_B=torch.zeros(1, dtype=torch.int64),
        keep={name: torch.ones(1, dtype=torch.bool) for name in ("text", "control", "ref", "image")},
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _trained(steps: step.Step, setup: Setup, scale: Scale, device: torch.device, *, ahead: bool) -> float:
    """Seconds of a step, its batch encoded by the code that trains."""
    count = scale.rounds
    batches = [_batch(scale, 1000 + 100 * ahead + number) for number in range(1 + count)]

    def placed() -> Iterator[tuple[Batch, int, int]]:
        for i, batch in enumerate(batches):
            yield batch, 0, i + 1

    with Prefetcher(placed(), setup.encode, device=device, ahead=ahead) as prefetcher:

        def one() -> None:
            prefetcher.batch()
            steps.encoded = prefetcher.encoded()
            prefetcher.begin_next()
            steps()

        one()
        taken_s = in_a_row_s(one, device, rounds=count)
        prefetcher.wait()
    return taken_s
