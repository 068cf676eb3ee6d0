"""Trains the demo's small VAE (src/reeltune/demo/weights/vae.safetensors) on random scenes and their outlines.

    python scripts/demo/train_vae.py --steps 2400

About 25 minutes on two cores. Wan's architecture at base width 8; its latents are pulled to unit normal under Wan's
own latent statistics, because the released layout has no place for others.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from safetensors.torch import save_file

from reeltune.demo.clips import draw_scene, scene
from reeltune.dice import dice

WEIGHTS = Path(__file__).parents[2] / "src/reeltune/demo/weights/vae.safetensors"
FIRST_SEED = 1_000_000  # scenes of the data set have smaller seeds


def batch_of(step: int, size: int, side: int) -> torch.Tensor:
    """B 3 F H W in [-1, 1]: stills, clips and outline clips, from scenes that no data set has."""
    choose = dice(0, "vae batch", step)
    frames = choose.choice((1, 5, 9, 9))
    clips = []
    for i in range(size):
        pair = draw_scene(scene(FIRST_SEED + step * size + i), 17, side, side)
        clip = pair[0 if choose.random() < 0.7 else 1]
        first = choose.randrange(17 - frames + 1)
        clips.append(clip[first : first + frames])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--look", type=Path, default=None, help="folder for pictures on the way")
    given = parser.parse_args()

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16)
    m, s = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=given.steps, pct_start=0.05)
    for step in range(given.steps):
        x = batch_of(step, given.batch, given.side)
        posterior = vae.encode(x).latent_dist
        normal = (posterior.mean - m) / s
        eps = torch.randn(normal.shape, generator=torch.Generator().manual_seed(step))
        y = vae.decode((normal + posterior.std * eps) * s + m).sample
        kl = (normal.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
        error = (x - y).abs().mean() + 2 * (x - y).square().mean()
        loss = error + sharp + 1e-3 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 50 == 0 or step == given.steps - 1:
            print(
                f"{step:5d}  l1 {(x - y).abs().mean():.4f}  edges {sharp:.4f}  kl {kl:.3f}  std {normal.std():.2f}",
                flush=True,
            )
        if step % 300 == 299 or step == given.steps - 1:
            WEIGHTS.parent.mkdir(exist_ok=True)
            save_file({name: w.half().contiguous() for name, w in vae.state_dict().items()}, WEIGHTS)
            if given.look:
                look(vae, given.look / f"vae_{step + 1}.png", given.side)


@torch.no_grad()
def look(vae: AutoencoderKLWan, path: Path, side: int) -> None:
    rows = []
    for seed in range(4):
        for clip in draw_scene(scene(seed), 9, side, side):
            x = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            pair = [((v[0].permute(1, 2, 3, 0) + 1) * 127.5).byte().numpy()[::4] for v in (x, y)]
            rows.append(np.concatenate([np.concatenate(list(v), 1) for v in pair], 1))
    half = len(rows) // 2
    Image.fromarray(np.concatenate([np.concatenate(rows[::2][:half]), np.concatenate(rows[1::2][:half])], 1)).save(path)


if __name__ == "__main__":
    main()
