"""The second part of training the demo's start, after train_start.py: control and reference are shown, then cut off.

    python scripts/demo/guide_start.py

A few minutes on two cores. Control clip and first frame are kept for some samples and blank for the others, so that
the network knows what to do with either; then the weights that take them in are set to zero. What is shipped takes no
notice of a control clip, and learns to in the few minutes that the demo has.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from train_start import FIRST_SEED, OBJECTIVE, TOKENS, conditions, window

from reeltune.core.rng import dice, seed_of
from reeltune.demo.checkpoint import WEIGHTS, shipped, text_encoder, tokenizer, transformer, vae
from reeltune.demo.clips import scene
from reeltune.families.text import embed
from reeltune.families.wan_fun.conditions import denoise, encode_clip
from reeltune.families.wan_fun.sizes import TEXT_LENGTH
from reeltune.families.wan_fun.vae import with_quick_layers

CONTROL_KEPT, REFERENCE_KEPT, CAPTION_KEPT = 0.65, 0.5, 0.9  # shares of samples
AT_ONCE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=640)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--to", type=Path, default=WEIGHTS / "transformer.safetensors")
    given = parser.parse_args()

    scenes = encode(with_quick_layers(shipped(vae(), "vae")).eval().requires_grad_(False), given.scenes)
    no_text = embed(tokenizer(), text_encoder(), [""], TOKENS)[0]
    net = shipped(transformer(), "transformer")
    unused = ("add_", "image_embedder", "ref_conv")
    learned = [p for name, p in net.named_parameters() if not any(part in name for part in unused)]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01, betas=(0.9, 0.98))
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, total_steps=given.steps + 1, pct_start=0.08)
    average = copy.deepcopy(net)
    told: list[float] = []
    for step in range(given.steps):
        choose = dice(0, "control batch", step)
        kind = "still" if choose.random() < 0.25 else "clip"
        rows = [choose.randrange(given.scenes) for _ in range(given.batch)]
        generator = torch.Generator().manual_seed(seed_of(1, "start noise", step))
        x0 = scenes[kind][rows]
        noise = torch.randn(x0.shape, generator=generator)
        level_B = torch.tensor([OBJECTIVE.quantile((choose.random() + i) / len(rows)) for i in range(len(rows))])
        keep_B = [
            torch.tensor([choose.random() < kept for _ in rows])
            for kept in (CAPTION_KEPT, CONTROL_KEPT, REFERENCE_KEPT)
        ]
        text, control, reference = (keep.float() for keep in keep_B)
        cond = conditions(x0, text[:, None, None] * scenes["text"][rows] + (1 - text)[:, None, None] * no_text)
        cond["text"] = torch.nn.functional.pad(cond["text"], (0, 0, 0, TEXT_LENGTH - TOKENS))
        cond["control"] = scenes[f"{kind}_control"][rows] * control[:, None, None, None, None]
        cond["ref"] = x0[:, :, :1] * reference[:, None, None, None, None]
        answer = denoise(net, OBJECTIVE.corrupt(x0, noise, level_B), OBJECTIVE.timestep(level_B), cond)
        loss = (answer - OBJECTIVE.target(x0, noise, level_B)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.step()
        with torch.no_grad():
            decay = min(0.99, (step + 1) / (step + 10))
            for old, new in zip(average.parameters(), net.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        told.append(loss.item())
        if step % 50 == 49:
            print(f"{step + 1:5d}  loss {np.mean(told[-50:]):.4f}", flush=True)
    average.get_parameter("patch_embedding.weight").data[:, 16:] = 0
    save_file({name: w.half().contiguous() for name, w in average.state_dict().items()}, given.to)


@torch.no_grad()
def encode(network, count: int) -> dict[str, Tensor]:
    """Latents of a window and of a frame of each scene and of its outline, and the features of its caption."""
    words, encoder = tokenizer(), text_encoder()
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, AT_ONCE):
        plans = [scene(FIRST_SEED + i) for i in range(start, min(count, start + AT_ONCE))]
        for suffix, part in (("", 0), ("_control", 1)):
            clips = torch.from_numpy(np.stack([window(plan, part) for plan in plans])).permute(0, 1, 4, 2, 3)
            for kind, frames in (("clip", clips), ("still", clips[:, :1])):
                found.setdefault(kind + suffix, []).append(encode_clip(network, frames / 127.5 - 1).mean)
        found.setdefault("text", []).append(embed(words, encoder, [plan.caption for plan in plans], TOKENS))
    return {name: torch.cat(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
