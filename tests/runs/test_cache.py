"""The cache: the same bits as live, and never a stale or a held-out entry."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reeltune import cli
from reeltune.cache import entries, fill, maintenance, store
from reeltune.config.parse import dump
from reeltune.core.errors import UserError
from reeltune.data import loader
from reeltune.data.media import MediaError
from reeltune.families.spec import Parts
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import STEPS, cached, entries_written
from tests.runs.same_run import assert_same_end
from tests.runs.small_run import data_set


def never(*_):
    raise AssertionError("a frozen network was read")


# ---- the same bits; tests/families/test_every_family.py has it in every family and mode


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
        {"train_batch_size": 1, "gradient_accumulation_steps": 2},
        pytest.param(
            {"random_frame_crop": True, "random_hw_adapt": True, "image_sample_size": 48, "cache_variants": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param({"use_ema": True, "ema_decay": 0.9, "seed": 7}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_from_the_cache_is_the_live_run(changes, run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    assert train(run("live", model, **changes)) == 0
    from_cache = cached(run("cached", model, dataloader_num_workers=2, **changes), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    monkeypatch.setattr(Parts, "_read", never)
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)


def test_a_live_run_goes_on_from_the_cache(run, tmp_path):
    assert train(run("live")) == 0
    assert train(run("half", max_train_steps=3)) == 0
    rest = cached(run("half", resume_from_checkpoint="latest"), tmp_path / "cache")
    assert fill.fill(rest) == 0
    assert train(rest) == 0
    assert_same_end(tmp_path / "half", tmp_path / "live", STEPS)


def test_other_seeds_share_a_cache(run, tmp_path, capfd):
    assert fill.fill(cached(run("a"), tmp_path / "cache")) == 0
    assert fill.fill(cached(run("b", seed=1), tmp_path / "cache")) == 0
    assert entries_written(capfd)[-1] == 0


def test_files_that_cannot_be_read_have_the_same_stand_ins(run, tmp_path, monkeypatch):
    def read(path, *how, real=loader.read_frames):
        if Path(path).name == "3.mp4":
            raise MediaError("is damaged at 0.12 s")
        return real(path, *how)

    monkeypatch.setattr(loader, "read_frames", read)
    whole = {"held_out_share": 0, "max_bad_share": 0.5}
    assert train(run("live", **whole)) == 0
    from_cache = cached(run("cached", **whole), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)
    assert json.loads((tmp_path / "live/ledger.json").read_text())["failed_reads"] > 0
    maintenance.prune(from_cache)  # which does not forget that they cannot be read
    assert "2 of files that cannot be read" in maintenance.verify(from_cache)


@pytest.mark.slow
def test_held_out_previews_come_from_the_cache_and_read_the_decoder_alone(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_v1.0")
    previews = {"preview_count": 1, "preview_steps": 2, "max_train_steps": 1}
    assert train(run("live", model, **previews)) == 0
    from_cache = cached(run("cached", model, **previews), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    read = []
    monkeypatch.setattr(Parts, "_read", lambda parts, name, real=Parts._read: (read.append(name), real(parts, name)))
    assert train(from_cache) == 0
    assert read == ["vae"]
    for name in ("step-1/0.mp4", "truth/0.mp4", "control/0.mp4"):
        assert (tmp_path / "cached/previews" / name).read_bytes() == (tmp_path / "live/previews" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "cached/first_batch").iterdir()) == sorted(
        path.name for path in (tmp_path / "live/first_batch").iterdir()
    )


def test_filling_reads_no_weights_of_the_trained_network(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_v1.1")
    places = []

    def noted(*given, real=fill.load_parts, **how):
        parts = real(*given, **how)
        places.append({weight.device.type for weight in parts.net.parameters()})
        return parts

    monkeypatch.setattr(fill, "load_parts", noted)
    assert fill.fill(cached(run("a", model), tmp_path / "cache")) == 0
    assert places == [{"meta"}]


# ---- what is encoded again


@pytest.fixture
def own_data(tmp_path):
    return data_set(tmp_path / "data", clips=4, stills=1)


def edit(data, entry, **changes):
    path = data / "metadata_control.json"
    listed = json.loads(path.read_text())
    listed[entry] |= changes
    path.write_text(json.dumps(listed))


def test_only_what_changed_is_encoded_again(run, own_data, tmp_path, capfd):
    given = cached(run("run", data=own_data, held_out_share=0), tmp_path / "cache")
    fill.fill(given)
    assert entries_written(capfd) == [1 + 5 + 4 * 2 + 1]  # the empty caption, captions, clips in two windows, the still
    fill.fill(given)
    edit(own_data, 1, text="another thing")
    with pytest.raises(UserError, match=r"lacks 2 of 10 readings of clips, the first of .*/1\.mp4; run reeltune cache"):
        train(given)
    fill.fill(given)
    os.utime(own_data / "train/2.mp4", (1, 1))
    fill.fill(given)
    os.utime(own_data / "control/0.mp4", (1, 1))
    fill.fill(given)
    fill.fill(replace(given, cache=replace(given.cache, cache_variants=3)))
    assert entries_written(capfd) == [0, 1, 2, 2, 4]
    assert train(given) == 0


def test_a_control_that_was_replaced_within_its_second_is_encoded_again(run, own_data, tmp_path, capfd):
    """Keys know a file by its size and whole seconds."""
    given = cached(run("run", data=own_data, held_out_share=0), tmp_path / "cache")
    control = own_data / "control/2.mp4"
    os.utime(control, ns=(0, 10**18))
    fill.fill(given)
    control.write_bytes(control.read_bytes()[:-1] + b"?")
    os.utime(control, ns=(0, 10**18 + 1))
    with pytest.raises(UserError, match=r"lacks 2 of 10 readings of clips, the first of .*/2\.mp4; run reeltune cache"):
        train(given)
    with pytest.raises(UserError, match=r"2 of .* entries are missing"):
        maintenance.verify(given)
    fill.fill(given)
    assert entries_written(capfd)[1:] == [2] and train(given) == 0
    maintenance.prune(given)
    assert "all whole" in maintenance.verify(given)


def test_another_way_of_encoding_is_another_cache_and_told(run, tmp_path, capfd):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    other = replace(given, training=replace(given.training, mixed_precision="bf16"))
    with pytest.raises(UserError) as error:
        train(other)
    assert error.value.problems[1:] == ["it was made with mixed_precision no, which now is bf16"]


def test_what_was_found_complete_is_not_looked_at_again_until_something_changes(run, own_data, tmp_path, monkeypatch):
    given = cached(run("run", data=own_data, held_out_share=0, max_train_steps=1), tmp_path / "cache")
    looked, real = [], entries.items_of
    fill.fill(given)
    monkeypatch.setattr(entries, "items_of", lambda *of: looked.append(of) or real(*of))

    def again(given=given) -> int:
        looked.clear()
        family, mode, _ = choose_family(given)
        entries.open_cache(given, family, mode, gather(given, family, mode, show_progress=False))
        return len(looked)

    assert [again(), again()] == [1, 0]
    assert again(replace(given, cache=replace(given.cache, cache_variants=1))) == 1
    os.utime(own_data / "train/2.mp4", (1, 1))
    with pytest.raises(UserError, match="lacks"):
        again()
    fill.fill(given)
    assert [again(), again()] == [1, 0]
    next((tmp_path / "cache/shards").glob("*")).unlink()
    with pytest.raises(UserError, match="lacks"):
        again()


def test_other_weights_of_an_encoder_are_told(run, tmp_path):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    given = cached(run("run", model), tmp_path / "cache")
    fill.fill(given)
    same = tiny_checkpoint(tmp_path / "same", "control_t2v")
    moved = replace(given, model=replace(given.model, pretrained_model_name_or_path=str(same)))
    assert train(moved) == 0  # known by their bytes, wherever they lie
    vae = model / "Wan2.1_VAE.pth"
    weights = torch.load(vae, weights_only=True)
    next(iter(weights.values())).view(-1)[0] += 1
    torch.save(weights, vae)
    with pytest.raises(UserError, match="it was made with vae "):
        train(cached(run("again", model), tmp_path / "cache"))


def test_held_out_clips_are_never_trained_on(run, tmp_path):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    family, mode, _ = choose_family(given)
    inputs, keys = gather(given, family, mode, show_progress=False), entries.keys_of(given, family, mode)
    by_split = {split: set() for split in ("train", "held_out")}
    for item in entries.items_of(keys, inputs):
        by_split[item.split].add(item.clip)
    held = store.Store(tmp_path / "cache")
    assert by_split["held_out"] and not by_split["train"] & by_split["held_out"]
    assert all(held.entries[key][1] == split for split, found in by_split.items() for key in found)
    for key in by_split["held_out"]:
        with pytest.raises(UserError, match="was written for held_out and is asked for train"):
            held.read(key, "train")
    record, draw = inputs.held_out[0], entries.ways(inputs, inputs.plan(0), "held_out", 0)[0]
    with pytest.raises(UserError, match="is not in the cache"):  # the very reading that is there, but held out
        entries.View(held, keys, "train")(record, draw, {})
    with pytest.raises(UserError, match="lacks"):
        train(replace(given, data=replace(given.data, held_out_share=0.0)))


# ---- the command


def test_the_command(run, toy, data, tmp_path, capfd):
    given = cached(run("run"), tmp_path / "cache")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(given))
    assert cli.main(["cache", str(path)]) == 0
    told = capfd.readouterr().err
    assert re.search(r"\d+ entries written \(.* GB\), 0 were there", told)
    assert cli.main(["cache", "verify", str(path)]) == 0
    assert cli.main(["cache", "prune", str(path)]) == 0
    told = capfd.readouterr().out
    assert "all whole" in told and "0 GB freed" in told
    assert cli.main(["cache", str(path), "--cache_variants", "0"]) == 2
    assert "it keeps a fixed number of ways" in capfd.readouterr().err
    assert cli.main(["cache", str(path), "--cache_folder", "none"]) == 2
    assert "cache_folder is missing" in capfd.readouterr().err
