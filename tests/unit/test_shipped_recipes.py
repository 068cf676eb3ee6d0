"""The recipes that come with the package: each builds, names itself, and there is one for each variant."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from reeltune.config.idle import idle_notices
from reeltune.config.parse import build, read
from reeltune.config.rules import broken_under
from reeltune.config.unlikely import unlikely_notices

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_build_and_name_themselves(file):
    recipe = build(read(file))
    assert idle_notices(recipe) == unlikely_notices(recipe) == broken_under(recipe) == []
    said = file.read_text()
    assert f"reeltune train recipes/{file.name}" in said
    assert recipe.model.train_mode is not None and 0 < recipe.data.held_out_share < 0.5
    assert recipe.model.add_full_ref_image_in_self_attention == (
        file.name.startswith(("wan2.1_fun_v1.1", "wan2.2_fun")) and "control" in file.name and "camera" not in file.name
    )
    assert recipe.model.expert == ("high" if "a14b" in file.name else None)
    clipped = None if recipe.memory.step_in_backward else 0.05  # with it, clipping would be a second backward pass
    assert (recipe.training.gradient_checkpointing, recipe.optimization.max_grad_norm) == (True, clipped)


def test_every_variant_has_a_recipe():
    control = {f"wan2.1_fun_{version}_{size}_control" for version in ("v1.0", "v1.1") for size in ("1.3b", "14b")}
    others = {f"wan2.1_fun_v1.1_{size}_control_camera" for size in ("1.3b", "14b")}
    inp = {f"wan2.1_fun_v1.0_{size}_inp" for size in ("1.3b", "14b")}
    hunyuan = {f"hunyuan_video_{kind}" for kind in ("t2v", "i2v", "i2v_33ch")}
    easyanimate = {f"easyanimate_v5.1_12b_{kind}" for kind in ("control", "control_camera", "inp", "t2v")}
    easyanimate |= {"easyanimate_v5.1_7b_control", "easyanimate_v5_12b_control"}
    cogvideox = {f"cogvideox_fun_{variant}_inp" for variant in ("2b", "5b", "v1.1_2b", "v1.1_5b", "v1.5_5b")}
    cogvideox |= {f"cogvideox_{size}_t2v" for size in ("2b", "5b")}
    wan = {f"wan2.1_{kind}" for kind in ("1.3b_t2v", "14b_t2v", "14b_i2v")}
    wan |= {f"wan2.2_{kind}" for kind in ("a14b_t2v", "a14b_i2v", "5b_ti2v")}
    wan |= {f"wan2.2_fun_{kind}" for kind in ("a14b_inp", "a14b_control", "a14b_control_camera")}
    wan |= {"wan2.2_fun_5b_inp", "wan2.2_fun_5b_control"}
    every = control | others | inp | hunyuan | easyanimate | cogvideox | wan
    assert {file.stem for file in RECIPES} >= every
    adapters = {file.stem.partition("_lora")[0] for file in RECIPES if "_lora" in file.stem}
    assert adapters == {file.stem for file in RECIPES if not file.stem.endswith("gb") and "_lora" not in file.stem}
    assert {f"wan2.1_fun_v1.1_{size}" for size in ("14b_control_lora_24gb", "1.3b_control_lora_12gb")} <= {
        file.stem for file in RECIPES
    }


@pytest.mark.parametrize("file", [file for file in RECIPES if "_lora" in file.stem], ids=lambda path: path.stem)
def test_adapters_train_on_what_the_full_recipe_does(file):
    """The same model, mode, sizes and data; what differs is what learns, how, and ways of sparing memory."""
    full = file.with_name(f"{file.stem.partition('_lora')[0]}.yaml")
    ours, theirs = build(read(file)), build(read(full))
    assert re.findall(r"https://huggingface.co/\S+", file.read_text()) == re.findall(
        r"https://huggingface.co/\S+", full.read_text()
    )
    for section in ("sizes", "data", "loss", "parallel", "output", "validation", "training"):
        assert getattr(ours, section) == getattr(theirs, section)
    assert replace(theirs.model, trained_weights="fp32") == ours.model
    assert (ours.adapter.rank, ours.adapter.network_alpha, ours.optimization.learning_rate) == (32, 32, 1e-4)
    assert (ours.adapter.base_weights is None) == any(size in file.stem for size in ("1.3b", "_2b"))
    lines = file.read_text().splitlines()
    own = ("rank", "network_alpha", "base_weights", "gradient_checkpointing", "blocks_to_swap", "offload_activations")
    own += ("cache_folder", "cache_variants", "low_vram", "use_8bit_adam", "learning_rate")
    assert all("  # " in line for line in lines if line.startswith(tuple(f"{name}:" for name in own)))
