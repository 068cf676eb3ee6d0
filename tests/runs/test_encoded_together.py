"""Runs and caches with `vae_mini_batch`: exact against themselves, within rounding of clips encoded one by one."""

import json
import os
from dataclasses import replace

import pytest
import torch

from reeltune.cache import fill
from reeltune.cache.entries import Item, grouped, keys_of
from reeltune.config.recipe import Cache, Model, Recipe, Training
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.data import loader
from reeltune.data.media import MediaError
from reeltune.families.toy.family import FAMILY
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import STEPS, assert_same_contents, cached, contents, entries_written
from tests.runs.same_run import StopAfter, assert_same_end, rows
from tests.runs.small_run import data_set

TOGETHER = {"vae_mini_batch": 2, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "wan", "control_t2v")


@pytest.fixture
def own_data(tmp_path):
    return data_set(tmp_path / "data", clips=5, stills=2)


def losses(out):
    return [row["loss"] for row in rows(out, ("step",))]


# ---- runs


@pytest.mark.slow
def test_a_resumed_run_has_its_bits_and_one_from_a_cache_its_numbers(run, model, tmp_path):
    assert train(run("alone", model, mixed_precision="no")) == 0
    assert train(run("whole", model, **TOGETHER)) == 0
    with StopAfter(2):
        assert train(run("halves", model, **TOGETHER)) == 128 + 15
    assert train(run("halves", model, resume_from_checkpoint="latest", **TOGETHER)) == 0
    assert_same_end(tmp_path / "halves", tmp_path / "whole", STEPS)
    from_cache = cached(run("cached", model, **TOGETHER), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    assert train(from_cache) == 0
    whole, others = losses(tmp_path / "whole"), [losses(tmp_path / name) for name in ("alone", "cached")]
    assert whole != others[0]  # within rounding is not equal
    assert all(whole == pytest.approx(other, rel=1e-4) for other in others)


# ---- caches


@pytest.mark.slow
def test_a_cache_is_the_same_by_any_processes(run, model, tmp_path, monkeypatch, capfd):
    def filled(name):
        assert fill.fill(cached(run(name, model, **TOGETHER), tmp_path / name)) == 0
        return entries_written(capfd)[-1]

    whole = filled("whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        shares.append(filled("shared"))
    assert sum(shares) == whole and min(shares) > 1
    assert_same_contents(tmp_path / "shared", tmp_path / "whole")


@pytest.mark.slow
def test_a_group_that_lacks_a_clip_is_encoded_whole(run, model, own_data, tmp_path, monkeypatch, capfd):
    """So that a cache filled in parts has the bits of one that is filled at once."""
    sizes = []

    def noted(encoder, batch, real=fill.Encoder._clips):
        sizes.append(len(batch.text))
        return real(encoder, batch)

    monkeypatch.setattr(fill.Encoder, "_clips", noted)
    settings = {**TOGETHER, "data": own_data, "held_out_share": 0, "vae_mini_batch": 3}
    given = cached(run("given", model, **settings), tmp_path / "cache")
    fill.fill(given)
    assert sorted(sizes) == [2, 2, 2, 3, 3]  # two windows of each clip, and the stills, of which there is one way
    os.utime(own_data / "train/1.mp4", (1, 1))
    sizes.clear()
    fill.fill(given)
    assert sizes == [3, 3] and entries_written(capfd)[-1] == 2
    fill.fill(cached(run("anew", model, **settings), tmp_path / "anew"))
    assert_same_contents(tmp_path / "anew", tmp_path / "cache", part=True)


@pytest.mark.slow
def test_a_file_that_cannot_be_read_is_left_out_of_its_group(run, model, own_data, tmp_path, monkeypatch, capfd):
    def read(path, *how, real=loader.read_frames):
        if path == str(own_data / "train/1.mp4"):
            raise MediaError("is damaged at 0.12 s")
        return real(path, *how)

    given = cached(run("given", model, data=own_data, held_out_share=0, **TOGETHER), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(loader, "read_frames", read)
        fill.fill(given)
    missing = 2  # its two windows
    assert len(contents(tmp_path / "cache")) == 1 + 7 + 5 * 2 + 2 - missing  # empty and other captions, clips, stills
    fill.fill(given)
    assert entries_written(capfd)[-1] == missing
    assert train(given) == 0


def test_it_is_another_cache_than_of_clips_alone(run, tmp_path):
    made = Recipe(model=Model("."), cache=Cache(str(tmp_path), 1))
    plain, one, two = (
        keys_of(replace(made, training=Training(vae_mini_batch=count)), FAMILY, "control").facts for count in (0, 1, 2)
    )
    assert plain == one and "vae_mini_batch" not in plain  # caches made before the setting did anything stay
    assert two == {**plain, "vae_mini_batch": 2}
    given = cached(run("given"), tmp_path / "cache")
    fill.fill(given)
    with pytest.raises(UserError) as error:
        train(replace(given, training=replace(given.training, vae_mini_batch=2)))
    assert "vae_mini_batch" in json.dumps(error.value.problems)


def test_groups_are_of_one_shape_split_and_variant():
    wide, high = Shape(5, 32, 64), Shape(5, 64, 32)
    rows = [
        ("train", 0, wide, "a", "text"),
        ("train", 1, wide, "b", "text"),
        ("train", 0, high, "c", "text"),
        ("held_out", 0, wide, "d", "text"),
        ("train", 0, wide, "a", "another"),  # the same clip again
        ("train", 1, wide, "a", "text"),  # and with nothing that is new
        ("train", 0, wide, "e", "text"),
        ("train", 0, wide, "f", "text"),
    ]
    items = [Item(split, i, variant, shape, *keys) for i, (split, variant, shape, *keys) in enumerate(rows)]
    told = [["".join(item.clip for item in group) for group in grouped(items, count)] for count in (1, 2)]
    assert told == [["a", "b", "c", "d", "e", "f", "a"], ["ae", "b", "c", "d", "f", "a"]]
