"""Previews and clips from prompts, with files of our own and the toy family."""

import json
import math
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Data, Model, Output, Recipe, Sizes, Training, Validation
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Progress, Record, Shape
from reeltune.data.camera import rays, read_poses, resample
from reeltune.data.held_out import fixed_draw
from reeltune.data.loader import Reader
from reeltune.data.media import measure, read_frames, write_clip
from reeltune.data.plan import Plan
from reeltune.data.shapes import SizeRules
from reeltune.distributed import sharded_io
from reeltune.families.toy.family import FAMILY
from reeltune.run.adapters import digest
from reeltune.sampling.clips import sample_clips
from reeltune.sampling.prompts import played, prompt_requests
from reeltune.sampling.sample import Setup, make_clip
from reeltune.sampling.validate import Checked, Previews, held_out_requests
from reeltune.sampling.validate import Validation as Checks

SIZES = Sizes(video_sample_n_frames=9, video_sample_stride=2, video_sample_size=64, image_sample_size=64)
RULES = SizeRules(
    video_sample_n_frames=9, video_sample_stride=2, video_sample_size=64, image_sample_size=64, geometry=FAMILY.geometry
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips of 20 frames at 24 fps with a moving bar, and their controls."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(2):
        frames_FHWC = np.full((20, 72, 96, 3), 40 + 60 * i, np.uint8)
        for f in range(20):
            frames_FHWC[f, :, 4 * f : 4 * f + 10] = (230, 200, 90)
        write_clip(folder / f"{i}.mp4", frames_FHWC, 24)
        write_clip(folder / f"{i}_control.mp4", 255 - frames_FHWC, 24)
    return folder


@pytest.fixture
def setup():
    return Setup(FAMILY, "control", FAMILY.load("toy"), FAMILY.objective)


def reader_of(folder, *, needs=("control",)) -> Reader:
    records = []
    for i in range(2):
        seen = measure(folder / f"{i}.mp4", "video")
        control = str(folder / f"{i}_control.mp4")
        path, text = str(folder / f"{i}.mp4"), f"bar {i}"
        records.append(Record(10 + i, path, text, "video", seen.frames, seen.fps, 72, 96, control))
    plan = partial(Plan, records, RULES, group=1, seed=0)
    drop = dict.fromkeys(FAMILY.drop, 0.0)
    return Reader(records, plan, group=1, drop=drop, text_drop_ratio=0.0, needs=frozenset(needs))


def test_a_caption_is_encoded_once(clips):
    asked = []

    def describe(parts, captions, picture):
        asked.append(captions)
        return FAMILY.describe(parts, captions, picture)

    family = replace(FAMILY, describe=describe)
    setup = Setup(family, "control", FAMILY.load("toy"), FAMILY.objective)
    requests = held_out_requests(reader_of(clips), RULES, count=2, seed=0)
    found = [setup.encode(request.batch()).cond["text"] for request in requests * 2]
    assert sorted(asked) == [["bar 0"], ["bar 1"]] and len(found) == 4
    assert len({tuple(text.flatten().tolist()) for text in found}) == 2


def frames_of(path, shape) -> np.ndarray:
    return read_frames(path, range(shape.frames), Crop(shape.height, shape.width, 0, 0), shape)


def test_previews_lie_beside_control_and_truth(setup, clips, tmp_path):
    requests = held_out_requests(reader_of(clips), RULES, count=2, seed=42)
    Previews(setup, requests, 3, 6.0).make(setup.parts.net, 0, tmp_path)
    written = sorted(str(path.relative_to(tmp_path / "previews")) for path in tmp_path.rglob("*.*"))
    folders = {"control": ["mp4"], "step-0": ["json", "mp4"], "truth": ["mp4"]}
    assert written == [f"{folder}/{i}.{end}" for folder in folders for i in (0, 1) for end in folders[folder]]
    told = json.loads((tmp_path / "previews/step-0/1.json").read_text())
    assert told == {
        "prompt": "bar 1",
        "negative_prompt": "",
        "seed": 43,
        "steps": 3,
        "guidance_scale": 6.0,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "frames": 9,
        "height": 64,
        "width": 64,
        "fps": 12.0,
        "control": str(clips / "1_control.mp4"),
        "entry": 11,
    }
    for name in ("step-0", "control", "truth"):
        seen = measure(tmp_path / f"previews/{name}/1.mp4", "video")
        assert (seen.frames, seen.height, seen.width, seen.fps) == (9, 64, 64, 12.0)
    shape = Shape(9, 64, 64)
    truth, control = (frames_of(tmp_path / f"previews/{name}/1.mp4", shape) for name in ("truth", "control"))
    source = read_frames(clips / "1.mp4", *_window(reader_of(clips).records[1]))
    assert np.abs(truth.astype(int) - source).mean() < 3
    assert np.abs(255 - control.astype(int) - source).mean() < 5


def _window(record):
    draw = fixed_draw(record, 1, RULES)
    return draw.frames, draw.crop, draw.shape


def test_a_network_that_knows_the_clip_makes_it(setup, clips, tmp_path):
    """Through encode, sampler, decode and the file: the toy VAE's blocks of the held-out clip come out."""
    request = held_out_requests(reader_of(clips), RULES, count=1, seed=7)[0]
    batch = request.batch()
    x0 = setup.encode(batch).x0.mean

    def oracle(net, x_BCThw, timestep_B, cond):
        return (x_BCThw - x0) / (timestep_B / setup.objective.steps)

    knowing = replace(setup, family=replace(FAMILY, denoise=oracle))
    make_clip(knowing, setup.parts.net, request, batch, tmp_path / "0.mp4", steps=4, guidance_scale=1.0)
    shape = batch.draws[0].shape
    wanted = (FAMILY.decode(setup.parts, x0)[0] + 1) * 127.5
    assert np.abs(frames_of(tmp_path / "0.mp4", shape) - wanted.numpy()).mean() < 4


def test_previews_are_the_same_again_and_training_does_not_notice(setup, clips, tmp_path):
    net = setup.parts.net
    previews = Previews(setup, held_out_requests(reader_of(clips), RULES, count=1, seed=1), 2, 6.0)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    previews.make(net, 0, tmp_path / "a")
    previews.make(net, 0, tmp_path / "b")
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    assert net.training and all(weight.grad is None for weight in net.parameters())
    assert len({(tmp_path / run / "previews/step-0/0.mp4").read_bytes() for run in "ab"}) == 1


def test_prompts_follow_their_control_and_lack_the_rest(setup, clips):
    family = replace(FAMILY, drop={"control": 0.1, "ref": 0.1, "image": 0.1})
    paths = [str(clips / "0_control.mp4"), str(clips / "1_control.mp4")]
    requests = prompt_requests(family, "control", ["a bar", "a wall"], paths, RULES, seed=5)
    assert [(r.prompt, r.seed, r.control, r.entry, r.fps) for r in requests] == [
        ("a bar", 5, paths[0], None, 12.0),
        ("a wall", 6, paths[1], None, 12.0),
    ]
    batch = requests[1].batch()
    assert {name: keep.item() for name, keep in batch.keep.items()} == {
        "control": True,
        "ref": False,
        "image": False,
        "text": True,
    }
    held = held_out_requests(reader_of(clips), RULES, count=2, seed=5)[1].batch()
    assert torch.equal(batch.control_BFCHW, held.control_BFCHW) and batch.text == ["a wall"]


POSE = "0.0 0.5 0.9 0.5 0.5 0 0 1 0 0 {x} 0 1 0 0 0 0 1 0\n"


def test_prompts_may_have_a_pose_file(tmp_path):
    pose = tmp_path / "pose.txt"
    pose.write_text("header\n" + "".join(POSE.format(x=i / 10) for i in range(5)))
    family = replace(FAMILY, needs={"camera": ("camera", "ref")}, drop={"ref": 0.1})
    (request,) = prompt_requests(family, "camera", ["left"], [str(pose)], replace(RULES, video_sample_fps=8.0), seed=0)
    batch = request.batch()
    assert batch.pixels_BFCHW.shape == (1, 9, 3, 64, 64) and not batch.keep["ref"].item()
    expected = rays(resample(read_poses(pose), 9, range(9)), 64, 64)
    assert np.array_equal(batch.camera_BFCHW[0].permute(0, 2, 3, 1), expected)
    assert (request.control, request.fps) == (str(pose), 8.0)
    pose.write_text(pose.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(UserError, match=r"pose\.txt is another file than when it was measured.*restore or mend it"):
        request.batch()


def test_prompts_alone_and_masks():
    family = replace(FAMILY, needs={"inpaint": ("mask",)}, drop={"inpaint": 0.9})
    (request,) = prompt_requests(family, "inpaint", ["snow"], [], replace(RULES, fix_sample_size=(32, 48)), seed=0)
    batch = request.batch()
    assert batch.mask_BFHW.shape == (1, 9, 32, 48) and batch.mask_BFHW.all() and not batch.keep["inpaint"].item()
    assert request.fps == 16.0


@pytest.mark.parametrize("needs", [("ref",), ("mask", "ref"), ("mask",)])
def test_prompts_may_begin_with_a_picture(needs, tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(np.full((40, 80, 3), (200, 30, 60), np.uint8)).save(path)
    family = replace(FAMILY, needs={"i2v": needs}, drop={"inpaint": 0.9, "image": 0.1}, native_fps=24.0)
    rules = replace(RULES, enable_bucket=True)
    (request,) = prompt_requests(family, "i2v", ["snow"], [str(path)], rules, seed=0)
    batch = request.batch()
    F, H, W = batch.draws[0].shape
    assert F == 9 and W > 1.8 * H and request.fps == 24.0 and request.control == str(path)
    assert (batch.pixels_BFCHW[0, 0].permute(1, 2, 0) == torch.tensor([200, 30, 60])).all()
    assert not batch.pixels_BFCHW[0, 1:].any() and all(keep.item() for keep in batch.keep.values())
    if "mask" in needs:
        assert not batch.mask_BFHW[0, 0].any() and batch.mask_BFHW[0, 1:].all()
    if "ref" in needs:
        with pytest.raises(UserError, match=r"1 prompts and 0 paths; give a picture to begin with for each prompt$"):
            prompt_requests(family, "i2v", ["snow"], [], rules, seed=0)
    Image.new("RGB", (80, 40)).save(path)
    with pytest.raises(UserError, match=r"first\.png is another file than when it was measured"):
        request.batch()
    path.unlink()
    with pytest.raises(UserError, match=r"first\.png cannot be opened: No such file"):
        request.batch()


def test_paths_that_do_not_fit_are_all_named(clips, tmp_path):
    control = str(clips / "0_control.mp4")
    with pytest.raises(UserError, match=r"2 prompts and 1 paths; give a control clip or picture, .* for each prompt"):
        prompt_requests(FAMILY, "control", ["a", "b"], [control], RULES, seed=0)
    with pytest.raises(UserError, match="train_mode normal takes none"):
        prompt_requests(FAMILY, "normal", ["a"], [control], RULES, seed=0)
    (tmp_path / "pose.txt").write_text("no clip")
    absent = str(tmp_path / "absent.mp4")
    with pytest.raises(UserError) as error:
        prompt_requests(FAMILY, "control", ["a"] * 3, [control, absent, str(tmp_path / "pose.txt")], RULES, seed=0)
    assert len(error.value.problems) == 2
    assert absent in error.value.problems[0] and "pose.txt" in error.value.problems[1]


def test_clips_are_previewed_before_pictures(clips):
    reader = reader_of(clips)
    reader.records[0] = replace(reader.records[0], kind="image", frames=1, fps=0.0)
    assert [r.entry for r in held_out_requests(reader, RULES, count=2, seed=0)] == [11, 10]
    assert [r.fps for r in held_out_requests(reader, RULES, count=1, seed=0)] == [12.0]


def test_clips_play_at_the_speed_of_their_file():
    record = Record(0, "a", "", "video", 20, 30.0, 64, 64)
    assert math.isclose(played(record, RULES), 15.0)
    assert played(record, replace(RULES, video_sample_fps=10.0)) == 10.0


def test_a_clip_that_breaks_after_the_scan_is_named(clips, tmp_path):
    reader = reader_of(clips)
    reader.records[0] = replace(reader.records[0], path=str(tmp_path / "gone.mp4"))
    with pytest.raises(UserError, match=r"gone\.mp4 cannot be opened.*restore or mend it"):
        held_out_requests(reader, RULES, count=1, seed=0)[0].batch()


def recipe(tmp_path, **validation) -> Recipe:
    (tmp_path / "toy.json").write_text("{}")
    return Recipe(
        model=Model(pretrained_model_name_or_path=str(tmp_path), train_mode="control"),
        data=Data(),
        sizes=SIZES,
        training=Training(mixed_precision="bf16", seed=3),
        output=Output(output_dir=str(tmp_path / "run")),
        validation=Validation(preview_steps=2, **validation),
    )


def test_validation_measures_and_previews(setup, clips, tmp_path):
    checks = Checks.build(recipe(tmp_path, preview_count=1, held_out_levels=2), setup, reader_of(clips), RULES)
    row = checks.run(setup.parts.net, 4).held_out
    assert row["n"] == 2 and row["step"] == 4 and len(row["per_band"]) == 2
    assert [path.name for path in sorted((tmp_path / "run/previews/step-4").iterdir())] == ["0.json", "0.mp4"]
    nothing = reader_of(clips)
    nothing.records.clear()
    control = str(clips / "1_control.mp4")
    asked = recipe(tmp_path, validation_prompts=("a bar",), validation_paths=(control,))
    assert Checks.build(asked, setup, nothing, RULES).run(setup.parts.net, 9) == Checked()
    assert json.loads((tmp_path / "run/previews/step-9/0.json").read_text())["control"] == control


def test_sample_makes_a_clip_for_each_prompt(clips, tmp_path):
    control = str(clips / "1_control.mp4")
    asked = recipe(tmp_path, validation_prompts=("a bar",), validation_paths=(control,), guidance_scale=2.0)
    (made,) = sample_clips(asked)
    assert made == tmp_path / "run/samples/0.mp4" and measure(made, "video").frames == 9
    told = json.loads(made.with_suffix(".json").read_text())
    assert (told["seed"], told["guidance_scale"], told["entry"]) == (3, 2.0, None)
    with pytest.raises(UserError, match="validation_prompts"):
        sample_clips(recipe(tmp_path))
    assert told["weights"]["path"] == str(tmp_path) and len(told["weights"]["sha256"]) == 64
    before = made.read_bytes()
    assert [path.name for path in sample_clips(asked)] == ["1.mp4"] and made.read_bytes() == before


@pytest.mark.parametrize("is_shared", [False, True])
def test_sample_takes_a_runs_checkpoint(is_shared, clips, tmp_path):
    control = str(clips / "1_control.mp4")
    asked = recipe(tmp_path, validation_prompts=("a bar",), validation_paths=(control,))
    parts = FAMILY.load(tmp_path, dtype=torch.float32, frozen_dtype=torch.float32, device=torch.device("cpu"))
    state = {name: weight + 0.01 for name, weight in parts.net.state_dict().items()}

    def write_networks(folder):
        checkpoint.write_state(folder, {})
        FAMILY.save(folder / "transformer", state, parts.config)
        if is_shared:
            released = FAMILY.to_released(state, parts.config)
            pieces = [sharded_io.whole(f"weights/{name}", weight) for name, weight in released.items()]
            sharded_io.write(folder / checkpoint.SHARES, pieces, None)
            Shared.write_outline(folder, {name: list(weight.shape) for name, weight in released.items()}, {})

    more = {"write_more": lambda folder: None, "keep": None}
    saved, _ = checkpoint.save(tmp_path / "run", Progress(4), write_networks=write_networks, **more)
    parts.net.load_state_dict(state)
    resumed = replace(asked, output=replace(asked.output, resume_from_checkpoint="checkpoint-4"))
    (made,) = sample_clips(resumed)
    told = json.loads(made.with_suffix(".json").read_text())
    assert told["weights"] == {"path": str(saved), "sha256": digest(dict(parts.net.named_parameters()))}
    for kept in saved.glob("[ts]*/*"):  # transformer or shares
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        if not is_shared:
            with pytest.raises(UserError, match="checkpoint-4 is damaged"):
                sample_clips(replace(asked, model=replace(asked.model, transformer_path=str(saved))))
        kept.write_bytes(whole)
    both = replace(resumed, model=replace(asked.model, transformer_path=str(saved)))
    with pytest.raises(UserError, match="two answers to whose weights are meant"):
        sample_clips(both)
    for wanted, words in (("checkpoint-5", "which is no complete checkpoint"), ("latest", "has no checkpoint")):
        output = Output(output_dir=str(tmp_path / "none"), resume_from_checkpoint=wanted)
        with pytest.raises(UserError, match=words):
            sample_clips(replace(asked, output=output))


@pytest.mark.parametrize(
    "full",
    [MemoryError("Unable to allocate 140. GiB for an array"), torch.OutOfMemoryError("CUDA out of memory. Tried to")],
    ids=["host", "device"],
)
def test_memory_that_runs_out_while_clips_are_made_is_told(full, clips, tmp_path, monkeypatch):
    asked = recipe(tmp_path, validation_prompts=("a bar",), validation_paths=(str(clips / "1_control.mp4"),))
    monkeypatch.setattr("reeltune.sampling.clips.make_clip", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"memory is full while clips are made .*; make smaller ones, by video"):
        sample_clips(asked)
    assert list((tmp_path / "run/samples").iterdir()) == []
    monkeypatch.setattr("reeltune.sampling.clips.make_clip", Mock(side_effect=RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        sample_clips(asked)
