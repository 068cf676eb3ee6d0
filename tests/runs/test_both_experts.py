"""Both networks of a model learn in one run, in turns, each as it would in a run of its own."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reeltune.adapters import saved
from reeltune.cache.fill import fill
from reeltune.checkpoint.folder import parts
from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.estimate import sharding
from reeltune.estimate.check import check
from reeltune.estimate.machines import Machines
from reeltune.estimate.main import forecast
from reeltune.export.adapter import export_adapter
from reeltune.export.main import export
from reeltune.export.merge import export_merged
from reeltune.export.rank import measure_ranks
from reeltune.families import weights
from reeltune.reporting import report
from reeltune.run.model import choose_family
from reeltune.sampling.clips import sample_clips
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import assert_same_end, assert_same_network
from tests.runs.small_run import data_set, recipe

SMALL = {"train_mode": "normal", "fix_sample_size": (32, 48), "checkpointing_steps": 2, "expert": "both"}
LOOKED_AT = {"held_out_share": 0.25, "preview_count": 1, "preview_steps": 4, "guidance_scale": 1.0}
ADAPTERS = {"rank": 4, "train_whole": ["head"], "use_ema": True, "lora_dropout": 0.1}
SHARE = 0.632  # of the indices of a schedule shifted by 12, those from noise level 0.875 on


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=5, stills=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "a14b", "2.2_a14b_t2v")


@pytest.fixture(scope="module")
def runs(model, data, tmp_path_factory, reports):
    """What learns -> (recipe, folder) of a run that nothing disturbed."""
    made = {}
    for what, more in (("whole", {"use_ema": True}), ("adapters", ADAPTERS)):
        out = tmp_path_factory.mktemp(what) / "out"
        asked = recipe(model, data, out, **SMALL, **more, **LOOKED_AT)
        assert train(asked) == 0
        made[what] = asked, out
    return made


def rows(out, kind="step"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def test_each_learns_in_its_share_of_the_steps_at_its_own_levels(runs):
    _, out = runs["whole"]
    whose = [row["expert"] for row in rows(out)]
    for n in range(1, 7):
        assert abs(whose[:n].count("high") - SHARE * n) <= 1
    assert {*whose} == {"high", "low"}
    last = rows(out, "validation")[-1]
    levels = [band["level"] for band in last["per_band"]]
    assert min(levels[:2]) >= 0.875 > max(levels[2:])
    of = {one["expert"]: one for one in last["experts"]}
    assert sum(last["per_clip"]) / last["n"] == pytest.approx(last["loss"])
    assert of["high"]["loss"] < of["high"]["loss_start"] and of["low"]["loss"] < of["low"]["loss_start"]
    assert last["loss"] == pytest.approx(SHARE * of["high"]["loss"] + (1 - SHARE) * of["low"]["loss"])
    told = json.loads((out / "run.json").read_text())
    assert told["expert"] == "both" and told["trainable"] == 2 * 86992
    page = report.write(out).read_text()
    assert "Training loss, expert high" in page and "Expert low at its own levels" in page
    assert len(report.by_expert({"expert": ["low", "high", "low"], "loss": [1, 2, 3]})[", expert low"]["loss"]) == 2


def test_a_turn_is_a_step_of_a_run_of_that_expert_alone(runs, model, data, tmp_path):
    """Of the first expert's first; until then the other has the bits that the model has."""
    _, both = runs["whole"]
    first = rows(both)[0]["expert"]
    one = {**SMALL, **LOOKED_AT, "checkpointing_steps": 1, "max_train_steps": 1, "use_ema": True}
    assert train(recipe(model, data, tmp_path / "alone", **{**one, "expert": first})) == 0
    assert train(recipe(model, data, tmp_path / "both", **one)) == 0
    checkpoint, place = tmp_path / "both/checkpoint-1", f"{first}_noise_model"
    alone = load_file(tmp_path / "alone/checkpoint-1/transformer/diffusion_pytorch_model.safetensors")
    ours = load_file(checkpoint / place / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(alone[name], ours[name]) for name in alone) and alone.keys() == ours.keys()
    (other,) = {"high_noise_model", "low_noise_model"} - {place}
    released, kept = weights.read(model / other), weights.read(checkpoint / other)
    assert all(torch.equal(released[name], kept[name]) for name in released)
    (validation,), (of_both,) = (rows(tmp_path / name, "validation")[:1] for name in ("alone", "both"))
    assert np.mean(of_both["per_clip"]) == pytest.approx(of_both["loss"], rel=1e-12)
    measured = [band["loss"] for band in of_both["per_band"]]
    assert [band["loss"] for band in validation["per_band"]] == (measured[:2] if first == "high" else measured[2:])


@pytest.mark.parametrize("what", [pytest.param("whole", marks=pytest.mark.slow), "adapters"])
def test_resumed_it_ends_in_the_same_bits(what, runs, tmp_path):
    unbroken, out = runs[what]
    half = replace(
        unbroken,
        training=replace(unbroken.training, max_train_steps=4),
        output=replace(unbroken.output, output_dir=str(tmp_path / "out")),
        validation=replace(unbroken.validation, preview_count=0),
    )
    assert train(half) == 0
    rest = replace(half, training=unbroken.training, output=replace(half.output, resume_from_checkpoint="latest"))
    assert train(rest) == 0
    assert_same_end(tmp_path / "out", out, kinds=("step",))
    assert [row["expert"] for row in rows(tmp_path / "out")] == [row["expert"] for row in rows(out)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["whole", "adapters"])
def test_ways_of_sparing_memory_change_no_bit(what, runs, model, data, tmp_path):
    more = {"blocks_to_swap": 1, **ADAPTERS, "lora_dropout": 0.1} if what == "adapters" else {"use_ema": True}
    spared = {**more, "step_in_backward": True, "gradient_checkpointing": True}
    asked = recipe(model, data, tmp_path / "out", **SMALL, **spared, **{**LOOKED_AT, "preview_count": 0})
    assert train(asked) == 0
    for name, ours in parts(tmp_path / "out/checkpoint-6").items():
        assert_same_network(ours, parts(runs[what][1] / "checkpoint-6")[name])


@pytest.mark.slow
def test_cached_conditions_are_those_of_both(runs, data, tmp_path):
    asked, _ = runs["adapters"]
    live = replace(
        asked, cache=replace(asked.cache, cache_variants=1), validation=build({"preview_count": 0}).validation
    )
    live = replace(live, output=replace(asked.output, output_dir=str(tmp_path / "live")))
    cached = replace(
        live,
        cache=replace(live.cache, cache_folder=str(tmp_path / "cache")),
        output=replace(live.output, output_dir=str(tmp_path / "cached")),
    )
    fill(cached)
    assert train(cached) == train(live) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live")


def test_accumulation_stays_within_one_expert(model, data, tmp_path):
    asked = {**SMALL, "max_train_steps": 3, "gradient_accumulation_steps": 2, "preview_count": 0}
    assert train(recipe(model, data, tmp_path / "out", **asked)) == 0
    stepped = {
        name: torch.load(part / "optimizer.pt", weights_only=True)["optimizer"]["state"][0]["step"].item()
        for name, part in parts(tmp_path / "out/checkpoint-3").items()
    }
    assert sum(stepped.values()) == 3 and abs(stepped["high"] - 3 * SHARE) <= 1


def test_an_average_begins_with_its_experts_first_turn(runs, model, data, tmp_path):
    """At which nothing is left of the weights that it began with, whatever step of the run it is."""
    count = 1 + [row["expert"] for row in rows(runs["whole"][1])].index("low")
    assert count > 1
    asked = {**SMALL, "max_train_steps": count, "checkpointing_steps": count, "use_ema": True, "preview_count": 0}
    assert train(recipe(model, data, tmp_path / "out", **asked)) == 0
    low = parts(tmp_path / f"out/checkpoint-{count}")["low"]
    trained, average = weights.read(low), weights.read(low / "transformer_ema")
    assert all(torch.equal(trained[name], average[name]) for name in trained)


def test_each_has_its_rate_and_clip(model, data, tmp_path):
    own = {"low_expert_learning_rate": 1e-4, "low_expert_max_grad_norm": 1e-3, "lr_scheduler": "constant"}
    assert train(recipe(model, data, tmp_path / "out", **SMALL, **own, preview_count=0)) == 0
    rates = {row["expert"]: row["lr"] for row in rows(tmp_path / "out")}
    assert rates == {"high": 1e-3, "low": 1e-4}
    norms = {
        name: sum(float(one["exp_avg_sq"].sum()) for one in state["optimizer"]["state"].values())
        for name, part in parts(tmp_path / "out/checkpoint-6").items()
        for state in [torch.load(part / "optimizer.pt", weights_only=True)]
    }
    assert norms["low"] < 1e-5 * norms["high"]  # squares of norms that were clipped to 1 and to 0.001


@pytest.mark.slow
def test_clips_are_sampled_from_both_as_previews_are(runs, tmp_path):
    """And by one recipe for each network, the other's weights beside it."""
    for what in ("whole", "adapters"):
        asked, out = runs[what]
        prompt = json.loads((out / "previews/step-6/0.json").read_text())["prompt"]
        shown = replace(asked.validation, validation_prompts=(prompt,))
        checkpoint = out / "checkpoint-6"
        made = []
        for name, model in {
            "both": asked.model,
            "high": replace(
                asked.model,
                expert="high",
                **{"other_expert_path" if what == "whole" else "other_expert_adapter": str(checkpoint)},
            ),
            "high alone": replace(asked.model, expert="high"),
        }.items():
            output = replace(
                asked.output, output_dir=str(tmp_path / what / name), resume_from_checkpoint=str(checkpoint)
            )
            (clip,) = sample_clips(replace(asked, model=model, validation=shown, output=output))
            made.append((clip.read_bytes(), json.loads(clip.with_suffix(".json").read_text())))
        assert made[0][0] == made[1][0] != made[2][0]
        low = str(checkpoint / "low_noise_model")
        assert low in made[0][1]["other_expert"].values() and made[0][1]["other_expert"]["name"] == "low"


def test_strengths_are_those_of_both_adapters(runs, model, tmp_path):
    asked, out = runs["adapters"]
    asked = replace(asked, validation=replace(asked.validation, validation_prompts=("a cat.",)))
    resumed = replace(asked.output, output_dir=str(tmp_path / "ours"), resume_from_checkpoint=str(out / "checkpoint-6"))
    none, full, _ = sample_clips(replace(asked, output=resumed), strengths=(0.0, 1.0))
    untrained = replace(asked, output=replace(asked.output, output_dir=str(tmp_path / "theirs")))
    (base,) = sample_clips(untrained)
    assert none.read_bytes() == base.read_bytes() != full.read_bytes()


@pytest.mark.slow
def test_export_writes_both(runs, model, tmp_path):
    checkpoint = runs["whole"][1] / "checkpoint-6"
    list(export(checkpoint, tmp_path / "whole", dtype="fp32"))
    list(export(checkpoint, tmp_path / "ema", dtype="fp32", ema=True))
    adapters = runs["adapters"][1] / "checkpoint-6"
    list(export_merged(adapters, tmp_path / "merged", dtype="fp32"))
    for place in ("high_noise_model", "low_noise_model"):
        base, kept = weights.read(model / place), weights.read(checkpoint / place)
        whole, merged = (weights.read(tmp_path / name / place) for name in ("whole", "merged"))
        assert all(torch.equal(whole[name], kept[name]) for name in kept) and whole.keys() == base.keys()
        assert any(not torch.equal(base[name], whole[name]) for name in base)
        pair = saved.load(adapters / place / "adapter").layers["blocks.0.ffn.0"]
        changed = pair.changed(base["blocks.0.ffn.0.weight"], 1.0)
        assert torch.allclose(merged["blocks.0.ffn.0.weight"], changed, atol=1e-6)
        assert saved.config_of(adapters / place / "adapter")["expert"] == place.partition("_")[0]
    list(export_merged(adapters / "low_noise_model", tmp_path / "low alone", dtype="fp32"))
    low, one = (weights.read(tmp_path / name) for name in ("merged/low_noise_model", "low alone"))
    assert all(torch.equal(low[name], one[name]) for name in low)


def test_ranks_are_measured_of_each_at_its_own_levels(runs, tmp_path):
    asked, out = runs["whole"]
    told = list(measure_ranks(asked, out / "checkpoint-6", [2], tmp_path / "ranks"))
    of = {one["expert"]: one for one in rows(out, "validation")[-1]["experts"]}
    for name in ("high", "low"):
        first, *_ = [line for line in told if line.startswith(f"expert {name}: ")]
        before, after = re.search(r"loss ([\d.]+) of the base, ([\d.]+) of the fine-tune", first).groups()
        assert (float(before), float(after)) == pytest.approx((of[name]["loss_start"], of[name]["loss"]), abs=6e-5)
        adapter = saved.load(parts(tmp_path / "ranks")[name])
        assert {layer.rank for layer in adapter.layers.values()} == {2} and adapter.about["expert"] == name
    with pytest.raises(UserError, match="keeps an adapter already"):
        list(measure_ranks(runs["adapters"][0], runs["adapters"][1] / "checkpoint-6", [2]))


def test_of_an_export_that_fails_nothing_is_left(runs, tmp_path):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(runs["whole"][1] / "checkpoint-6", checkpoint)
    (checkpoint / "digests.json").unlink()
    state = weights.read(checkpoint / "low_noise_model")
    state["head.head.bias"][0] = float("nan")
    weights.write(state, checkpoint / "low_noise_model/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"head\.head\.bias has 1 numbers that are not finite"):
        list(export(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_exported_adapters_are_two_files_each_of_its_expert(runs, model, data, tmp_path):
    list(export_adapter(runs["adapters"][1] / "checkpoint-6", tmp_path / "mine.safetensors", "comfyui"))
    high, low = (tmp_path / f"mine_{name}_noise.safetensors" for name in ("high", "low"))
    assert sorted(tmp_path.glob("*.safetensors")) == [high, low]
    asked = {**SMALL, "expert": "high", "rank": 4, "validation_prompts": ("a cat.",), "preview_steps": 2}
    for own, other, words in ((high, low, None), (low, high, "of expert low, and high is meant")):
        more = {"adapter_path": str(own), "other_expert_adapter": str(other)}
        made = recipe(model, data, tmp_path / "sampled", **asked, **more)
        if words is None:
            (clip,) = sample_clips(made)
            assert json.loads(clip.with_suffix(".json").read_text())["other_expert"]["adapter"] == str(low)
            continue
        with pytest.raises(UserError, match=words):
            sample_clips(made)


def test_adapters_of_both_are_named_one_by_one(runs, tmp_path):
    asked, out = runs["adapters"]
    shown = replace(asked.validation, validation_prompts=("a cat.",))
    one = replace(asked, model=replace(asked.model, expert="high"), validation=shown)
    with pytest.raises(UserError, match=r"has what is of both experts; give .*high_noise_model or"):
        sample_clips(one, adapters=[str(out / "checkpoint-6")])
    high = str(out / "checkpoint-6/high_noise_model")
    with pytest.raises(
        UserError, match=r"adapters is .*high_noise_model and expert is both(.|\n)*other_expert_adapter"
    ):
        sample_clips(replace(asked, validation=shown), adapters=[high])


@pytest.mark.parametrize("what", ["whole", "adapters"])
def test_a_run_begins_with_what_another_learnt_of_both(what, runs, model, data, tmp_path):
    checkpoint = runs[what][1] / "checkpoint-6"
    name = {"whole": "transformer_path", "adapters": "adapter_path"}[what]
    more = {name: str(checkpoint), **({"rank": 4} if what == "adapters" else {})}
    looked_at = {"held_out_share": 0.25, "preview_count": 0, "max_train_steps": 1}
    if what == "adapters":
        more["train_whole"] = ["head"]
    assert train(recipe(model, data, tmp_path / "out", **SMALL, **looked_at, **more)) == 0
    begun, ended = rows(tmp_path / "out", "validation")[0], rows(runs[what][1], "validation")[-1]
    assert [band["loss"] for band in begun["per_band"]] == [band["loss"] for band in ended["per_band"]]


def test_what_is_of_one_of_them_is_refused(runs, model, data, tmp_path):
    for name, path in (("transformer_path", model / "high_noise_model"), ("adapter_path", tmp_path)):
        more = {"rank": 4} if name == "adapter_path" else {}
        asked = recipe(model, data, tmp_path / "out", **SMALL, **more, **{name: str(path)})
        with pytest.raises(UserError, match=f"{name} is .* and expert is both; give a checkpoint-N folder"):
            choose_family(asked)
    one = recipe(model, data, runs["whole"][1], **{**SMALL, "expert": "high"}, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="expert was both and is high"):
        train(one)


def test_what_is_of_both_is_taken_for_one(runs, model, data, tmp_path):
    """adapter_path of a checkpoint of both is that of the expert that learns; of an adapter alone is told whose."""
    checkpoint = runs["adapters"][1] / "checkpoint-6"
    one = {**SMALL, "expert": "high", "rank": 4, "max_train_steps": 1, "held_out_share": 0}
    ends = []
    for name, path in (("both", checkpoint), ("own", checkpoint / "high_noise_model")):
        asked = recipe(model, data, tmp_path / name, **one, adapter_path=str(path), train_whole=["head"])
        assert train(asked) == 0
        ends.append(load_file(tmp_path / name / "checkpoint-1/adapter/adapter_model.safetensors"))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    wrong = {
        "adapter_path": (checkpoint / "low_noise_model", "adapter_path is .* those of expert low, and high is meant"),
        "other_expert_adapter": (tmp_path / "gone", "other_expert_adapter is .*gone': is missing"),
    }
    for name, (path, words) in wrong.items():
        asked = recipe(model, data, tmp_path / name, **one, **{name: str(path)}, train_whole=["head"])
        with pytest.raises(UserError, match=words):
            train(asked)


def test_an_adapter_of_weights_that_are_not_there_is_refused(runs, model, data, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(model, alone, ignore=shutil.ignore_patterns("low_noise_model"))
    adapter = str(runs["adapters"][1] / "checkpoint-6/low_noise_model")
    asked = recipe(alone, data, tmp_path / "out", **{**SMALL, "expert": "high"}, other_expert_adapter=adapter)
    with pytest.raises(UserError, match="holds the weights of high alone; give those that it changes"):
        choose_family(asked)
    with pytest.raises(UserError, match="weights of high alone; give expert high, or a checkpoint with both"):
        choose_family(recipe(alone, data, tmp_path / "out", **SMALL))


def test_both_are_looked_at_before_the_first_step(model, data, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in model.iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "high_noise_model").unlink()
    state = weights.read(model / "high_noise_model")
    state.pop("head.head.bias")
    weights.write_component(
        broken / "high_noise_model", state, json.loads((model / "high_noise_model/config.json").read_text())
    )
    asked = recipe(broken, data, tmp_path / "out", **SMALL)
    with pytest.raises(UserError, match="high_noise_model"):
        list(check(asked))
    assert any("normal" in line for line in check(recipe(model, data, tmp_path / "out", **SMALL)))


@pytest.mark.slow
def test_plan_counts_the_one_whose_turn_it_is_not(model, data, tmp_path):
    """Of what is not shared both have a place in the host's memory; shares stay on the device."""
    looked_at = {**SMALL, "cache_folder": str(tmp_path), "cache_variants": 1, "preview_count": 0}
    recipes = {
        name: recipe(model, data, tmp_path / "out", **{**looked_at, "expert": name}) for name in ("high", "both")
    }
    one, both = (forecast(asked, Machines()) for asked in recipes.values())
    step, kept = one.largest_step, ("weights", "masters", "still", "optimizer", "average")
    network = sum(one.peaks["forward"].get(part, 0) for part in kept)
    assert both.peaks == one.peaks and network >= 3 * 4 * 86992  # weights and two moments, in fp32
    assert both.host_bytes["experts between their turns"] == 2 * network
    assert both.disk_bytes["one checkpoint"] == 2 * one.disk_bytes["one checkpoint"]
    assert "the other expert, for previews" not in both.host_bytes
    assert one.expert_changes is None and both.expert_changes is not None
    assert both.expert_changes.sent_bytes == 2 * network and both.expert_changes.seconds is None
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        parts, _ = sharding.peaks(step, engine, 2)
        shared = sum(parts["forward"].get(part, 0) for part in kept)
        if engine == "ddp":
            assert sharding.resting(step, engine, 2) == (parts["forward"]["buckets"], 2 * network)
            continue
        assert sharding.resting(step, engine, 2) == (shared, 0)
        here, host = sharding.resting(step, engine, 2, offload=True)
        assert host > 0 and here + host == shared
