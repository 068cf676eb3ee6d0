"""Our training step against a bare forward, backward and optimizer step of the same network and batch.

One process runs the real loop on a small Wan2.1-Fun-Control network; after each of its steps a bare one runs on a copy
of the network with the very input of that step. Reading and encoding are left out of ours, which both would need
alike, and every step gets the same two clips, encoded once. Seconds are of one thread's processor time, which other
programs on the machine change little.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import mse_loss

from reeltune.config.recipe import Data, Model, Optimization, Output, Recipe, Sizes, Training, Validation
from reeltune.core.types import Batch, Encoded
from reeltune.data.media import write_clip
from reeltune.diffusion.loss import gaussian, settle
from reeltune.distributed.engine import Stopwatch
from reeltune.reporting.log import Log
from reeltune.sampling.sample import Setup
from reeltune.training import loop as training
from reeltune.training import loss as training_loss
from tests.families.tiny_wan import tiny_checkpoint

FRAMES, SIDE, BATCH = 9, 224, 2
STEPS, WARM_UP = 34, 4


class Pair:
    """Runs a bare step after each of ours, and keeps the seconds of both."""

    def __init__(self):
        self.ours_s: list[float] = []
        self.bare_s: list[float] = []
        self.bare: Callable[[], None] | None = None
        self.net = self.optimizer = None
        self.left_off = time.process_time()

    def loss(self, denoise, net, objective, encoded, null, seeds, *rest, **settings):
        """Stands before diffusion_loss: remembers what the bare step needs, then lets it go on."""
        begin = time.process_time()
        if self.net is None:
            self.net = copy.deepcopy(net)
            self.optimizer = torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-4)
        with torch.no_grad():
            x0, cond = settle(encoded, seeds, null)
            target, level_B = gaussian(x0, seeds, "bare"), torch.full((len(x0),), 0.5)

        def bare() -> None:
            mse_loss(denoise(self.net, x0, objective.timestep(level_B), cond).float(), target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        self.bare = bare
        self.left_off += time.process_time() - begin
        return self.diffusion_loss(denoise, net, objective, encoded, null, seeds, *rest, **settings)

    def log(self, log: Log, row: dict, seconds: Callable[[], dict[str, float]]) -> None:
        """Stands around Log.step, the last thing our step does."""
        self.log_step(log, row, seconds)
        now, parts = time.process_time(), seconds()
        self.ours_s.append(now - self.left_off - parts["data_s"] - parts["encode_s"])
        begin = time.process_time()
        self.bare()
        self.left_off = time.process_time()
        self.bare_s.append(self.left_off - begin)

    def run(self, recipe: Recipe) -> None:
        self.diffusion_loss, self.log_step, encode = training_loss.diffusion_loss, Log.step, Setup.encode
        encoded: list[Encoded] = []

        def encode_once(setup: Setup, batch: Batch) -> Encoded:
            if not encoded:
                encoded.append(encode(setup, batch))
            return encoded[0]

        with (
            mock.patch.object(training_loss, "diffusion_loss", self.loss),
            mock.patch.object(Log, "step", lambda *given: self.log(*given)),
            mock.patch.object(Setup, "encode", encode_once),
            mock.patch.object(Stopwatch, "_now", lambda _: time.process_time()),
        ):
            assert training.train(recipe) == 0


def make_data(folder: Path) -> Path:
    entries = []
    for i in range(BATCH):
        noise = np.random.RandomState(i).randint(0, 256, (FRAMES, SIDE // 8, SIDE // 8, 3)).astype(np.uint8)
        clip = np.kron(noise, np.ones((1, 8, 8, 1), np.uint8))
        for name in (f"{i}.mp4", f"{i}_control.mp4"):
            write_clip(folder / name, clip, 8)
        entries.append({"file_path": f"{i}.mp4", "control_file_path": f"{i}_control.mp4", "text": "a", "type": "video"})
    meta = folder / "metadata.json"
    meta.write_text(json.dumps(entries))
    return meta


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = tiny_checkpoint(folder / "model", "control_v1.1", width=256, heads=4, layers=6)
        recipe = Recipe(
            model=Model(pretrained_model_name_or_path=str(checkpoint), control_ref_image="random"),
            data=Data(train_data_dir=str(folder), train_data_meta=str(make_data(folder)), dataloader_num_workers=0),
            sizes=Sizes(video_sample_n_frames=FRAMES, video_sample_stride=1, fix_sample_size=(SIDE, SIDE)),
            training=Training(train_batch_size=BATCH, max_train_steps=STEPS, mixed_precision="no"),
            optimization=Optimization(lr_warmup_steps=0),
            output=Output(output_dir=str(folder / "run"), report_to=("tensorboard",), checkpointing_steps=10**6),
            validation=Validation(preview_count=0),
        )
        pair = Pair()
        pair.run(recipe)
    ours_s, bare_s = pair.ours_s[WARM_UP:], pair.bare_s[WARM_UP:]
    found = {
        "loop_ratio": statistics.median(ours / bare for ours, bare in zip(ours_s, bare_s, strict=True)),
        "loop_ours_s": statistics.median(ours_s),
        "loop_bare_s": statistics.median(bare_s),
    }
    print(
        f"our step {found['loop_ours_s']:.3f} s, bare step {found['loop_bare_s']:.3f} s, ratio of neighbours "
        f"{found['loop_ratio']:.3f}; medians of {len(ours_s)}"
    )
    return found


if __name__ == "__main__":
    main()
