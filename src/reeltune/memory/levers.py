"""The settings that spare memory, one row each: refusals, `plan`'s remedies, the message of a full device and
docs/memory.md come from this table.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator

from reeltune.memory.lever import (
    CHOSEN,
    RANK,
    SEEN,
    SHARDED,
    SHORT,
    TRAINED,
    VARIANTS,
    WHERE_NOTHING_IS_KEPT,
    Exclusion,
    Lever,
    Settings,
    Values,
    a_cache,
    a_coarser_base,
    adapters_instead,
    all_frozen_blocks,
    encode_between,
    encoders_in_bf16,
    half_as_long,
    half_the_batch,
    keep,
    more_devices,
    not_in,
    one_by_one,
    prodigy,
    several,
    sharded_by,
    tiles,
    two_to_a_clip,
)


def excluded(values: Values) -> Iterator[tuple[Lever, Exclusion]]:
    """The levers pulled with what they do not go with."""
    for lever in LEVERS:
        if lever.pulled(values):
            yield from ((lever, exclusion) for exclusion in lever.excludes if exclusion.applies(values))


def pulled_alone(values: Values) -> list[str]:
    """Settings in use that several processes cannot have."""
    return [lever.setting for lever in LEVERS if lever.alone and lever.pulled(values)]


def offered(values: Values) -> Iterator[tuple[Lever, Settings]]:
    """The levers not pulled yet that such a run can pull, and what to write for that, the cheapest first. Nothing is
    written that goes with no lever already pulled."""
    for lever in LEVERS:
        idle = lever.pulled(values) or any(values[name] for name in lever.unless)
        fits = all(exclusion.permits(values[exclusion.setting]) for exclusion in lever.excludes)
        if fits and not idle and not (lever.alone and several(values)):
            for settings in lever.options(values):
                if "engine" in settings:
                    settings |= given_up(values, settings["engine"])
                if not any(excluded({**values, **settings})):
                    yield lever, settings


def given_up(values: Values, engine: str) -> Settings:
    """What does not go with several processes under that engine, turned off, the dearest first."""
    sharded = {**values, "engine": engine}
    barred = {lever.setting for lever, exclusion in excluded(sharded) if exclusion.setting == "engine"}
    barred |= set(pulled_alone(sharded))
    return {lever.setting: lever.off for lever in reversed(LEVERS) if lever.setting in barred}


# The cheapest first: with the same bits, with others, with more devices. docs/memory.md says what figures are of.
LEVERS: tuple[Lever, ...] = (
    Lever(
        "train_batch_size",
        1,
        "activations of all samples but one",
        "more passes, of smaller portions: `gradient_accumulation_steps` for as many samples a step",
        "as many samples a step, in smaller portions",
        phases=TRAINED | {"encode"},
        changes=half_the_batch,
    ),
    Lever(
        "encode_ahead",
        False,
        "what encoding takes at its fullest, beside the step's own",
        "encoding is no longer done while the network trains",
        "nothing is encoded while the network trains",
        phases=TRAINED | {"encode", "step"},
        unless=("cache_folder",),
        changes=encode_between,
    ),
    Lever(
        "keep_gathered",
        False,
        "weights that `engine: fsdp` keeps whole between forward and backward pass",
        "they are gathered a second time",
        phases=TRAINED,
    ),
    Lever(
        "low_vram",
        True,
        "VAE and encoders between uses",
        "two journeys of their weights a step; [a cache](cache.md) spares both",
        "{visits_gib:.1f} GiB to and from the device each micro-step, {visits_s:.1f} s of PCIe 4",
        excludes=(
            Exclusion(
                "encode_ahead",
                "; the one has encoders at work while the network trains, the other has them off the device then; "
                "leave one of the two out",
                refused=(True,),
            ),
        ),
        unless=("cache_folder",),
    ),
    Lever(
        "cache_folder",
        None,
        "VAE and encoders, and what encoding takes",
        "[`reeltune cache`](cache.md) before it, and its disk; each clip is read in `cache_variants` ways and no more",
        f"`reeltune cache` before it, and its disk; each clip is read in {VARIANTS} ways and no more",
        beside={"low_vram": SEEN},
        in_use=bool,
        changes=a_cache,
        label="`cache_folder`",
        advice="cache_folder, which `reeltune cache` fills before",
    ),
    Lever(
        "preview_count",
        0,
        "what previews of held-out clips take",
        "no previews",
        phases=frozenset({"preview"}),
        unless=("validation_prompts",),
    ),
    Lever(
        "gradient_checkpointing",
        "products_kept",
        "activations within blocks, but what linear layers and attention gave (0.31 left at 33,000 tokens)",
        "1.17 of the time at few tokens; at 33,000 counted 1.005 of the arithmetic",
        "{more_flops:+.0%} arithmetic in a step, the same result",
        phases=TRAINED,
        excludes=WHERE_NOTHING_IS_KEPT,
        changes=keep("products_kept", where=(False,)),
    ),
    Lever(
        "gradient_checkpointing",
        "attention_kept",
        "activations within blocks, but what attention gave (0.05 left at 33,000 tokens, [counted](speed.md))",
        "1.28 of the time at few tokens; at 33,000 counted 1.09 of the arithmetic, 1.30 by `true`",
        "{more_flops:+.0%} arithmetic in a step, the same result",
        phases=TRAINED,
        excludes=WHERE_NOTHING_IS_KEPT,
        changes=keep("attention_kept", where=(False, "products_kept")),
    ),
    Lever(
        "gradient_checkpointing",
        True,
        "all activations within blocks (0.35 left)",
        "1.33 of the time",
        "{more_flops:+.0%} arithmetic in a step, the same result",
        phases=TRAINED,
    ),
    Lever(
        "gradient_checkpointing_share",
        1.0,
        "half of those (0.56 left)",
        "1.16 of the time",
        "{more_flops:+.0%} arithmetic in a step, the same result",
        phases=TRAINED,
        label="`gradient_checkpointing_share: 0.5`",
    ),
    Lever(
        "offload_activations",
        True,
        "activations, to the CPU's memory (0.04 left); beside `gradient_checkpointing` blocks' inputs too (0.26 left)",
        "the way there and back: measured without a GPU, a copy each, 1.09; beside `gradient_checkpointing` of far "
        "fewer bytes",
        "{offloaded_gb:.0f} GB to and from the host in a step, {offloaded_s:.1f} s of PCIe 4",
        phases=TRAINED,
        excludes=(not_in(SHARDED, "use gradient_checkpointing, or engine ddp"),),
    ),
    Lever(
        "blocks_to_swap",
        0,
        "weights of blocks that do not learn, but of two blocks at a time",
        "two journeys of the weights a step, and those blocks are recomputed: 1.46 without any way to go",
        "{swapped_gb:.0f} GB to the device in a step, {swapped_s:.1f} s of PCIe 4; {more_flops:+.0%} arithmetic in a "
        "step, the same result",
        alone=True,
        off=0,
        in_use=bool,
        changes=all_frozen_blocks,
        label="`blocks_to_swap`",
    ),
    Lever(
        "engine",
        "zero2",
        "gradients and optimizer state, but for each process's share",
        "[several processes](clusters.md); bf16 copies compute",
        "bf16 copies compute; gradients and state are sharded",
        unless=CHOSEN,
        in_use=SHARDED.__contains__,
        changes=sharded_by("zero2"),
    ),
    Lever(
        "engine",
        "fsdp",
        "weights, gradients and optimizer state, but for each process's share and two blocks' weights",
        "[several processes](clusters.md), which gather weights block by block in each pass",
        "weights are gathered block by block in each pass",
        unless=CHOSEN,
        in_use=SHARDED.__contains__,
        changes=sharded_by("fsdp"),
    ),
    Lever(
        "context_parallel",
        2,
        "activations of the part of each clip that another process has",
        "[several processes](context_parallel.md); half as many clips in a step",
        "two devices share each clip, so that there are half as many in a step",
        phases=TRAINED,
        in_use=lambda count: count > 1,
        changes=two_to_a_clip,
    ),
    Lever(
        "step_in_backward",
        True,
        "all gradients but one",
        "without clipping nothing (1.04), with clipping a second backward pass (1.69)",
        "{more_flops:+.0%} arithmetic in a step, the same result",
        phases=frozenset({"backward", "step"}),
        alone=True,
        excludes=(
            Exclusion(
                "gradient_accumulation_steps",
                "; it keeps no gradients to add to; use 1, or leave step_in_backward out",
                allowed=(1,),
            ),
            Exclusion(
                "mixed_precision",
                "; whose loss scale is known only when all gradients are there; use bf16",
                refused=("fp16",),
            ),
            prodigy("leave step_in_backward out"),
        ),
        advice="step_in_backward: true, with one process",
    ),
    Lever(
        "offload",
        True,
        "what is sharded, to the CPU's memory",
        "the way there and back in each step",
        "what is sharded lives in the host's memory",
        excludes=(
            Exclusion("engine", f"; it is of {' or '.join(SHARDED)}; use one, or leave it out", allowed=SHARDED),
        ),
    ),
    Lever(
        "vae_mini_batch",
        1,
        "what VAE and picture encoder are working on, of all clips but one",
        "a call for each clip",
        phases=frozenset({"encode"}),
        same_bits=False,
        unless=("cache_folder",),
        in_use=one_by_one,
    ),
    Lever(
        "vae_tiling",
        True,
        "the VAE's activations, on clips larger than a tile",
        "latents differ near seams; seams are worked on twice",
        "latents differ a little near the seams of tiles",
        phases=SEEN,
        same_bits=False,
        unless=("cache_folder",),
        changes=tiles,
    ),
    Lever(
        "encoder_weights",
        "bf16",
        "half of VAE and encoders that are in fp32",
        "latents and text features are rounded; a [cache](cache.md) is filled anew",
        "latents and text features are rounded",
        beside={"low_vram": SEEN},
        same_bits=False,
        unless=("cache_folder",),
        changes=encoders_in_bf16,
    ),
    Lever(
        "base_weights",
        "int8",
        "beside adapters, half of the weights in blocks that do not learn (1.0 byte each; `fp8` as much, `nf4` 0.6)",
        "what the network answers is [a little coarser](memory.md#base-weights-in-8-or-4-bits); weights are made whole "
        "again in each pass",
        "the network's answers are a little coarser",
        same_bits=False,
        off=None,
        in_use=bool,
        changes=a_coarser_base,
        label="`base_weights: int8`",
    ),
    Lever(
        "use_ema",
        False,
        "4 bytes for each trained parameter",
        "no moving average of the weights",
        same_bits=False,
    ),
    Lever(
        "trained_weights",
        "bf16_stochastic",
        "half of weights and gradients",
        "chance in the last bits; on average what fp32 learns",
        "weights are rounded to bf16, up or down by chance, so that small updates count on average",
        same_bits=False,
        excludes=(
            Exclusion(
                "mixed_precision",
                "; weights in bf16 are computed with in bf16; set mixed_precision to bf16, or trained_weights to fp32",
                allowed=("bf16",),
            ),
            not_in(SHARDED, "use fp32"),
            prodigy("use fp32"),
        ),
        off="fp32",
    ),
    Lever(
        "use_8bit_adam",
        True,
        "6 of AdamW's 8 bytes of state",
        "both moments are rounded to 8 bits",
        "AdamW with both moments rounded to 8 bits",
        same_bits=False,
        excludes=(not_in(SHARDED, "leave it out: the state is sharded already"),),
        unless=("use_adafactor", *CHOSEN),
        replaces=("use_came",),
    ),
    Lever(
        "use_came",
        True,
        "4 of the 8 bytes",
        "another optimizer: find its rate anew",
        same_bits=False,
        excludes=(not_in(("fsdp",), "use AdamW, or engine ddp"),),
        unless=("use_8bit_adam", "use_adafactor", *CHOSEN),
    ),
    Lever(
        "use_adafactor",
        True,
        "all 8 bytes",
        "another optimizer without momentum; its rate is relative to the weights' size",
        "another optimizer: find its rate anew",
        same_bits=False,
        excludes=(not_in(SHARDED, "use AdamW, or engine ddp"),),
        unless=CHOSEN,
        replaces=("use_8bit_adam", "use_came"),
    ),
    Lever(
        "rank",
        RANK,
        "all gradients and optimizer state but those of adapters; weights in half the bytes of fp32",
        "[adapters](adapters.md) learn and the network does not; their rate is another, 1e-4 to begin with",
        "adapters learn and the network does not; their rate is another, 1e-4 to begin with",
        same_bits=False,
        in_use=bool,
        changes=adapters_instead,
        label=f"`rank: {RANK}`",
        advice=f"train adapters (rank: {RANK})",
    ),
    Lever(
        "video_sample_n_frames",
        SHORT,
        "activations of the frames left out; smaller pictures by the sample sizes do the same",
        "shorter clips",
        "half as much of a clip at a time",
        phases=TRAINED | SEEN,
        same_bits=False,
        changes=half_as_long,
        label="`video_sample_n_frames`",
        advice="smaller clips by video_sample_n_frames or the sample sizes",
    ),
    Lever(
        "gpus",
        None,
        "all that is sharded, by more devices",
        "those devices, and a fast link between them",
        "{gpus} devices, and a fast link between them",
        same_bits=False,
        unless=CHOSEN,
        in_use=lambda _: False,
        changes=more_devices,
        label="more devices, with `engine: fsdp`",
        advice="more devices",
    ),
)
