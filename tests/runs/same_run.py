"""Whether two runs are one: the same weights, optimizer state, numbers and account, bit for bit."""

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from reeltune.checkpoint.folder import parts, progress_of
from reeltune.checkpoint.state import Shared
from reeltune.distributed.sharded_io import whole
from reeltune.training.learner import Learner

# Kinds and fields that an interrupted and resumed run repeats bit for bit; the rest are clock and memory.
DETERMINISTIC = {
    "step": ("step", "epoch", "loss", "grad_norm", "lr", "shape", "samples", "tokens"),
    "validation": ("step", "start_step", "loss", "loss_start", "difference", "band95", "per_band", "n"),
    "obedience": ("step", "start_step", "score", "score_start", "difference", "band95", "truth", "previews", "n"),
}


class StopAfter:
    """Sends this process SIGTERM in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def __enter__(self):
        def step(learner, step, rate, real=Learner.step):
            if step == self.step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(learner, step, rate)

        self.real_step = Learner.step
        Learner.step = step

    def __exit__(self, *_):
        Learner.step = self.real_step


def rows(out: Path, kinds=tuple(DETERMINISTIC)) -> list[dict]:
    """The lines of metrics.jsonl, without clock and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: row.get(name) for name in DETERMINISTIC[row["kind"]]} for row in lines if row["kind"] in kinds]


def assert_same_end(ours: Path, theirs: Path, step: int = 6, kinds=tuple(DETERMINISTIC)) -> None:
    assert_same_checkpoint(ours / f"checkpoint-{step}", theirs / f"checkpoint-{step}")
    assert rows(ours, kinds) == rows(theirs, kinds)
    assert (ours / "ledger.json").read_text() == (theirs / "ledger.json").read_text()
    assert (ours / "ledger.csv").read_text() == (theirs / "ledger.csv").read_text()


def assert_same_checkpoint(a: Path, b: Path) -> None:
    assert parts(a).keys() == parts(b).keys()
    for one, other in zip(parts(a).values(), parts(b).values(), strict=True):
        assert_same_network(one, other)
    if not parts(a):
        assert_same_network(a, b)
    assert progress_of(a) == progress_of(b)


def assert_same_network(a: Path, b: Path) -> None:
    """Of a checkpoint, or a part of it."""
    for name in (".", "transformer", "transformer_ema", "adapter", "adapter_ema"):
        assert (a / name).is_dir() == (b / name).is_dir()
        for path in (a / name).glob("*.safetensors"):
            assert_equal(load_file(path), load_file(b / name / path.name))
    if (a / "shares").is_dir():
        assert_equal(shares(a), shares(b))
    else:
        assert_equal(*(torch.load(folder / "optimizer.pt", weights_only=True) for folder in (a, b)))


def same_checkpoint(a: Path, b: Path) -> bool:
    try:
        assert_same_checkpoint(a, b)
    except AssertionError:
        return False
    return True


def shares(checkpoint: Path) -> dict:
    """All that several processes wrote: every tensor, flattened and whole, and the numbers beside them."""
    held = Shared(checkpoint)
    tensors = {name: torch.empty(count, dtype=dtype) for name, (count, dtype) in held.sizes.items()}
    held.fill(whole(name, tensor) for name, tensor in tensors.items())
    return tensors | json.loads((held.folder / "outline.json").read_text())


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
