"""The whole of reeltune at the size of a toy: data, checkpoint, fine-tune, previews, report. On a CPU, in 3 minutes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

from reeltune.cache.fill import fill
from reeltune.config.parse import read
from reeltune.config.recipe import (
    Adapter,
    Cache,
    Data,
    Loss,
    Model,
    Optimization,
    Output,
    Recipe,
    Sizes,
    Training,
    Validation,
)
from reeltune.core.errors import UserError
from reeltune.core.files import writing
from reeltune.demo import checkpoint, untrained
from reeltune.demo.clips import SIDE, write_data_set
from reeltune.demo.tiny import wan
from reeltune.families.wan_fun.sizes import CHANNELS_2_2
from reeltune.reporting.metrics import read_metrics
from reeltune.training.loop import train

MARK = ".reeltune_demo"  # a file that says that the folder's other files are a demo's, which the next may delete
PARTS = {MARK, "data", "model", "run", "cache"}
TRAINED_FRAMES = 13  # of the 17 that a clip has
RANDOM = "its weights were random, the VAE's too, so that previews are not to be recognised; the losses are real"


@dataclass(frozen=True)
class Shown:
    """What the demo shows of a family. Without `about` the start is trained, and previews are worth looking at."""

    write: Callable[[Path], Path]  # lays out a tiny checkpoint in an empty folder
    about: str = ""
    recipe: str = ""  # with which to go on
    adapter_recipe: str = ""  # with which to go on from --adapter
    model: str = ""  # on the Hugging Face Hub
    expert: Literal["both"] | None = None  # of two networks, which learn


def run(
    out_dir: Path,
    *,
    family: str = "wan_fun",
    clips: int = 48,
    stills: int = 48,
    held_out: int = 8,
    steps: int | None = None,
    adapter: bool = False,
) -> int:
    """Writes out_dir/data, out_dir/model and out_dir/run, with its report. Returns the exit code of the training.

    adapter: one learns in place of the network; of the toy, which has two small linear layers, that is refused.
    """
    if adapter and family == "toy":
        raise UserError("demo", "the toy has too few linear layers to learn by; give another --family or no --adapter")
    shown = FAMILIES[family]
    clear(out_dir)
    data, model = out_dir / "data", out_dir / "model"
    meta, held_out_meta = write_data_set(data, clips=clips, stills=stills, held_out=held_out)
    model.mkdir()
    recipe = recipe_of(data, meta, held_out_meta, shown.write(model), out_dir / "run", steps=steps or 450)
    if shown.about:
        recipe = of_untrained(recipe, steps=steps or 60, expert=shown.expert)
    if adapter:
        recipe = replace(recipe, adapter=Adapter(rank=16, train_whole=() if shown.about else CONTROL_IN))
    code = (fill(recipe) if recipe.cache.cache_folder else 0) or train(recipe)
    if code == 0:
        go_on = shown.adapter_recipe if adapter else shown.recipe
        sys.stdout.write("\n".join([*told(shown, out_dir / "run", go_on), ""]))
    return code


def told(shown: Shown, run_dir: Path, recipe: str) -> list[str]:
    """What the run has shown, and how to go on, with that recipe."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    first, last = (metrics.validations[i] for i in (0, -1))
    lines = [f"held-out loss {first['loss']:.4f} before, {last['loss']:.4f} after training"]
    if shown.about:
        lines[0] += f"; {shown.about}"
    else:
        obeys = metrics.obedience[-1]
        lines.append(
            f"{obeys['measure']} of previews: {obeys['score_start']:.2f} before, {obeys['score']:.2f} after training; "
            f"of the real clips {obeys['truth']:.2f}"
        )
    then = f"open {run_dir / 'report.html'}"
    if recipe:
        then += (
            f"; then, with a real model: reeltune train recipes/{recipe} "
            f"--pretrained_model_name_or_path FOLDER_OF_{shown.model.partition('/')[2]} --train_data_dir YOUR_CLIPS "
            "--train_data_meta YOUR_CLIPS/metadata_control.json"
        )
        then += f" --expert {shown.expert}" if shown.expert else ""
    return [*lines, then]


def clear(out_dir: Path) -> None:
    """Removes an earlier demo, and marks the folder as one of a demo. Raises UserError if it holds anything else."""
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError("demo", f"{out_dir} is a file; give an empty folder or a new one")
    mark = out_dir / MARK
    there = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    others = there - PARTS if mark.exists() or _is_demo(out_dir) else there
    if others:
        raise UserError(
            "demo", f"{out_dir} holds other files ({', '.join(sorted(others)[:3])}); give an empty folder or a new one"
        )
    for name in there - {MARK}:
        shutil.rmtree(out_dir / name)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _is_demo(out_dir: Path) -> bool:
    """Whether a demo of before 2026-11-27 is there, which left no mark: its recipe tells."""
    recipe = out_dir / "run/recipe.yaml"
    return recipe.is_file() and read(recipe).get("train_data_dir") in (
        str(out_dir / "data"),
        str(out_dir.absolute() / "data"),
    )


CONTROL_IN = ("patch_embedding", "ref_conv")  # layers of the start that take control in, whose weights are zero
VARIANTS = 4  # of each clip; more are encoded for longer, and fewer are seen through


def recipe_of(data: Path, meta: Path, held_out_meta: Path, model: Path, run_dir: Path, *, steps: int) -> Recipe:
    return Recipe(
        model=Model(
            pretrained_model_name_or_path=str(model),
            train_mode="control_ref",
            control_ref_image="random",
            add_full_ref_image_in_self_attention=True,
        ),
        data=Data(
            train_data_dir=str(data),
            train_data_meta=str(meta),
            validation_data_meta=str(held_out_meta),
        ),
        sizes=Sizes(
            video_sample_n_frames=TRAINED_FRAMES,
            video_sample_stride=1,
            video_sample_size=SIDE,
            image_sample_size=SIDE,
        ),
        cache=Cache(cache_folder=str(run_dir.with_name("cache")), cache_variants=VARIANTS),
        training=Training(
            train_batch_size=4, max_train_steps=steps, num_train_epochs=1000, mixed_precision="no", vae_mini_batch=4
        ),
        loss=Loss(uniform_sampling=True),
        optimization=Optimization(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=10),
        output=Output(output_dir=str(run_dir), checkpointing_steps=steps, logging_steps=20, report_to=("none",)),
        validation=Validation(preview_count=6, preview_steps=20, guidance_scale=1.0, control_kind="canny"),
    )


def of_untrained(recipe: Recipe, *, steps: int, expert: Literal["both"] | None) -> Recipe:
    """Smaller and shorter, in the checkpoint's own mode."""
    return replace(
        recipe,
        model=Model(pretrained_model_name_or_path=recipe.model.pretrained_model_name_or_path, expert=expert),
        sizes=replace(recipe.sizes, video_sample_n_frames=9, video_sample_size=64, image_sample_size=64),
        cache=Cache(),
        training=replace(recipe.training, max_train_steps=steps),
        output=replace(recipe.output, checkpointing_steps=steps, logging_steps=5),
        validation=replace(recipe.validation, preview_count=2, preview_steps=10, control_kind=None),
    )


def _toy(folder: Path) -> Path:
    (folder / "toy.json").write_text("{}\n")
    return folder


def _untrained(family: str, folder: Path) -> Path:
    return untrained.write_checkpoint(folder, import_module(f"reeltune.demo.tiny.{family}").CHECKPOINT)


def _of(family: str, recipe: str, model: str) -> Shown:
    return _random(partial(_untrained, family), recipe, model)


def _random(write: Callable[[Path], Path], recipe: str, model: str, expert: Literal["both"] | None = None) -> Shown:
    return Shown(write, RANDOM, recipe, recipe.replace(".yaml", "_lora.yaml"), model, expert)


FAMILIES = {
    "wan_fun": Shown(
        checkpoint.write_checkpoint,
        recipe="wan2.1_fun_v1.1_1.3b_control.yaml",
        adapter_recipe="wan2.1_fun_v1.1_1.3b_control_lora_12gb.yaml",
        model="alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control",
    ),
    "wan2.1_t2v": _random(wan.write_checkpoint, "wan2.1_1.3b_t2v.yaml", "Wan-AI/Wan2.1-T2V-1.3B"),
    "wan2.1_i2v": _random(
        partial(wan.write_checkpoint, sees_picture=True), "wan2.1_14b_i2v.yaml", "Wan-AI/Wan2.1-I2V-14B-480P"
    ),
    "wan2.2_a14b": _random(
        partial(wan.write_checkpoint, experts=("high", "low")),
        "wan2.2_a14b_t2v.yaml",
        "Wan-AI/Wan2.2-T2V-A14B",
        expert="both",
    ),
    "wan2.2_5b": _random(
        partial(wan.write_checkpoint, channels=CHANNELS_2_2), "wan2.2_5b_ti2v.yaml", "Wan-AI/Wan2.2-TI2V-5B"
    ),
    "easyanimate": _of("easyanimate", "easyanimate_v5.1_7b_control.yaml", "alibaba-pai/EasyAnimateV5.1-7b-zh-Control"),
    "hunyuan_video": _of("hunyuan_video", "hunyuan_video_t2v.yaml", "hunyuanvideo-community/HunyuanVideo"),
    "cogvideox_fun": _of("cogvideox_fun", "cogvideox_fun_5b_inp.yaml", "alibaba-pai/CogVideoX-Fun-5b-InP"),
    "toy": Shown(_toy, "the toy's VAE is made of averages, so that previews are coarse"),
}
