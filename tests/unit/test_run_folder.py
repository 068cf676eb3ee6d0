"""Settings that change between a stop and a resume: refused, taken, or said to be without effect."""

import pytest

from reeltune.cache.fill import fill
from reeltune.config.parse import build, dump, flat, settings
from reeltune.config.rules import shown
from reeltune.core.errors import UserError
from reeltune.run.folder import changes_since, refuse_overwriting

REFUSED = {
    "seed": (7, "the samples would not go on where they were"),
    "video_sample_size": (48, "the samples would not go on where they were"),
    "use_muon": (True, "no optimizer can go on with the state of another"),
    "trainable_modules": (["q"], "the optimizer's state is of what learnt there"),
    "trainable_modules_low_learning_rate": (["q"], "the optimizer's state is of what learnt there"),
    "trained_weights": ("bf16_stochastic", "the optimizer's state is of what learnt there"),
    "lora_plus_ratio": (16.0, "the optimizer's state is of what learnt there"),
}
LORA = {"rank": 4}
REFUSED |= {
    name: (value, "the adapters are others; restore the recipe's settings")
    for name, value in {
        "rank": 8,
        "rank_pattern": ["q=2"],
        "use_dora": True,
        "train_whole": ["x"],
    }.items()
}


def settings_of_adapters():
    return {name for name, setting in settings().items() if setting.section == "adapter"}


@pytest.fixture
def changed(tmp_path):
    """(settings of the checkpoint, those of the resumed run) -> what is said."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()

    def told(before, now):
        (checkpoint / "recipe.yaml").write_text(dump(build(before)))
        return changes_since(checkpoint, build(now))

    return told


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_state_or_the_samples_depend_on_is_refused(changed, name):
    value, why = REFUSED[name]
    base = LORA if name in settings_of_adapters() else {}
    with pytest.raises(UserError) as error:
        changed(base, {**base, name: value})
    assert why in error.value.where
    assert error.value.problems == [
        f"{name} was {shown(flat(build(base))[name])} and is {shown(flat(build({**base, name: value}))[name])}"
    ]
    if name in ("trainable_modules", "lora_plus_ratio"):
        kept_in = "adapter_path" if base else "transformer_path"
        assert f"start a new run from its weights: {kept_in} " in error.value.where


@pytest.mark.parametrize(
    ("base", "change", "effect"),
    [
        (LORA, {"lora_init": "gaussian"}, False),
        (LORA, {"adapter_path": "a.safetensors"}, False),
        ({}, {"transformer_path": "other"}, False),
        (LORA, {"transformer_path": "other"}, True),  # the base that adapters change
        ({}, {"keep_all_node_same_token_length": True}, False),
        ({}, {"adam_weight_decay": 0.5}, True),
    ],
)
def test_what_a_run_begins_with_is_said_to_be_without_effect(changed, base, change, effect):
    ((name, value),) = change.items()
    (line,) = changed(base, base | change)
    assert line.startswith(f"{name} was {shown(flat(build(base))[name])} and is {shown(value)}")
    assert line.endswith("without effect on a run that goes on") != effect


def test_no_switch_changes_in_silence(changed):
    """Each setting that is true or false, by itself: named, or refused in its own name or another's."""
    apart = {"resume_from_checkpoint", "output_dir"}
    for name, setting in settings().items():
        if not setting.is_switch or name in apart:
            continue
        now = {name: not setting.default}
        try:
            build(now)
        except UserError:
            continue  # it does not go alone
        try:
            assert [line.split(" ")[0] for line in changed({}, now)] == [name]
        except UserError as error:
            assert [line.split(" ")[0] for line in error.problems] == [name]


def test_a_run_is_not_begun_within_a_checkpoint_which_goes(tmp_path):
    checkpoint, link = tmp_path / "checkpoint-2", tmp_path / "link"
    checkpoint.mkdir()
    (checkpoint / "progress.json").write_text("{}")
    link.symlink_to(checkpoint)
    for out, place in ((checkpoint, "a checkpoint"), (checkpoint / "runs/new", "within "), (link / "new", "within ")):
        with pytest.raises(UserError, match=f"output_dir .* is {place}.*which goes once the run has"):
            refuse_overwriting(out, None)
    refuse_overwriting(checkpoint / "new", tmp_path / "checkpoint-1")  # of one that was begun there it is not said
    with pytest.raises(UserError, match=r"cache_folder .* is within .*checkpoint-2, which goes once the run has"):
        fill(build({"cache_folder": str(checkpoint / "cache"), "cache_variants": 1}))
