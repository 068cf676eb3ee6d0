"""A model of two networks: one learns, at the noise levels that sampling gives it; both make clips."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from reeltune.adapters import saved
from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.estimate.check import check
from reeltune.export.adapter import export_adapter
from reeltune.export.merge import export_merged
from reeltune.families import weights
from reeltune.run.base import Base
from reeltune.run.model import choose_family, other_expert_bytes
from reeltune.sampling.clips import sample_clips
from reeltune.sampling.other_expert import OtherExpert
from reeltune.sampling.prompts import Request
from reeltune.sampling.sample import Setup, make_clip
from reeltune.training.loop import train
from tests.families.tiny_wan import batch, tiny_checkpoint
from tests.runs.small_run import data_set, recipe

SMALL = {"train_mode": "normal", "fix_sample_size": (32, 48), "checkpointing_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=4, stills=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "a14b", "2.2_a14b_t2v")


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory, reports):
    """One run of the high expert."""
    out = tmp_path_factory.mktemp("run") / "out"
    looked_at = {"held_out_share": 0.25, "preview_count": 1, "preview_steps": 4}
    made = recipe(model, data, out, expert="high", max_train_steps=2, **looked_at, **SMALL)
    assert train(made) == 0
    return made, out


def setup_of(model, data, tmp_path, expert, **more):
    made = recipe(model, data, tmp_path / expert, expert=expert, **SMALL, **more)
    family, mode, objective = choose_family(made)
    other = OtherExpert.of(made, family, torch.device("cpu"))
    return Setup(family, mode, family.load(model), objective, other=other)


def clip_of(setup, tmp_path, **more):
    one = batch("normal", count=1)
    one.draws = [replace(one.draws[0], shape=Shape(5, 32, 48))]
    request = Request("a cat.", lambda: one, seed=3, fps=8.0)
    return make_clip(setup, setup.parts.net, request, one, tmp_path / "clip.mp4", steps=8, guidance_scale=1.0, **more)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_clips_pass_from_one_network_to_the_other_at_the_boundary(expert, model, data, tmp_path):
    setup = setup_of(model, data, tmp_path, expert)
    asked = []

    def denoise(net, x_BCThw, timestep_B, cond, inner=setup.family.denoise):
        asked.append((net is setup.parts.net, timestep_B.item()))
        return inner(net, x_BCThw, timestep_B, cond)

    watched = replace(setup, family=replace(setup.family, denoise=denoise))
    clip_of(watched, tmp_path)
    assert [t for _, t in asked] == sorted((t for _, t in asked), reverse=True) and len(asked) == 8
    assert [own for own, _ in asked] == [(t >= 875) == (expert == "high") for _, t in asked]
    assert len({own for own, _ in asked}) == 2
    told = json.loads((tmp_path / "clip.json").read_text())["other_expert"]
    other = {"high": "low", "low": "high"}[expert]
    assert told == {"name": other, "path": str(model / f"{other}_noise_model")}


@pytest.mark.slow
def test_which_of_them_learns_changes_nothing_of_an_untrained_models_clip(model, data, tmp_path):
    clips = [clip_of(setup_of(model, data, tmp_path, expert), tmp_path) for expert in ("high", "low")]
    assert torch.equal(*clips)
    alone = replace(setup_of(model, data, tmp_path, "low"), other=None)
    assert not torch.equal(clip_of(alone, tmp_path), clips[0])


def test_where_nobody_looks_the_other_is_not_read(model, data, tmp_path):
    setup = setup_of(model, data, tmp_path, "low")
    assert clip_of(setup, tmp_path, write=False) is None
    assert "net" not in vars(setup.other) and not (tmp_path / "clip.mp4").exists()


def test_it_learns_and_is_measured_at_its_own_levels(run):
    _, out = run
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["kind"] == "validation"]
    assert measured and all(band["level"] >= 0.875 for row in measured for band in row["per_band"])
    assert json.loads((out / "run.json").read_text())["expert"] == "high"
    assert json.loads((out / "previews/step-2/0.json").read_text())["other_expert"]["name"] == "low"


def test_a_run_goes_on_with_the_network_that_it_began_with(run):
    made, _ = run
    other = replace(
        made,
        model=replace(made.model, expert="low"),
        training=replace(made.training, max_train_steps=4),
        output=replace(made.output, resume_from_checkpoint="latest"),
    )
    with pytest.raises(UserError, match="expert was high and is low"):
        train(other)


def test_samples_are_of_both_trained_networks(run, model, data, tmp_path):
    """The other one's own checkpoint in place of the model's."""
    _, high = run
    low = tmp_path / "low"
    assert train(recipe(model, data, low, expert="low", max_train_steps=2, preview_count=0, **SMALL)) == 0
    found = []
    for place, more in (("own", {}), ("both", {"other_expert_path": str(low / "checkpoint-2")})):
        asked = {"validation_prompts": ("a cat",), "preview_steps": 3, "guidance_scale": 1.0, **SMALL, **more}
        made = recipe(model, data, tmp_path / place, expert="high", **asked)
        made = replace(made, output=replace(made.output, resume_from_checkpoint=str(high / "checkpoint-2")))
        (clip,) = sample_clips(made)
        found.append((clip.read_bytes(), json.loads(clip.with_suffix(".json").read_text())))
    assert found[0][0] != found[1][0]
    assert found[1][1]["other_expert"] == {"name": "low", "path": str(low / "checkpoint-2")}
    assert all(told["weights"]["path"] == str(high / "checkpoint-2") for _, told in found)


@pytest.mark.parametrize(
    ("variant", "said", "words"),
    [
        (
            "2.2_a14b_t2v",
            {},
            "expert is left out, and .* has two networks: high answers at noise levels",
        ),
        ("t2v", {"expert": "low"}, "expert is 'low', but a checkpoint of wan_fun/t2v has one network"),
        (
            "t2v",
            {"other_expert_path": "x"},
            "other_expert_path is 'x', but a checkpoint of .* has one network",
        ),
    ],
)
def test_what_is_refused(variant, said, words, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", variant)
    with pytest.raises(UserError, match=words):
        choose_family(build({"pretrained_model_name_or_path": str(folder), **said}))


def test_one_network_alone_can_learn(model, data, tmp_path, caplog):
    only = tmp_path / "only"
    only.mkdir()
    for part in model.iterdir():
        if part.name != "low_noise_model":
            (only / part.name).symlink_to(part)
    setup = setup_of(only, data, tmp_path, "high")
    assert setup.other is None and "holds the weights of expert high alone" in caplog.text
    with pytest.raises(UserError, match="expert is 'low', but the checkpoint holds the weights of high alone"):
        setup_of(only, data, tmp_path, "low")
    elsewhere = tmp_path / "lent"
    shutil.copytree(model / "low_noise_model", elsewhere)
    lent = setup_of(only, data, tmp_path, "high", other_expert_path=str(elsewhere))
    assert torch.equal(clip_of(lent, tmp_path), clip_of(setup_of(model, data, tmp_path, "high"), tmp_path))


@pytest.mark.parametrize("setting", ["transformer_path", "other_expert_path", "resume_from_checkpoint"])
def test_weights_of_the_wrong_expert_are_refused(setting, run, model, data, tmp_path):
    """By the recipe of a checkpoint, and by the place in the model's folder."""
    _, high = run
    expert = "high" if setting == "other_expert_path" else "low"
    for path in (high / "checkpoint-2", high / "checkpoint-2/transformer", model / "high_noise_model"):
        if setting == "resume_from_checkpoint" and path.name != "checkpoint-2":
            continue
        made = recipe(model, data, tmp_path / "out", expert=expert, validation_prompts=("a cat",), **SMALL)
        part = made.output if setting == "resume_from_checkpoint" else made.model
        asked = replace(part, **{setting: str(path)})
        made = replace(made, **{"output" if part is made.output else "model": asked})
        with pytest.raises(UserError, match=f"{setting} is .* of expert high, and low is meant"):
            sample_clips(made)


def test_other_weights_that_do_not_fit_are_told_before_the_first_step(model, data, tmp_path):
    bigger = tiny_checkpoint(tmp_path / "other", "2.2_a14b_inp") / "low_noise_model"
    for path, words in ((tmp_path / "nowhere", "is missing"), (bigger, "misshapen: patch_embedding.weight")):
        made = recipe(model, data, tmp_path / "out", expert="high", other_expert_path=str(path), **SMALL)
        with pytest.raises(UserError, match=words):
            list(check(made))


def test_the_base_of_an_adapter_is_the_network_beneath_it(model):
    name = "blocks.0.ffn.0.weight"
    either = Base(model)
    for expert in ("high", "low"):
        own = weights.read(model / f"{expert}_noise_model")
        assert torch.equal(Base(model, expert=expert)[name], own[name]) and either.keys() == own.keys()
    assert not torch.equal(Base(model, expert="high")[name], Base(model, expert="low")[name])
    with pytest.raises(UserError, match="expert is left out"):
        either[name]


@pytest.mark.slow
def test_an_adapter_says_whose_it_is_and_is_merged_into_that(model, data, tmp_path):
    out = tmp_path / "out"
    adapters = {"rank": 4, "max_train_steps": 2, **SMALL}
    assert train(recipe(model, data, out, expert="high", **adapters)) == 0
    assert saved.config_of(out / "checkpoint-2/adapter")["expert"] == "high"
    list(export_merged(out / "checkpoint-2", tmp_path / "merged", dtype="fp32"))
    high, merged = weights.read(model / "high_noise_model"), weights.read(tmp_path / "merged")
    changed = {name for name in high if not torch.equal(high[name], merged[name])}
    assert changed and all(".weight" in name and name.startswith("blocks.") for name in changed)
    exported = tmp_path / "for_others.safetensors"
    list(export_adapter(out / "checkpoint-2", exported, "comfyui"))
    for adapter in (out / "checkpoint-2", out / "checkpoint-2/adapter/adapter_model.safetensors", exported):
        made = recipe(model, data, tmp_path / "low", expert="low", validation_prompts=("a cat",), **SMALL)
        with pytest.raises(UserError, match="of expert high, and low is meant"):
            sample_clips(made, adapters=[str(adapter)])


def test_plan_counts_the_network_that_makes_previews(model, data, tmp_path):
    counts = []
    for count in (0, 1):
        made = recipe(model, data, tmp_path / "out", expert="high", preview_count=count, **SMALL)
        counts.append(other_expert_bytes(made, choose_family(made)[0]))
    low = weights.read(model / "low_noise_model")
    assert counts == [0, 4 * sum(tensor.numel() for tensor in low.values())]  # mixed_precision is no
