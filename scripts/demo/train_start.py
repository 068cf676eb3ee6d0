"""Trains the transformer that the demo starts from (src/reeltune/demo/weights/transformer.safetensors).

    python scripts/demo/train_start.py

About 30 minutes on two cores, after train_vae.py. It learns clips and stills of random scenes from their captions.
Control clip, reference picture and picture features are blank, and what takes them in stays at zero: the network that
comes out makes clips, and takes no notice of a control clip.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_optimizer import SOAP
from safetensors.torch import save_file
from torch import Tensor

from reeltune.core.rng import dice, seed_of
from reeltune.demo.checkpoint import WEIGHTS, shipped, text_encoder, tokenizer, transformer, vae
from reeltune.demo.clips import FRAMES, SIDE, Scene, draw_scene, scene
from reeltune.demo.main import TRAINED_FRAMES
from reeltune.diffusion import denoise
from reeltune.diffusion.objective import Flow
from reeltune.families.spec import Parts
from reeltune.families.text import embed
from reeltune.families.wan_fun.conditions import decode, encode_clip
from reeltune.families.wan_fun.conditions import denoise as answer_of
from reeltune.families.wan_fun.sizes import TEXT_LENGTH
from reeltune.families.wan_fun.vae import with_quick_layers

FIRST_SEED = 2_000_000  # scenes of the data set have smaller seeds
OBJECTIVE = Flow(shift=5.0)
TOKENS = 16  # more than any caption has
ENCODED_AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--latents", type=Path, help="file to keep the encoded scenes in, or to take them from")
    parser.add_argument("--to", type=Path, default=WEIGHTS / "transformer.safetensors")
    parser.add_argument("--look", type=Path, help="folder for pictures on the way")
    given = parser.parse_args()

    parts = Parts(transformer(), {"vae": with_quick_layers(shipped(vae(), "vae")).eval().requires_grad_(False)})
    if given.latents and given.latents.exists():
        scenes = torch.load(given.latents)
    else:
        scenes = encode(parts.frozen["vae"], given.scenes)
        if given.latents:
            torch.save(scenes, given.latents)
    no_text = embed(tokenizer(), text_encoder(), [""], TOKENS)[0]
    net = blind(parts.net)
    learned = [p for name, p in net.named_parameters() if "add_" not in name and "image_embedder" not in name]
    optimizer = SOAP(learned, lr=given.rate, weight_decay=0.01, precondition_frequency=10)
    curve = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, total_steps=given.steps + 1, pct_start=0.05)
    average = copy.deepcopy(net)
    told, began = [], time.time()
    for step in range(given.steps):
        choose = dice(0, "start batch", step)
        still = choose.random() < 0.25
        rows = [choose.randrange(len(scenes["text"])) for _ in range(given.batch)]
        generator = torch.Generator().manual_seed(seed_of(0, "start noise", step))
        mean, logvar = (scenes[f"{'still' if still else 'clip'}_{what}"][rows].float() for what in ("mean", "logvar"))
        x0 = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        level = torch.tensor([OBJECTIVE.quantile((choose.random() + i) / len(rows)) for i in range(len(rows))])
        text = torch.stack([scenes["text"][row] if choose.random() > 0.1 else no_text for row in rows])
        x = OBJECTIVE.corrupt(x0, noise, level)
        answer = answer_of(net, x, OBJECTIVE.timestep(level), conditions(x0, text))
        loss = (answer - OBJECTIVE.target(x0, noise, level)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            for old, new in zip(average.parameters(), net.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        told.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"{step + 1:5d}  loss {np.mean(told):.4f}  {time.time() - began:.0f} s", flush=True)
            told.clear()
        if (step + 1) % 500 == 0 or step == given.steps - 1:
            save_file({name: w.half().contiguous() for name, w in average.state_dict().items()}, given.to)
            if given.look:
                look(average, parts, given.look / f"start_{step + 1}.png")


@torch.no_grad()
def encode(network, count: int) -> dict[str, Tensor]:
    """Latents of a window and of a frame of each scene, in half precision, and the features of its caption."""
    words, encoder = tokenizer(), text_encoder()
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, ENCODED_AT_ONCE):
        plans = [scene(FIRST_SEED + i) for i in range(start, min(count, start + ENCODED_AT_ONCE))]
        windows = torch.from_numpy(np.stack([window(plan) for plan in plans])).permute(0, 1, 4, 2, 3) / 127.5 - 1
        for name, frames in (("clip", windows), ("still", windows[:, :1])):
            posterior = encode_clip(network, frames)
            found.setdefault(f"{name}_mean", []).append(posterior.mean.half())
            found.setdefault(f"{name}_logvar", []).append(posterior.logvar.half())
        found.setdefault("text", []).append(embed(words, encoder, [plan.caption for plan in plans], TOKENS))
        if start % 200 == 0:
            print(f"encoded {start} of {count} scenes", flush=True)
    return {name: torch.cat(values) for name, values in found.items()}


def window(plan: Scene, part: int = 0) -> np.ndarray:
    """Some frames of the scene's clip, or of its outline (part 1)."""
    first = dice(plan.seed, "window").randrange(FRAMES - TRAINED_FRAMES + 1)
    return draw_scene(plan, FRAMES, SIDE, SIDE)[part][first : first + TRAINED_FRAMES]


@torch.no_grad()
def blind(net):
    """The network with the ways of control, reference and picture features at zero; they learn in the demo."""
    net.patch_embedding.weight[:, 16:] = 0
    for block in net.blocks:
        block.attn2.set_processor(ShortContext())
    for module in (net.ref_conv, *(block.attn2.add_v_proj for block in net.blocks)):
        module.weight.zero_()
        module.bias.zero_()
    return net


class ShortContext:
    """Cross-attention with the start of a caption's tokens, the last of which stands for all of its padding.

    The same numbers as with 512 tokens and blank picture features, whose values are zero here, in a third of the time.
    """

    def __call__(self, attn, x_BLD: Tensor, context_BLD: Tensor, *_: object) -> Tensor:
        q, k = attn.norm_q(attn.to_q(x_BLD)), attn.norm_k(attn.to_k(context_BLD))
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (q, k, attn.to_v(context_BLD)))
        times = torch.ones(TOKENS)
        times[-1] = TEXT_LENGTH - TOKENS + 1
        answer = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=times.log().to(q)[None])
        return attn.to_out[0](answer.transpose(1, 2).flatten(2))


def conditions(x0: Tensor, text: Tensor) -> dict[str, Tensor]:
    """All of a control model's that are not left out as blank picture features are, blank but for the caption."""
    return {
        "text": text,
        "control": torch.zeros_like(x0),
        "ref": torch.zeros_like(x0[:, :, :1]),
        "full_ref": torch.zeros_like(x0[:, :, :1]),
    }


@torch.no_grad()
def look(net, parts: Parts, path: Path) -> None:
    """Clips of captions that the data set does not have, every third frame."""
    captions = [scene(i).caption for i in range(8)]
    *texts, no_text = embed(tokenizer(), text_encoder(), [*captions, ""], TOKENS)
    shape = (8, 16, (TRAINED_FRAMES - 1) // 4 + 1, SIDE // 8, SIDE // 8)
    cond = conditions(torch.zeros(shape), torch.stack(texts))
    scheduler = denoise.sampler(OBJECTIVE)
    settings = {"scheduler": scheduler, "seeds": range(8), "steps": 25, "guidance": 2.0}
    pixels = decode(parts, denoise.sample(answer_of, net, OBJECTIVE, cond, {"text": no_text}, shape, **settings))
    frames = ((pixels + 1) * 127.5).clamp(0, 255).byte().permute(0, 1, 3, 4, 2).numpy()[:, ::3]
    rows = [np.concatenate(list(clip), 1) for clip in frames]
    Image.fromarray(np.concatenate([np.concatenate(rows[:4]), np.concatenate(rows[4:])], 1)).save(path)


if __name__ == "__main__":
    main()
