"""Clips with adapters: those of a run, at several strengths, by several seeds, away from a negative prompt."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reeltune.adapters import saved
from reeltune.checkpoint.folder import SHARES
from reeltune.checkpoint.state import Shared
from reeltune.config.parse import build, read
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.distributed import sharded_io
from reeltune.run.adapters import parsed
from reeltune.sampling.clips import sample_clips
from reeltune.sampling.sample import Setup
from reeltune.sampling.sheet import GAP, LINE, write_sheet
from tests.runs.small_run import write_array

SHAPE = Shape(5, 32, 32)


@pytest.fixture
def sample(adapter_run, tmp_path, monkeypatch):
    """(settings of the recipe, options) -> the files made, in a folder of their own."""
    count = iter(range(100))

    def make(settings=None, **options) -> list[Path]:
        tree = read(adapter_run / "recipe.yaml") | {"output_dir": str(tmp_path / str(next(count)))}
        return sample_clips(build(tree, settings or {}), **options)

    monkeypatch.setattr("reeltune.sampling.sample.write_pixels", write_array)
    return make


def apart(one: Path, other: Path) -> float:
    """Mean difference of their pixels, of 255."""
    return float(np.abs(np.load(one).astype(float) - np.load(other)).mean())


def told(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_a_runs_checkpoint_makes_the_clip_of_its_last_preview(adapter_run, sample):
    checkpoint = adapter_run / "checkpoint-4"
    preview = adapter_run / "previews/step-4/0.mp4"
    (made,) = sample({"resume_from_checkpoint": str(checkpoint)})
    (base,) = sample()
    assert apart(made, preview) < 1 < 20 < apart(base, preview)
    file = checkpoint / "adapter/adapter_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert told(made)["adapters"] == [{"path": str(file.parent), "sha256": digest, "strength": 1.0}]
    assert told(made)["weights"] == told(base)["weights"] and "adapters" not in told(base)
    assert told(preview)["negative_prompt"] == told(made)["negative_prompt"] == "grey"


def in_shares(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as several processes write it."""
    shutil.copytree(checkpoint, folder)
    (folder / "digests.json").unlink()
    tensors = saved.read(folder / "adapter")
    (folder / "adapter" / saved.FILE).unlink()
    sharded_io.write(folder / SHARES, [sharded_io.whole(f"weights/{name}", one) for name, one in tensors.items()], None)
    Shared.write_outline(folder, {name: list(one.shape) for name, one in tensors.items()}, {})
    return folder


def test_every_way_to_name_it_is_the_same_adapter(adapter_run, sample, tmp_path):
    checkpoint = adapter_run / "checkpoint-4"
    shares = in_shares(checkpoint, tmp_path / "run/checkpoint-4")
    (wanted,) = sample({"resume_from_checkpoint": str(checkpoint)})
    ways = (checkpoint, checkpoint / "adapter", checkpoint / "adapter" / saved.FILE, shares)
    made = [sample(adapters=[str(way)])[0] for way in ways]
    made += sample({"resume_from_checkpoint": str(shares)})
    made += sample({"adapter_path": str(checkpoint)})
    assert [path.read_bytes() == wanted.read_bytes() for path in made] == [True] * 6
    assert len({told(path)["adapters"][0]["sha256"] for path in (*made[:3], wanted)}) == 1


@pytest.mark.slow
def test_a_clip_for_each_strength_and_a_picture_of_them(adapter_run, sample):
    checkpoint, base, whole = str(adapter_run / "checkpoint-4"), sample()[0], sample({"transformer_path": None})[0]
    *made, sheet = sample(adapters=[f"{checkpoint}:0.5"], strengths=[2.0, 0.0, 1.0], seeds=[7, 42])
    assert [path.name for path in (*made, sheet)] == [*(f"{i}.mp4" for i in range(6)), "0-5.png"]
    assert [(told(path)["seed"], told(path)["adapters"][0]["strength"]) for path in made] == [
        (seed, strength) for seed in (7, 42) for strength in (1.0, 0.0, 0.5)
    ]
    assert made[4].read_bytes() == base.read_bytes() == whole.read_bytes()
    assert made[3].read_bytes() == sample({"resume_from_checkpoint": checkpoint})[0].read_bytes()
    assert made[3].read_bytes() != made[5].read_bytes()
    picture = np.asarray(Image.open(sheet)).astype(int)
    F, H, W = SHAPE
    assert picture.shape == (LINE + 2 * (LINE + H + GAP), GAP + 3 * (W + GAP), 3)
    for row, column, path in ((0, 0, made[0]), (1, 1, made[4]), (1, 2, made[5])):
        top, left = LINE + row * (LINE + H + GAP) + LINE, GAP + column * (W + GAP)
        shown = picture[top : top + H, left : left + W].transpose(2, 0, 1)
        assert (shown == np.load(path)[F // 2]).all()
    assert (picture[:LINE] < 128).any() and (picture[LINE + LINE + H + GAP :][:LINE] < 128).any()  # letters


def test_adapters_add_up(adapter_run, sample, caplog):
    checkpoint = str(adapter_run / "checkpoint-4")
    (half, whole, three) = (
        sample(adapters=texts)[0]
        for texts in ([f"{checkpoint}:0.5"] * 2, [checkpoint], [f"{checkpoint}:1.5", f"{checkpoint}:-0.5"])
    )
    twice = [text for text in caplog.messages if text.startswith(checkpoint) and "given 2 times" in text]
    assert any(text.endswith("it counts with strength 1, the sum of theirs") for text in twice)
    assert apart(half, whole) < 0.5 and apart(three, whole) < 0.5
    assert [one["strength"] for one in told(three)["adapters"]] == [1.5, -0.5]


def test_a_clip_of_no_numbers_is_told(adapter_run, sample, caplog, monkeypatch):
    real = Setup.denoise
    monkeypatch.setattr(Setup, "denoise", lambda *words: real(*words) * torch.nan)
    (made,) = sample()
    (told_of,) = [text for text in caplog.messages if "no finite numbers" in text]
    assert told_of.startswith(f"{made}: 100% of what was decoded") and "a lower strength" in told_of
    assert not np.load(made).any()


def test_a_narrow_column_is_labelled_by_its_last_word(tmp_path):
    frames = [[np.zeros((8, 40, 3), np.uint8)] * 2]
    pictures = []
    for columns in (["strength 0.5", "strength 2"], ["0.5", "2"], ["strength", "strength"]):
        write_sheet(tmp_path / "sheet.png", frames, rows=["a"], columns=columns)
        pictures.append(np.asarray(Image.open(tmp_path / "sheet.png")))
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


@pytest.mark.slow
def test_a_negative_prompt_is_what_the_clip_is_guided_away_from(sample):
    first, second, blank = (sample({"negative_prompt": text})[0] for text in ("grey", "red dogs", ""))
    assert len({path.read_bytes() for path in (first, second, blank)}) == 3
    assert sample()[0].read_bytes() == first.read_bytes()  # as the recipe says
    with pytest.raises(UserError, match="negative_prompt is grey and guidance_scale is 1, which guides away from noth"):
        sample({"guidance_scale": 1})


@pytest.mark.slow
def test_the_ways_in_which_a_base_is_held(adapter_run, sample):
    """In 8 bits, and in the CPU's memory: at strength 0 what the base makes so, and whole as elsewhere."""
    run = {"resume_from_checkpoint": str(adapter_run / "checkpoint-4")}
    (whole,) = sample(run)
    assert np.array_equal(np.load(sample(run | {"blocks_to_swap": 1})[0]), np.load(whole))
    coarse, none, _ = sample(run | {"base_weights": "int8"}, strengths=[1.0, 0.0])
    assert 0 < apart(coarse, whole) < 5 and apart(none, whole) > 20
    assert np.array_equal(np.load(none), np.load(sample({"base_weights": "int8"})[0]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a.safetensors", 1.0), ("a.safetensors:0.8", 0.8), ("a:b.safetensors:-1", -1.0), ("run/checkpoint-4:1e-1", 0.1)],
)
def test_the_strength_stands_behind_the_last_colon(text, wanted):
    path, strength = parsed(text)
    assert (strength == wanted and f"{path}:{text.rpartition(':')[2]}" == text) or str(path) == text


def test_a_file_that_is_named_so_is_meant(tmp_path):
    (tmp_path / "a:0.5").touch()
    assert parsed(f"{tmp_path}/a:0.5") == (tmp_path / "a:0.5", 1.0)


def test_a_strength_that_is_a_slip():
    with pytest.raises(UserError, match=r"'a.safetensors:-1e300': strength -1e300 is beyond 1000; 1 is as it was"):
        parsed("a.safetensors:-1e300")


def test_what_is_refused(adapter_run, sample, tmp_path):
    checkpoint = adapter_run / "checkpoint-4"
    with pytest.raises(UserError, match="strengths are given and no adapter"):
        sample(strengths=[1.0])
    with pytest.raises(UserError) as error:
        sample(adapters=[str(checkpoint)], strengths=[float("nan")], seeds=[1, 1])
    assert error.value.problems == [
        "strengths has nan; give numbers up to 1000; 1 is as it was trained",
        "seeds is 1 1; give whole numbers from 0, none of them twice",
    ]
    with pytest.raises(UserError) as error:
        sample(adapters=[f"{checkpoint}:much", f"{tmp_path / 'gone.safetensors'}", ":2"])
    assert len(error.value.problems) == 3 and "'much' is no strength" in error.value.problems[0]
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        sample(adapters=[f"{tmp_path / 'gone.safetensors'}:1"])
    other = tmp_path / "other/checkpoint-4"
    shutil.copytree(checkpoint, other)
    (other / "digests.json").unlink()
    config = saved.config_of(other / "adapter")
    tensors = {name.replace("blocks.1", "blocks.7"): one for name, one in saved.read(other / "adapter").items()}
    alphas = {name.replace("blocks.1", "blocks.7"): alpha for name, alpha in config["alphas"].items()}
    saved.write(other / "adapter", tensors, alphas, {})
    with pytest.raises(UserError, match=r"blocks\.7\.self_attn\.q\.weight is not in the network"):
        sample(adapters=[str(other)])
    (other / "adapter" / saved.FILE).write_bytes(b"spoilt")
    with pytest.raises(UserError, match="adapter_model"):
        sample({"resume_from_checkpoint": str(other)})
