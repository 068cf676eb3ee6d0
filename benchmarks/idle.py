"""How long ranks wait for the slowest: a simulation over real plans, ours beside each rank drawing its own size.

The cost of a sample is what Wan2.1-14B computes for its tokens (all matrices of a block that every token passes) and
for its attention (every token with every other and with the caption's); of all ranks' times of a micro-step the
longest is the one that all wait for. Reading and encoding are left out: they run beside, or are alike for one size.

The rule beside ours is that of the original scripts, in which every process draws from its own part of the data and
its own generator: a rank's next micro-step is then the next of a plan for one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace

import numpy as np

from reeltune.core.types import Geometry
from reeltune.data.plan import Measures, Plan
from reeltune.data.shapes import SizeRules

RANKS = (8, 64, 256, 1024)
RECORDS, SEED = 200_000, 0
MICRO_STEPS = 64  # looked at, for each number of ranks
EPOCHS = 100  # of a run: the default of num_train_epochs
# Wan2.1-14B: https://huggingface.co/Wan-AI/Wan2.1-T2V-14B/blob/main/config.json
LAYERS, WIDTH, FEED_FORWARD, TEXT_TOKENS = 40, 5120, 13824, 512
RULES = SizeRules(  # of the guide's commands for Wan2.1-Fun-Control
    video_sample_n_frames=81,
    video_sample_stride=2,
    video_sample_size=256,
    image_sample_size=1024,
    token_sample_size=512,
    enable_bucket=True,
    random_hw_adapt=True,
    training_with_video_token_length=True,
    geometry=Geometry(),
)
ASPECTS = {  # height, width: share of clips
    (1080, 1920): 0.45,
    (720, 1280): 0.2,
    (1920, 1080): 0.15,
    (1280, 720): 0.05,
    (1080, 1440): 0.05,
    (1080, 1080): 0.05,
    (800, 1920): 0.05,
}


def flops(tokens: int) -> float:
    """Of a sample's forward pass; the backward pass is twice as much, which changes no share."""
    weights = 6 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD  # q k v o, cross-attention's q o, feed-forward
    return LAYERS * tokens * (2.0 * weights + 4.0 * WIDTH * (tokens + TEXT_TOKENS))


def idle_share(costs_KR: np.ndarray) -> float:
    """Of all ranks' time, what they wait for the costliest of their micro-step. costs: micro-steps by ranks."""
    return 1 - float(costs_KR.sum() / (costs_KR.max(axis=1).sum() * costs_KR.shape[1]))


def records() -> Measures:
    """Clips of 2 to 20 seconds at 24 frames per second, in the aspects above, and one picture to ten clips."""
    random = np.random.RandomState(SEED)
    sizes = np.array(list(ASPECTS))[random.choice(len(ASPECTS), RECORDS, p=list(ASPECTS.values()))]
    video = random.random_sample(RECORDS) < 10 / 11
    seconds = np.exp(random.uniform(np.log(2), np.log(20), RECORDS))

    class Made(SimpleNamespace):
        def __len__(self) -> int:
            return RECORDS

    frames = np.where(video, (24 * seconds).astype(np.int64), 1)
    return Made(kind_video=video, frames=frames, fps=np.full(RECORDS, 24.0), height=sizes[:, 0], width=sizes[:, 1])


def ours(plan: Plan, ranks: int, micro_steps: Sequence[int]) -> np.ndarray:
    """Costs by micro-step and rank, one sample a rank."""
    tokens = RULES.geometry.tokens
    return np.array([[flops(tokens(draw.shape)) for draw in plan.share(k, 0, ranks)] for k in micro_steps])


def each_its_own(plan: Plan, ranks: int, count: int) -> np.ndarray:
    """The same where the plan is of one rank, and each takes the next of its micro-steps."""
    costs = (flops(RULES.geometry.tokens(plan[k][0].shape)) for k in range(len(plan)))
    return np.array(list(islice(_rows(costs, ranks), count)))


def _rows(costs: Iterator[float], ranks: int) -> Iterator[list[float]]:
    while len(row := list(islice(costs, ranks))) == ranks:
        yield row


def repeated(plan: Plan, epochs: int) -> float:
    """Share of a run's samples that fill up its last group of each kind of clip."""
    return plan.repeats(epochs) / (plan.micro_steps_before(epochs) * plan.group)


def main() -> dict[str, float]:
    held = records()
    alone = Plan(held, RULES, group=1, seed=SEED)
    found = {}
    for ranks in RANKS:
        plan = Plan(held, RULES, group=ranks, seed=SEED)
        looked_at = np.linspace(0, len(plan) - 1, min(MICRO_STEPS, len(plan))).astype(int).tolist()
        found[f"idle_{ranks}"] = idle_share(ours(plan, ranks, looked_at))
        found[f"idle_apart_{ranks}"] = idle_share(each_its_own(alone, ranks, MICRO_STEPS))
        found[f"repeats_{ranks}"] = repeated(plan, EPOCHS)
        print(
            f"{ranks} ranks wait {found[f'idle_{ranks}']:.2%} of their time; each drawing its own size they would wait "
            f"{found[f'idle_apart_{ranks}']:.1%}; of a run's samples {repeated(plan, EPOCHS):.2%} fill up "
            f"its last groups in {EPOCHS} epochs, {repeated(plan, 10):.1%} in 10, {repeated(plan, 1):.1%} in one"
        )
    return found


if __name__ == "__main__":
    main()
