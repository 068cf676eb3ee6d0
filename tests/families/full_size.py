"""Released checkpoints at their full size, of names and shapes alone: the weights in their files are holes."""

import gzip
import json
import shutil
from pathlib import Path

import torch

HEAD = 128  # width of an attention head in all released sizes
FROZEN = {
    "vae/diffusion_pytorch_model": ("Wan2.1_VAE", "F32"),
    "text_encoder/model": ("umt5-xxl-enc", "BF16"),
    "image_encoder/model": ("clip-xlm-roberta-vit-huge-14", "F16"),
}
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
Shapes = dict[str, list[int]]


def released(goldens: Path, name: str) -> Shapes:
    with gzip.open(goldens / "released_keys" / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def wan_checkpoint(folder: Path, goldens: Path, name: str) -> Path:
    """Wan2.1-Fun of that name; takes a few hundred kilobytes of disk."""
    tiny, shapes = goldens / "wan_fun/checkpoints/control_v1.1", released(goldens, name)
    hollow(folder / "diffusion_pytorch_model.safetensors", shapes, "BF16")
    config = json.loads((tiny / "config.json").read_text()) | sizes(shapes)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree(tiny / "google", folder / "google")
    for stem, (network, dtype) in FROZEN.items():
        hollow(folder / f"{stem}.safetensors", released(goldens, network), dtype)
    return folder


def sizes(shapes: Shapes) -> dict[str, int | bool]:
    D, C = shapes["patch_embedding.weight"][:2]
    return {
        "add_ref_conv": "ref_conv.weight" in shapes,
        "dim": D,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "in_dim": C,
        "num_heads": D // HEAD,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "text_dim": shapes["text_embedding.0.weight"][1],
    }


def hollow(file: Path, shapes: Shapes, dtype: str) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors#format) whose data is a hole."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.truncate(8 + len(text) + end)
