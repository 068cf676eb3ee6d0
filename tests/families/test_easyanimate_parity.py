"""Every tensor of every EasyAnimate golden file, within the bounds of benchmarks/parity_easyanimate.py."""

import pytest
from diffusers.models.transformers.transformer_easyanimate import (
    EasyAnimateAttnProcessor2_0,
    EasyAnimateRotaryPosEmbed,
)

from benchmarks.golden import loaded
from benchmarks.parity_easyanimate import golden_files, measure
from tests.families.parity import assert_parity, off

pytestmark = pytest.mark.golden("multi/golden/easyanimate_v*/*.safetensors")

INPUTS = {  # what is read and not computed, or told for information; the latents are compared as draws
    "scheduler": set(),
    "vae": {"x", "z"},
    "text": {name for i in ("", "_2") for name in (f"pipeline_input_ids{i}", f"pipeline_prompt_embeds{i}")},
    "transformer": {
        *("hidden_states", "control_latents", "encoder_hidden_states", "encoder_hidden_states_t5"),
        *("text_mask", "timestep", "loss_weight", "out_with_newer_diffusers_rope"),
    },
    "train": {
        *("pixel_values", "control_pixel_values", "ref_pixel_values", "control_camera_values"),
        *("latents", "ref_latents", "noise", "timestep_indices", "zero_flags", "proj_out_multiplier"),
    },
}


def test_within_bounds(goldens, file):
    assert_parity(file, measure(file), INPUTS[file.stem.split("_")[0]])


def test_without_the_rotary_grid_the_answers_are_others(goldens, monkeypatch):
    """But where the grid is as wide as it is high, or as the base's: there both are the same."""
    others = set()
    for path in [path for path in golden_files(goldens) if path.stem == "transformer"]:
        rope = loaded(path.parent)[1].net.rope_embedding
        plain = EasyAnimateRotaryPosEmbed.get_resize_crop_region_for_grid
        with monkeypatch.context() as patch:
            patch.setattr(type(rope), "get_resize_crop_region_for_grid", plain)
            others |= {name.partition(".")[2] for name in off(measure(path))}
    assert {"rope_cos", "out"} <= others


def test_without_the_texts_projection_the_answers_are_others(goldens):
    """Where blocks share their weights between text and clip, and their text is read by a later block."""
    shared = []
    for path in [path for path in golden_files(goldens) if path.stem == "transformer"]:
        blocks = loaded(path.parent)[1].net.transformer_blocks[:-1]
        joint = [block.attn1 for block in blocks if block.attn1.add_q_proj is None]
        if joint:
            ours = joint[0].processor
            for attention in joint:
                attention.set_processor(EasyAnimateAttnProcessor2_0())
            try:
                assert {"a.out", "b.out"} & set(off(measure(path)))
            finally:
                for attention in joint:
                    attention.set_processor(ours)
            shared.append(path)
    assert shared
