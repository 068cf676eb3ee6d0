"""The whole of reeltune at the size of a toy: data, checkpoint, fine-tune, previews, report. On a CPU, in 3 minutes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from reeltune import report
from reeltune.agreement import write_agreement
from reeltune.demo.checkpoint import write_checkpoint
from reeltune.demo.clips import SIDE, write_data_set
from reeltune.errors import UserError
from reeltune.recipe import Data, Loss, Model, Optimization, Output, Recipe, Sizes, Training, Validation
from reeltune.train import train

TRAINED_FRAMES = 13  # of the 17 that a clip has


def run(out_dir: Path, *, clips: int = 48, stills: int = 48, held_out: int = 8, steps: int = 450) -> int:
    """Writes out_dir/data, out_dir/model and out_dir/run, with its report. Returns the exit code of the training."""
    clear(out_dir)
    data = out_dir / "data"
    meta, held_out_meta = write_data_set(data, clips=clips, stills=stills, held_out=held_out)
    model = write_checkpoint(out_dir / "model")
    recipe = recipe_of(data, meta, held_out_meta, model, out_dir / "run", steps=steps)
    code = train(recipe)
    if code:
        return code
    found = write_agreement(out_dir / "run")
    page = report.write(out_dir / "run")
    before, after = (found[when] for when in ("before", "after"))
    sys.stdout.write(
        f"agreement of previews with their own control clip, less that with others': {before['margin']:.2f} before, "
        f"{after['margin']:.2f} after training; own control is the best match of {before['first']:.0%} before, "
        f"{after['first']:.0%} after\n"
        f"open {page}; then, with a real model: reeltune train recipes/wan2.1_fun_v1.1_1.3b_control.yaml "
        "--pretrained_model_name_or_path FOLDER_OF_Wan2.1-Fun-V1.1-1.3B-Control --train_data_dir YOUR_CLIPS "
        "--train_data_meta YOUR_CLIPS/metadata_control.json\n"
    )
    return 0


def clear(out_dir: Path) -> None:
    """Removes an earlier demo. Raises UserError if the folder holds anything else."""
    parts = {"data", "model", "run"}
    there = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if there - parts:
        other = ", ".join(sorted(there - parts)[:3])
        raise UserError("demo", f"{out_dir} holds other files ({other}); give an empty folder or a new one")
    for name in there:
        shutil.rmtree(out_dir / name)


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
        training=Training(train_batch_size=4, max_train_steps=steps, num_train_epochs=1000, mixed_precision="no"),
        loss=Loss(uniform_sampling=True),
        optimization=Optimization(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=10),
        output=Output(output_dir=str(run_dir), checkpointing_steps=steps, logging_steps=20, report_to=("none",)),
        validation=Validation(preview_count=6, preview_steps=20, guidance_scale=1.0),
    )
