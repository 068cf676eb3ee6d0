"""What a launcher says by environment is taken where the user said nothing, and never overruled in silence."""

import pytest

from reeltune import cli, compat
from reeltune.core.errors import UserError
from reeltune.distributed.launcher_settings import adopted

DEFAULTS = {  # as `accelerate launch` without flags sets them (accelerate 1.15)
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}
NEEDED = ["--pretrained_model_name_or_path", "a", "--train_data_dir", "b", "--train_data_meta", "c"]


def test_without_a_launcher_nothing_is():
    assert adopted({}, {}) == adopted({"mixed_precision": "bf16"}, {}) == {}


def test_a_launchers_defaults_bow_to_what_is_given():
    given = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    assert adopted(given, DEFAULTS | {"ACCELERATE_GRADIENT_CLIPPING": "none"}) == {}
    assert adopted({}, DEFAULTS) == {"mixed_precision": "no", "gradient_accumulation_steps": "1"}


def test_what_it_was_told_is_taken():
    told = {**DEFAULTS, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    assert adopted({"mixed_precision": "fp16"}, told) == {"gradient_accumulation_steps": "4", "max_grad_norm": "0.5"}
    same = {"gradient_accumulation_steps": 4, "max_grad_norm": "0.50", "mixed_precision": "bf16"}
    assert adopted(same, {**told, "ACCELERATE_MIXED_PRECISION": "bf16"}) == {}


def test_two_answers_are_refused_all_at_once():
    told = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    told["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
    with pytest.raises(UserError) as refused:
        adopted(
            {"mixed_precision": "bf16", "gradient_accumulation_steps": "1"},
            {**told, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        )
    assert [problem.split(" ")[0] for problem in refused.value.problems] == [
        "mixed_precision",
        "gradient_accumulation_steps",
        "accelerate",
    ]
    with pytest.raises(UserError, match="fp8, which is not done here"):
        adopted({}, {"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize("read", [cli.recipe_of, lambda argv, _: compat.recipe_of("train.py", argv)])
def test_commands_take_it(read, monkeypatch):
    for name, value in {**DEFAULTS, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}.items():
        monkeypatch.setenv(name, value)
    training = read(NEEDED, "train").training
    assert (training.mixed_precision, training.gradient_accumulation_steps) == ("no", 4)
    assert read([*NEEDED, "--mixed_precision", "bf16"], "train").training.mixed_precision == "bf16"
    with pytest.raises(UserError, match="accelerate launch was told --gradient_accumulation_steps 4; leave one out"):
        read([*NEEDED, "--gradient_accumulation_steps", "2"], "train")
    if read is cli.recipe_of:  # what makes no steps takes nothing from a launcher
        assert read(NEEDED, "check").training.gradient_accumulation_steps == 1
