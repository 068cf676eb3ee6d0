"""Does it fit, by how much, and what would make it fit at the least price."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.rules import shown
from reeltune.estimate.result import StepEstimate
from reeltune.training.prefetch import encodes_ahead

MARGIN = 0.05  # within which the count may be off; what has less room than this is not called safe
TOLD = 3  # changes named
PCIE_BYTES_PER_S = 25e9  # of a x16 PCIe 4 link in practice; 31.5e9 by its standard


@dataclass(frozen=True)
class Verdict:
    totals: dict[str, int]  # phase -> bytes at its fullest moment
    have_bytes: int

    @property
    def phase(self) -> str:
        """The fullest."""
        return max(self.totals, key=lambda phase: self.totals[phase])

    @property
    def need_bytes(self) -> int:
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return self.need_bytes <= self.have_bytes

    @property
    def safe(self) -> bool:
        return self.need_bytes * (1 + MARGIN) <= self.have_bytes

    @property
    def spare_bytes(self) -> int:
        return self.have_bytes - self.need_bytes


def judge(peaks: dict[str, dict[str, int]], have_bytes: int) -> Verdict:
    return Verdict({phase: sum(parts.values()) for phase, parts in peaks.items()}, have_bytes)


@dataclass(frozen=True)
class Change:
    """One field of the recipe (or of the machines), and what it costs."""

    settings: dict[str, Any]  # fields of the recipe; or "gpus"
    cost: float  # to order by: more time as a share of a step; what changes the result comes after all that do not
    price: Callable[[StepEstimate, StepEstimate], str]
    """(as it is, with the change) -> the price in words."""

    @property
    def words(self) -> str:
        """As it is written in a recipe; the command's flag for what is no field of it."""
        return ", ".join(
            f"--{name} {value}" if name == "gpus" else f"{name}: {shown(value)}"
            for name, value in self.settings.items()
        )


def more_flops(before: StepEstimate, after: StepEstimate) -> str:
    return f"{step_flops(after) / step_flops(before) - 1:+.0%} arithmetic in a step, the same result"


def step_flops(found: StepEstimate) -> int:
    return sum(found.flops.get(phase, 0) for phase in ("encode", "forward", "backward"))


def visits(before: StepEstimate, after: StepEstimate) -> str:
    moved = 2 * sum(size for name, size in before.weight_bytes.items() if name != "network")
    return f"{moved / 2**30:.1f} GiB to and from the device each micro-step, {moved / PCIE_BYTES_PER_S:.1f} s of PCIe 4"


def journeys(before: StepEstimate, after: StepEstimate) -> str:
    """Of activations: to the machine's own memory and back."""
    moved = 2 * after.offloaded_bytes
    return f"{moved / 1e9:.0f} GB to and from the host in a step, {moved / PCIE_BYTES_PER_S:.1f} s of PCIe 4"


def swaps(before: StepEstimate, after: StepEstimate) -> str:
    """Of weights: to the device in both passes."""
    moved = 2 * after.swapped_bytes
    more = more_flops(before, after)
    return f"{moved / 1e9:.0f} GB to the device in a step, {moved / PCIE_BYTES_PER_S:.1f} s of PCIe 4; {more}"


def says(text: str) -> Callable[[StepEstimate, StepEstimate], str]:
    return lambda before, after: text


@dataclass(frozen=True)
class Offer:
    """Changes that together make it fit."""

    changes: tuple[Change, ...]
    verdict: Verdict
    prices: tuple[str, ...]


SAME, OTHER, MACHINES = 0.0, 10.0, 100.0  # in the order of cost: the same result, another, other machines


STATE = {"use_came": 1, "use_8bit_adam": 2, "use_adafactor": 3}  # what keeps less state than those before, and AdamW
# What several devices that share out the weights cannot do -> as they have it instead.
ALONE = {"step_in_backward": False, "blocks_to_swap": 0}
WHOLE = {**dict.fromkeys(STATE, False), "trained_weights": "fp32", "offload_activations": False, **ALONE}


def changes(recipe: Recipe, engine: str, gpus: int, still_blocks: int, *, tiles: bool) -> Iterator[Change]:
    """All that this run could change, one by one. still_blocks: of which nothing learns. tiles: the VAE has them."""
    training, optimization, memory = recipe.training, recipe.optimization, recipe.memory
    whole_on_each = engine in ("one", "ddp")
    if training.train_batch_size > 1:
        smaller = training.train_batch_size // 2
        times = training.gradient_accumulation_steps * training.train_batch_size // smaller
        settings = {"train_batch_size": smaller, "gradient_accumulation_steps": times}
        yield Change(settings, SAME + 0.02, says("as many samples a step, in smaller portions"))
    if recipe.cache.cache_folder is None:
        settings = {"cache_folder": f"{recipe.output.output_dir}/cache", "cache_variants": VARIANTS}
        words = f"`reeltune cache` before it, and its disk; each clip is read in {VARIANTS} ways and no more"
        yield Change(settings, SAME + 0.2, says(words))
    encode_ahead = encodes_ahead(memory.encode_ahead, on_gpu=True, low_vram=training.low_vram)
    if encode_ahead and recipe.cache.cache_folder is None:
        yield Change({"encode_ahead": False}, SAME + 0.05, says("nothing is encoded while the network trains"))
    if not training.low_vram and recipe.cache.cache_folder is None:
        yield Change({"low_vram": True}, SAME + 0.1, visits)
    if not training.gradient_checkpointing:
        yield Change({"gradient_checkpointing": True}, SAME + 0.3, more_flops)
    if not memory.offload_activations and whole_on_each:
        yield Change({"offload_activations": True}, SAME + 0.25, journeys)
    if not memory.step_in_backward and gpus == 1:
        yield Change({"step_in_backward": True}, SAME + 0.6, more_flops)
    if not memory.blocks_to_swap and gpus == 1 and still_blocks:
        yield Change({"blocks_to_swap": still_blocks}, SAME + 0.45, swaps)
    if gpus > 1 and recipe.parallel.context_parallel == 1:
        words = says("two devices share each clip, so that there are half as many in a step")
        yield Change({"context_parallel": 2}, SAME + 0.55, words)
    if not recipe.parallel.offload and not whole_on_each:
        yield Change({"offload": True}, SAME + 0.7, says("what is dealt out lives in the host's memory"))
    if gpus > 1 and whole_on_each:
        yield Change({"engine": "zero2"}, SAME + 0.4, says("bf16 copies compute; gradients and state are shared out"))
        yield Change({"engine": "fsdp"}, SAME + 0.5, says("weights are gathered block by block in each pass"))
    if tiles and not memory.vae_tiling and recipe.cache.cache_folder is None:
        yield Change({"vae_tiling": True}, OTHER - 0.1, says("latents differ a little near the seams of tiles"))
    if optimization.use_ema:
        yield Change({"use_ema": False}, OTHER, says("no moving average of the weights"))
    if recipe.model.trained_weights == "fp32" and training.mixed_precision == "bf16" and whole_on_each:
        rounded = "weights are rounded to bf16, up or down by chance, so that small updates count on average"
        yield Change({"trained_weights": "bf16_stochastic"}, OTHER + 0.1, says(rounded))
    used = [name for name in STATE if getattr(optimization, name)]
    for name, cost in (("use_8bit_adam", 0.2), ("use_came", 0.3), ("use_adafactor", 0.35)):
        if all(STATE[name] > STATE[other] for other in used):
            eight = name == "use_8bit_adam" and not used
            rounded, other = "the optimizer's moments are rounded to 8 bits", "another optimizer: find its rate anew"
            yield Change({**dict.fromkeys(used, False), name: True}, OTHER + cost, says(rounded if eight else other))
    if recipe.sizes.video_sample_n_frames > SHORT:
        frames = recipe.sizes.video_sample_n_frames // 2 // 4 * 4 + 1
        yield Change({"video_sample_n_frames": frames}, OTHER + 0.4, says("half as much of a clip at a time"))
    for more in (2, 4, 8):
        if more > gpus:
            words = says(f"{more} devices in place of {gpus}, and a fast link between them")
            settings = flat(recipe)
            back = {name: value for name, value in WHOLE.items() if settings[name] != value}
            yield Change({"gpus": more, "engine": "fsdp", **back}, MACHINES * more, words)


VARIANTS = 4  # as many as the recipe's rules advise for clips longer than their window
SHORT = 9  # frames that are not halved


TRIES = 8  # sets of several changes that are rehearsed


def search(
    candidates: list[Change],
    goes: Callable[[tuple[Change, ...]], bool],
    try_out: Callable[[tuple[Change, ...]], tuple[Verdict, StepEstimate]],
    before: tuple[Verdict, StepEstimate],
) -> list[Offer]:
    """The cheapest sets of changes, up to TOLD, that make it fit with room to spare: single ones before pairs.

    A set that holds one already offered is not, nor one whose changes do not go together. Sets whose changes, as far
    as is known of them alone and in smaller sets, save too little are not rehearsed, nor those with one to spare.
    """
    found: list[tuple[frozenset[int], Offer]] = []
    known: dict[frozenset[int], dict[str, int]] = {frozenset(): before[0].totals}
    room = before[0].have_bytes / (1 + MARGIN)
    tries = 0

    def consider(chosen: frozenset[int]) -> None:
        picked = tuple(candidates[i] for i in sorted(chosen))
        verdict, rehearsal = try_out(picked)
        known[chosen] = verdict.totals
        if verdict.safe:
            prices = tuple(change.price(before[1], rehearsal) for change in picked)
            found.append((chosen, Offer(picked, verdict, prices)))

    def expected(chosen: frozenset[int]) -> int:
        """Bytes at the fullest, if each change saves what it saves alone, after the smaller set if that is known."""
        smaller = [chosen - {i} for i in chosen if chosen - {i} in known]
        start = min(smaller, key=lambda part: max(known[part].values())) if smaller else frozenset[int]()
        left = dict(known[start])
        for i in chosen - start:
            for phase, size in before[0].totals.items():
                left[phase] = left.get(phase, 0) - size + known[frozenset({i})].get(phase, 0)
        return max(left.values())

    def hopeful(chosen: frozenset[int]) -> bool:
        names = [name for i in chosen for name in candidates[i].settings]
        if len(set(names)) < len(names) or any(offered <= chosen for offered, _ in found) or expected(chosen) > room:
            return False
        spare = (chosen - {i} for i in chosen)
        if any(part not in known and expected(part) <= room for part in spare):
            return False
        return goes(tuple(candidates[i] for i in chosen))

    def cost(chosen: Iterable[int]) -> float:
        return sum(candidates[i].cost for i in chosen)

    for i in range(len(candidates)):
        consider(frozenset({i}))
    for size in range(2, len(candidates) + 1):
        if len(found) >= TOLD:
            break
        for chosen in map(frozenset, sorted(combinations(range(len(candidates)), size), key=cost)):
            if len(found) < TOLD and tries < TRIES and hopeful(chosen):
                tries += 1
                consider(chosen)
    return [offer for _, offer in sorted(found, key=lambda pair: cost(pair[0]))[:TOLD]]
