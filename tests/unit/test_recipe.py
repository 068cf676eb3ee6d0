"""Recipes: every field described, strict building, every rule, YAML there and back."""

import logging
from dataclasses import FrozenInstanceError
from typing import Literal, get_args, get_origin

import pytest

from reeltune.config.flags import flags
from reeltune.config.parse import build, dump, flat, read, sentences, settings
from reeltune.config.ranges import ABOVE_ZERO, ANY, RANGES, range_of
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.near import nearest

MODES = ("normal", "inpaint", "i2v", "ti2v", "control", "control_ref", "control_ref_camera")


def problems(tree, **more) -> list[str]:
    with pytest.raises(UserError) as told:
        build(tree, **more)
    return told.value.problems


def test_every_field_has_a_sentence_and_one_name():
    assert list(sentences()) == list(settings())
    assert all(sentence.endswith((".", ")")) for sentence in sentences().values())
    assert flat(Recipe())["adam_epsilon"] == 1e-8


def test_a_recipe_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Recipe().training.seed = 3


def test_defaults_keep_every_rule():
    assert build({}) == Recipe()


def test_overrides_win_and_text_takes_the_type_of_its_field():
    recipe = build(
        {"learning_rate": "2e-05", "seed": 7, "enable_bucket": "TRUE", "max_train_steps": "5"},
        {"seed": "8", "max_train_steps": "none", "report_to": ["wandb", "tensorboard"], "trainable_modules": "."},
    )
    assert recipe.optimization.learning_rate == 2e-5
    assert recipe.training.seed == 8 and recipe.training.max_train_steps is None
    assert recipe.sizes.enable_bucket is True
    assert recipe.output.report_to == ("wandb", "tensorboard") and recipe.model.trainable_modules == (".",)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", "4.5", "a whole number"),
        ("seed", 4.0, "a whole number"),
        ("seed", True, "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "nan", "a number"),
        ("learning_rate", None, "a number"),
        ("enable_bucket", "yes", "true or false"),
        ("enable_bucket", 1, "true or false"),
        ("gradient_checkpointing", "attention", "true or false or one of attention_kept, products_kept"),
        ("gradient_checkpointing", ["attention_kept"], "true or false or one of attention_kept, products_kept"),
        ("train_mode", "controll", f"one of {', '.join(MODES)}, or none"),
        ("loss_type", ["flow"], "one of flow, ddpm, sigma, or none"),
        ("train_mode", ["control_ref"], f"one of {', '.join(MODES)}, or none"),
        ("fix_sample_size", ["480"], "2 whole numbers, or none"),
        ("report_to", ["wandb", "mlflow"], "a list, each one of tensorboard, wandb, trackio, none"),
        ("output_dir", ["a", "b"], "text"),
        ("max_train_steps", {"a": 1}, "a whole number, or none"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(name, value, expected):
    (line,) = problems({name: value})
    assert line.startswith(f"{name} is ") and line.endswith(f"; expected {expected}")


@pytest.mark.parametrize("word", ["olora", "loftq", "pissas", "pissa_niter_0", "Gaussian"])
def test_other_beginnings_of_adapters_are_refused(word):
    (line,) = problems({"rank": 8, "lora_init": word})
    rule = "use pissa, which leaves the base its bits" if word in ("olora", "loftq") else "uniform, gaussian, pissa"
    assert line.startswith(f"lora_init is '{word}'; ") and rule in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter_path": "a.safetensors"}, "each says what A and B begin with; leave one of the two out"),
        ({"base_weights": "int8", "lora_dropout": 0.1}, "would be dropped; leave one of the three out"),
    ],
)
def test_what_does_not_go_with_pissa_is_refused(settings, said):
    (line,) = problems({"rank": 8, "lora_init": "pissa_niter_8", **settings})
    assert line.startswith("lora_init is pissa_niter_8") and said in line
    build({"rank": 8, "lora_init": "gaussian", **settings})


def test_all_problems_are_told_at_once():
    tree = {"lerning_rate": 1, "seed": "x", "text_drop_ratio": 1.5, "adam_beta1": 1, "zebra": 0}
    assert problems(tree, required=["train_data_dir"], before=["before"]) == [
        "before",
        "lerning_rate is no setting; the nearest is learning_rate",
        "seed is 'x'; expected a whole number",
        "zebra is no setting; reeltune train --help lists all",
        "text_drop_ratio is 1.5; it must be between 0 and 1; the default is 0.1",
        "adam_beta1 is 1.0; it must be at least 0 and less than 1; the default is 0.9",
        "train_data_dir is missing; it has no default, so give it",
    ]


@pytest.mark.parametrize("name", RANGES)
def test_ends_of_ranges(name):
    least, greatest = RANGES[name]
    build({name: least, "gradient_checkpointing": True, "expert": "both"})  # which some of them need
    assert problems({name: least - 1})[0].startswith(
        f"{name} is {settings()[name].alternatives[0](least - 1)}; it must"
    )
    if greatest < 2:
        assert len(problems({name: greatest + 0.001})) == 1


MOST = {**{name: most for name, (_, most) in RANGES.items() if most > 1}, **ABOVE_ZERO}


@pytest.mark.parametrize("name", [name for name, most in MOST.items() if most < ANY])
def test_what_is_beyond_any_run_is_refused(name):
    for slip in (MOST[name] + 1, 10**9 + 1, 10**21):
        value = settings()[name].alternatives[0](slip)
        (told,) = problems({name: value, **({"rank": 1} if name == "network_alpha" else {})})
        assert told.startswith(f"{name} is {value}; it must be {range_of(name)}; the default is ")
        assert f" {MOST[name]:,};" in told


@pytest.mark.parametrize("name", ["video_sample_fps", "adam_epsilon", "max_grad_norm", "lr_power", "logit_std"])
def test_what_must_be_more_than_zero(name):
    assert "must be more than 0" in problems({name: 0})[0]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"trainable_modules": []}, "trainable_modules"),
        ({"add_full_ref_image_in_self_attention": True, "train_mode": "control"}, "train_mode"),
        ({"validation_data_meta": "a.json", "held_out_share": 0.1}, "held_out_share"),
        ({"add_full_ref_image_in_self_attention": True, "train_mode": "control_camera_ref"}, "control_ref_camera;"),
        ({"trained_weights": "bf16_stochastic", "mixed_precision": "no"}, "mixed_precision is no"),
        ({"fix_sample_size": [480, 8]}, "16 pixels"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10,0.1:5,0.2"}, "its steps must rise from 1 on"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:5,0.1:5,0.2"}, "its steps must rise from 1 on"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:0,0.2"}, "its steps must rise from 1 on"),
        ({"fix_sample_size": [480, 10**9]}, "at most 100,000 pixels"),
        ({"fix_sample_size": [480, 832], "random_ratio_crop": True}, "no ratio to draw"),
        (
            {
                "video_sample_size": 640,
                "image_sample_size": 512,
                "random_hw_adapt": True,
                "training_with_video_token_length": True,
            },
            "raise image_sample_size",
        ),
        ({"use_came": True, "use_8bit_adam": True}, "one optimizer"),
        ({"use_came": True, "use_adafactor": True}, "use_came and use_adafactor are true"),
        ({"use_prodigy": True, "use_muon": True, "learning_rate": 1}, "use_prodigy and use_muon are true"),
        ({"guidance_scale": 7500}, "it must be between 0 and 1,000;"),
        ({"mode_scale": 12.9}, "it must be between -1 and 1.75;"),
        ({"logit_mean": -50}, "it must be between -10 and 10;"),
        ({"logit_std": 100}, "it must be more than 0 and at most 10;"),
        ({"adam_epsilon": 1e8}, "it must be more than 0 and at most 1;"),
        ({"learning_rate": 1e4}, "learning_rate is 10000.0, by about which each step moves each weight; it must be"),
        ({"learning_rate": 1}, "must be less than 1 but with use_prodigy"),
        ({"expert": "both", "low_expert_learning_rate": 1}, "low_expert_learning_rate is 1.0, by about which"),
        ({"adam_weight_decay": 1e4}, "learning_rate is 0.0001 and adam_weight_decay is 10000.0, whose product"),
        ({"use_prodigy": True}, "multiplies the rate that it finds; write 1, or at least 0.1"),
        (
            {"use_prodigy": True, "learning_rate": 1, "expert": "both", "low_expert_learning_rate": 1e-4},
            "low_expert_learning_rate is 0.0001, by which it multiplies the rate that it finds; write 1",
        ),
        ({"use_prodigy": True, "learning_rate": 1, "rank": 8, "lora_plus_ratio": 16}, "one rate for all weights"),
        ({"use_prodigy": True, "learning_rate": 1, "engine": "fsdp"}, "use_prodigy is true and engine is fsdp"),
        ({"use_prodigy": True, "learning_rate": 1, "step_in_backward": True}, "from all weights at once"),
        ({"use_prodigy": True, "learning_rate": 1, "trained_weights": "bf16_stochastic"}, "at once; use fp32"),
        ({"use_muon": True, "engine": "zero2"}, "use_muon is true and engine is zero2, which has no such thing"),
        ({"gradient_checkpointing_share": 0.5}, "set gradient_checkpointing to true"),
        ({"gradient_checkpointing": "attention_kept", "step_in_backward": True}, "set gradient_checkpointing to true"),
        ({"gradient_checkpointing": "attention_kept", "attention": "math"}, "attention_kept and attention is math"),
        ({"gradient_checkpointing": "attention_kept", "engine": "zero3"}, "or engine to fsdp"),
        ({"gradient_checkpointing": "products_kept", "step_in_backward": True}, "set gradient_checkpointing to true"),
        ({"gradient_checkpointing": "products_kept", "attention": "math"}, "products_kept and attention is math"),
        ({"gradient_checkpointing": "products_kept", "engine": "zero3"}, "or engine to fsdp"),
        ({"attention": "flash", "context_parallel": 2}, "context_parallel is 2, where the backward pass"),
        ({"attention": "math", "encode_ahead": True}, "train from a cache"),
        ({"attention": "cudnn", "deterministic": True}, "set attention to flash, flash_4, efficient or math"),
        ({"compile": "blocks", "engine": "zero3"}, "gathers weights within the blocks; set engine to fsdp"),
        ({"compile": "blocks", "context_parallel": 2}, "compile is blocks and context_parallel is 2"),
        ({"deterministic": True, "encode_ahead": True}, "deterministic is true and encode_ahead is true"),
        ({"compile": "blocks", "rank": 8, "use_dora": True}, "compile is blocks and use_dora is true"),
        (
            {"compile": "blocks", "rank": 8, "lora_dropout": 0.1, "gradient_checkpointing": "attention_kept"},
            "set gradient_checkpointing to true, or leave lora_dropout out",
        ),
        (
            {"compile": "blocks", "rank": 8, "lora_dropout": 0.1, "gradient_checkpointing": "products_kept"},
            "gradient_checkpointing is products_kept, which is compiled with the blocks",
        ),
        ({"step_in_backward": True, "gradient_accumulation_steps": 2}, "no gradients to add to"),
        ({"step_in_backward": True, "mixed_precision": "fp16"}, "loss scale"),
        ({"max_grad_norm": "none", "abnormal_norm_clip_start": 10}, "give max_grad_norm"),
        ({"engine": "zero3", "keep_gathered": True}, "it is of fsdp; use one, or leave it out"),
        ({"engine": "ddp", "offload": True}, "it is of zero2 or zero3 or fsdp"),
        ({"uniform_sampling": True, "weighting_scheme": "mode"}, "each is a density"),
        ({"lr_step_rules": "1:10,0.1"}, "piecewise_constant"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_step_rules is none"),
        ({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:x,2"}, "factor:step"),
        ({"validation_prompts": ["a", "b"], "validation_paths": ["a.mp4"]}, "validation_prompts has 2"),
        (
            {"validation_prompts": ["a"], "control_kind": "canny", "validation_control_from": ["a", "b"]},
            "control_from 2",
        ),
        (
            {
                "validation_prompts": ["a"],
                "control_kind": "canny",
                "validation_paths": ["a.mp4"],
                "validation_control_from": ["a.mp4"],
            },
            "a prompt has one control",
        ),
        ({"validation_prompts": ["a"], "validation_control_from": ["a.mp4"]}, "give it, as canny"),
        ({"base_weights": "fp8"}, "base_weights is fp8 and rank is 0"),
        ({"rank": 8, "base_weights": "nf4", "use_dora": True}, "DoRA measures"),
        ({"rank": 8, "trainable_modules": ["attn"]}, "train_whole"),
        ({"rank": 8, "rank_pattern": ["ffn.0:16"]}, "ffn.0=16"),
        ({"rank": 8, "alpha_pattern": ["ffn.0=0"]}, "more than 0"),
    ],
)
def test_rules_between_fields(tree, names):
    (line,) = problems(tree)
    assert names in line


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "--low_vram"], True),
        (["--gradient_checkpointing", "False"], False),
        (["--gradient_checkpointing=true"], True),
        (["--gradient_checkpointing", "attention_kept"], "attention_kept"),
        (["--gradient_checkpointing", "products_kept"], "products_kept"),
        (["--gradient_checkpointing=attention_kept", "--low_vram"], "attention_kept"),
    ],
)
def test_a_switch_with_more_values_is_a_switch_still(words, value, tmp_path):
    left, given, wrong = flags(words)
    assert (left, wrong) == ([], [])
    recipe = build(given)
    assert recipe.training.gradient_checkpointing is value or recipe.training.gradient_checkpointing == value
    assert isinstance(recipe.training.gradient_checkpointing, type(value))
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert build(read(tmp_path / "r.yaml")) == recipe
    assert settings()["gradient_checkpointing"].operand == "[true|false|attention_kept|products_kept]"
    assert flags(["--gradient_checkpointing", "recipe.yaml"])[0] == ["recipe.yaml"]


def test_rules_between_fields_allow_what_fits():
    build({"attention": "flash", "encode_ahead": True, "cache_folder": "x", "cache_variants": 1})
    build({"attention": "math", "gradient_checkpointing": True, "step_in_backward": True})
    build({"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10,0.1:20,.01:30,0.005"})
    build({"validation_prompts": ["a"], "validation_paths": ["a.mp4"]})
    build({"validation_prompts": ["a"], "validation_control_from": ["a.mp4"], "control_kind": "canny"})
    build({"control_kind": "pose", "control_detector": "models/dwpose"})
    build({"video_sample_size": 640, "image_sample_size": 512})
    build({"fix_sample_size": [480, 832]})  # with or without buckets
    build({"trainable_modules": [], "trainable_modules_low_learning_rate": ["attn"]})
    build({"uniform_sampling": True, "weighting_scheme": "sigma_sqrt"})
    build({"engine": "fsdp", "keep_gathered": True, "offload": True})
    build({"engine": "zero2", "offload": True})
    build({"use_prodigy": True, "learning_rate": 2, "adam_weight_decay": 1})
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        build({"engine": engine, "rank": 8, "base_weights": "int8"})
    build({"offload": True})  # the launcher names the engine


@pytest.mark.parametrize(
    ("said", "meant"), [("control_camera_ref", "control_ref_camera"), ("control_object", "control_ref")]
)
def test_other_names_of_train_modes(said, meant, caplog):
    with caplog.at_level(logging.WARNING):
        assert build({"train_mode": said}).model.train_mode == meant
    assert caplog.messages == [f"train_mode {said} means {meant}"]


def other_value(setting):
    """A value that is not the default."""
    if setting.choices:
        last = setting.choices[-1] if setting.choices[-1] != setting.default else setting.choices[0]
        return [last, setting.choices[0]] if setting.is_list else last
    (kind,) = setting.alternatives
    if get_origin(kind) is tuple:
        return ["a: b", "no"] if get_args(kind)[0] is str else [64, 32]
    return {bool: not setting.default, int: 77, float: 0.125, str: "1e-4 # none: ä"}[kind]


def test_yaml_there_and_back_with_every_field_changed(tmp_path):
    tree = {name: other_value(setting) for name, setting in settings().items()}
    tree |= {"validation_data_meta": None, "lr_step_rules": "1:10,0.5", "random_ratio_crop": False}
    tree |= {
        "trainable_modules": ["."],
        "trainable_modules_low_learning_rate": [],
        "rank_pattern": ["a: b=4", "no=8"],
        "alpha_pattern": ["a: b=4.5", "no=8"],
        "lora_init": "gaussian",
        "attention": "auto",
        "compile": "none",
        "use_came": False,
        "use_dora": False,
        "use_8bit_adam": False,
        "use_prodigy": False,
        "use_muon": False,
        "step_in_backward": False,
        "encode_ahead": False,
        "engine": "ddp",
        "keep_gathered": False,
        "offload": False,
        "mixed_precision": "bf16",
        "weighting_scheme": "cosmap",
        "train_mode": "control_ref",
        "lr_scheduler": "piecewise_constant",
        "validation_control_from": [],
        "other_expert_path": None,  # expert is both
        "other_expert_adapter": None,
    }
    recipe = build(tree)
    same = {
        "other_expert_path",
        "other_expert_adapter",
        "attention",
        "compile",
        "validation_control_from",
        "validation_data_meta",
        "random_ratio_crop",
        "use_came",
        "use_dora",
        "use_8bit_adam",
        "use_prodigy",
        "use_muon",
        "mixed_precision",
        "step_in_backward",
        "keep_gathered",
        "offload",
        "trainable_modules",
        "trainable_modules_low_learning_rate",
    }
    assert {name for name, value in flat(recipe).items() if value == flat(Recipe())[name]} == same
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    assert build(read(tmp_path / "recipe.yaml")) == recipe


def test_yaml_says_what_it_says(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "mixed_precision: no\nlearning_rate: 1e-4\nreport_to: none\nmax_train_steps:\n", encoding="utf-8-sig"
    )
    recipe = build(read(file))
    assert recipe.training.mixed_precision == "no" and recipe.optimization.learning_rate == 1e-4
    assert recipe.output.report_to == ("none",) and recipe.training.max_train_steps is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 2\n", "seed written more than once"),
        ("- seed\n", "lines of `name: value`"),
        ("seed: [1\n", "cannot be read as a recipe"),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path, text, told):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_missing_names_those_near_it(tmp_path):
    for name in ("fun_1.3b_control_lora_12gb.yaml", "other.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"is missing; near are fun_1\.3b_control_lora_12gb\.yaml$"):
        read(tmp_path / "fun_1.3b_control_lora.yaml")
    with pytest.raises(UserError, match="is missing; look at its path"):
        read(tmp_path / "zzz.yml")


def test_nearest_name():
    assert nearest("video_sample_frames", settings()) == "; the nearest is video_sample_n_frames"


def test_literal_fields_list_their_choices():
    for setting in settings().values():
        kinds = [kind for kind in setting.alternatives if get_origin(kind) is Literal]
        switch = {"true", "false"} if setting.stands_alone else set()
        assert all({*get_args(kind), *switch} == set(setting.choices) for kind in kinds)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"expert": "high", "low_expert_learning_rate": 1e-5}, "low_expert_learning_rate is 1e-05 and expert is high"),
        ({"low_expert_max_grad_norm": 1.0}, "low_expert_max_grad_norm is 1.0 and expert is none"),
        ({"expert": "both", "other_expert_path": "x"}, "other_expert_path is x and expert is both"),
        ({"expert": "both", "other_expert_adapter": "x"}, "other_expert_adapter is x and expert is both"),
    ],
)
def test_what_does_not_go_together_of_experts(said, words):
    with pytest.raises(UserError, match=words):
        build(said)
