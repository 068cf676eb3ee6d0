"""Trains the demo's small VAE (src/reeltune/demo/weights/vae.safetensors) on random scenes and their outlines.

    python scripts/demo/train_vae.py

About 25 minutes on two cores. Wan's architecture at base width 8; its latents are pulled to unit normal under Wan's
own latent statistics, because the released layout has no place for others. First stills, which use the last time tap
of each kernel alone; then clips, from time taps that at first repeat the still.
"""

import argparse
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from PIL import Image
from pytorch_optimizer import SOAP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.rng import dice
from reeltune.demo.clips import draw_scene, scene

WEIGHTS = Path(__file__).parents[2] / "src/reeltune/demo/weights/vae.safetensors"
FIRST_SEED = 1_000_000  # scenes of the data set have smaller seeds
SIDE, CROP = 96, 64  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--still-steps", type=int, default=3000)
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--start", type=Path, help="weights to go on from with clips; stills are left out")
    parser.add_argument("--to", type=Path, default=WEIGHTS)
    parser.add_argument("--look", type=Path, help="folder for pictures on the way")
    given = parser.parse_args()

    drawn = [draw_scene(scene(FIRST_SEED + i), 17, SIDE, SIDE) for i in range(given.scenes)]
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16)
    if given.start:
        vae.load_state_dict({name: w.float() for name, w in load_file(given.start).items()})
    else:
        start_well(vae)
        with one_frame(vae):
            learn(vae, drawn, given, "stills", given.still_steps, rate=3e-3, batch=8, lengths=(1,))
        repeat_stills(vae)
    learn(vae, drawn, given, "clips", given.clip_steps, rate=1.5e-3, batch=4, lengths=(5, 5, 9))


@torch.no_grad()
def start_well(vae: AutoencoderKLWan) -> None:
    """Kernels that keep a signal's size, calm residual branches, next to no noise: a third of the steps (measured)."""
    for module in vae.modules():
        if isinstance(module, (WanCausalConv3d, nn.Conv2d)) and module.kernel_size[-1] == 3:
            last = module.weight[:, :, -1] if module.weight.ndim == 5 else module.weight
            nn.init.kaiming_normal_(last, nonlinearity="linear")
            module.bias.zero_()
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight *= 0.3
    vae.quant_conv.bias[16:] = -6  # log-variance


class one_frame:
    """Inside, causal convolutions take a clip of one frame: their last time tap alone, a third of the work."""

    def __init__(self, vae: AutoencoderKLWan):
        self.convolutions = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]

    def __enter__(self) -> None:
        def forward(self, x, cache_x=None):
            padding = (self._padding[2], self._padding[0])
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding).unsqueeze(2)

        for module in self.convolutions:
            module.forward = types.MethodType(forward, module)

    def __exit__(self, *_: object) -> None:
        for module in self.convolutions:
            del module.forward


@torch.no_grad()
def repeat_stills(vae: AutoencoderKLWan) -> None:
    """Time taps that give a still as a clip that stands still."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] *= 0.1
    for module in vae.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            kernel = module.time_conv.weight  # out in 3 1 1
            identity = torch.eye(kernel.shape[1])[:, :, None, None]
            kernel.normal_(std=0.02)
            for half in kernel.split(kernel.shape[1]):
                half[:, :, -1] += identity
            module.time_conv.bias.zero_()


def learn(vae, drawn, given, stage: str, steps: int, rate: float, batch: int, lengths: tuple[int, ...]) -> None:
    m, s = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    decoded: list[Tensor] = []  # decode() clamps to [-1, 1], where gradients end; this is before that
    hook = vae.decoder.register_forward_hook(lambda module, given, frames: decoded.append(frames))
    optimizer = SOAP(vae.parameters(), lr=rate, weight_decay=0, precondition_frequency=10)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.04)
    told: list[list[float]] = []
    for step, x in enumerate(batches(drawn, stage, steps, batch, lengths)):
        posterior = vae.encode(x).latent_dist
        normal = (posterior.mean - m) / s
        eps = torch.randn(normal.shape, generator=torch.Generator().manual_seed(step))
        decoded.clear()
        vae.decode((normal + posterior.std * eps) * s + m)
        y = torch.cat(decoded, 2)
        kl = (normal.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        sharp = torch.stack([(x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (-1, -2)]).sum()
        error = (x - y).abs().mean()
        loss = error + (x - y).square().mean() + sharp + 2e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.step()
        told.append([error.item(), sharp.item(), kl.item(), normal.std().item(), posterior.std.mean().item()])
        if (step + 1) % 50 == 0 or step == steps - 1:
            error, sharp, kl, std, noise = np.mean(told, 0)
            told.clear()
            print(
                f"{stage} {step + 1:5d}  l1 {error:.4f}  edges {sharp:.4f}  kl {kl:.3f}  std {std:.2f} +- {noise:.3f}",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step == steps - 1:
            given.to.parent.mkdir(exist_ok=True)
            save_file({name: w.half().contiguous() for name, w in vae.state_dict().items()}, given.to)
            if given.look:
                look(vae, given.look / f"vae_{stage}_{step + 1}.png", frames=max(lengths))
    hook.remove()


def batches(drawn, stage: str, steps: int, size: int, lengths: tuple[int, ...]) -> Iterator[Tensor]:
    """B 3 F CROP CROP in [-1, 1]: cut from clips and outline clips."""
    for step in range(steps):
        choose = dice(0, stage, step)
        frames = choose.choice(lengths)
        cuts = []
        for _ in range(size):
            clip = drawn[choose.randrange(len(drawn))][choose.random() < 0.3]
            first, top, left = (choose.randrange(n + 1) for n in (17 - frames, SIDE - CROP, SIDE - CROP))
            cuts.append(clip[first : first + frames, top : top + CROP, left : left + CROP])
        yield torch.from_numpy(np.stack(cuts)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def look(vae: Any, path: Path, frames: int) -> None:
    """Scenes that were not learned from, and their reconstructions to the right."""
    columns: list[list[np.ndarray]] = [[], []]
    for seed in range(6):
        for column, clip in zip(columns, draw_scene(scene(seed), 17, SIDE, SIDE), strict=True):
            x = torch.from_numpy(clip[:frames]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            y = vae.decode(vae.encode(x).latent_dist.mean).sample
            pair = [((v[0].permute(1, 2, 3, 0) + 1) * 127.5).byte().numpy()[::4] for v in (x, y)]
            column.append(np.concatenate([np.concatenate(list(v), 1) for v in pair], 1))
    Image.fromarray(np.concatenate([np.concatenate(column) for column in columns], 1)).save(path)


if __name__ == "__main__":
    main()
