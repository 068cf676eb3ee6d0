"""Controls drawn from raw clips: those of `reeltune control`, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reeltune.cli import main
from reeltune.config.recipe import Data, Model, Output, Recipe, Sizes, Training, Validation
from reeltune.control import canny
from reeltune.control.canny import open_canny
from reeltune.control.from_clip import draw_controls
from reeltune.control.kind import Settings, pictures
from reeltune.control.kinds import kind_named
from reeltune.control.pose_onnx import PEOPLE_FILE, POSE_FILE
from reeltune.control.source import source_of
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Shape
from reeltune.data.media import measure, read_frames, write_clip
from reeltune.families.toy.family import FAMILY
from reeltune.run.sizes import size_rules
from reeltune.sampling.clips import sample_clips
from reeltune.sampling.prompts import Request, drawn_controls, requests_of
from reeltune.training.loop import train
from tests.unit import tiny_onnx


def frames_of(count=12, height=72, width=96) -> np.ndarray:
    """A block that wanders over a ramp."""
    ramp = np.linspace(40, 160, width).astype(np.uint8)
    clip = np.repeat(np.broadcast_to(ramp, (count, height, width))[..., None], 3, axis=-1).copy()
    for f in range(count):
        clip[f, 20:50, 5 + 5 * f : 30 + 5 * f] = (230, 200, 90)
    return clip


@pytest.fixture
def data(tmp_path):
    """A list of one raw clip and one picture, and the controls that `reeltune control` made of them."""
    folder = tmp_path / "data"
    write_clip(folder / "a.mp4", frames_of(), 12)
    Image.fromarray(frames_of()[3]).save(folder / "b.png")
    rows = [{"file_path": name, "text": name, "type": kind} for name, kind in (("a.mp4", "video"), ("b.png", "image"))]
    (folder / "metadata.json").write_text(json.dumps(rows))
    out = str(folder / "metadata_control.json")
    assert main(["control", str(folder / "metadata.json"), "--kind", "canny", "--out", out]) == 0
    return folder


CONTROLS = {"a.mp4": "control/canny/a.mp4", "b.png": "control/canny/b.png"}


def recipe(tmp_path, data, name="a.mp4", **validation) -> Recipe:
    (tmp_path / "toy.json").write_text("{}")
    side = 64
    return Recipe(
        model=Model(pretrained_model_name_or_path=str(tmp_path), train_mode="control"),
        data=Data(),
        sizes=Sizes(video_sample_n_frames=9, video_sample_stride=1, video_sample_size=side, image_sample_size=side),
        training=Training(mixed_precision="no", seed=3),
        output=Output(output_dir=str(tmp_path / "run")),
        validation=Validation(preview_steps=2, validation_prompts=("a block",), **validation),
    )


def request_of(given: Recipe) -> Request:
    drawn, _ = drawn_controls(given, FAMILY, "control")
    return requests_of(given, FAMILY, "control", size_rules(given, FAMILY), drawn)[0]


def drawn_from(data, name) -> dict:
    return {"validation_control_from": (str(data / name),), "control_kind": "canny"}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_drawn_control_is_the_file_that_reeltune_control_makes(name, data, tmp_path):
    (drawn,) = draw_controls(
        "canny", kind_named("canny").open(None, Settings()), [str(data / name)], tmp_path / "drawn"
    )
    assert drawn.path.read_bytes() == (data / CONTROLS[name]).read_bytes()
    written = drawn.path.stat().st_mtime_ns
    (again,) = draw_controls(
        "canny", kind_named("canny").open(None, Settings()), [str(data / name)], tmp_path / "drawn"
    )
    assert again == drawn and drawn.path.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", CONTROLS)
def test_a_prompts_batch_is_that_of_the_control_file(name, data, tmp_path):
    given = recipe(tmp_path, data, validation_paths=(str(data / CONTROLS[name]),))
    raw = recipe(tmp_path, data, **drawn_from(data, name))
    batches = [request_of(one).batch() for one in (given, raw)]
    for field in ("control_BFCHW", "pixels_BFCHW"):
        assert torch.equal(*(getattr(batch, field) for batch in batches))
    assert batches[0].draws == batches[1].draws and batches[1].control_BFCHW.any()


def test_what_is_drawn_is_the_detectors_but_for_mp4s_loss(data, tmp_path):
    """And read at the size sampled as the detector's own frames would be."""
    (drawn,) = draw_controls(
        "canny", kind_named("canny").open(None, Settings()), [str(data / "a.mp4")], tmp_path / "drawn"
    )
    detector = kind_named("canny").open(None, Settings())
    exact = pictures(detector, source_of(data / "a.mp4", "video"))
    seen = measure(drawn.path, "video")
    assert (seen.frames, seen.height, seen.width, seen.fps) == (12, 72, 96, 12.0)
    read = read_frames(drawn.path, range(12), Crop(72, 96, 0, 0), Shape(12, 72, 96)).transpose(0, 2, 3, 1)
    assert np.array_equal(read > 127, exact > 127) and np.abs(read.astype(int) - exact).mean() < 2


def test_sample_takes_a_raw_clip(data, tmp_path):
    (given,) = sample_clips(recipe(tmp_path, data, validation_paths=(str(data / CONTROLS["a.mp4"]),)))
    (raw,) = sample_clips(recipe(tmp_path, data, **drawn_from(data, "a.mp4")))
    assert given.read_bytes() == raw.read_bytes() and given != raw
    told = json.loads(raw.with_suffix(".json").read_text())
    assert told["control_from"] == str(data / "a.mp4") and told["control_kind"] == "canny"
    assert told["control_detector"] == kind_named("canny").open(None, Settings()).digest
    assert told["control"].startswith(str(tmp_path / "run/drawn/a-"))
    assert "control_from" not in json.loads(given.with_suffix(".json").read_text())


def test_a_run_opens_its_detector_once(data, tmp_path, monkeypatch):
    """Which draws the controls of prompts and measures previews."""
    opened = []
    monkeypatch.setattr(canny, "open_canny", lambda settings: opened.append(settings) or open_canny(settings))
    asked = recipe(tmp_path, data, **drawn_from(data, "a.mp4"))
    listed = Data(train_data_dir=str(data), train_data_meta=str(data / "metadata_control.json"))
    asked = replace(asked, data=listed, training=replace(asked.training, max_train_steps=1))
    assert train(asked) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(opened) == 1 and [row["step"] for row in rows if row["kind"] == "obedience"] == [0, 1]


def test_clips_that_no_control_can_be_drawn_from_are_all_named(data, tmp_path):
    (data / "c.mp4").write_bytes((data / "a.mp4").read_bytes()[:900])
    clips = (str(data / "c.mp4"), str(data / "gone.mp4"), str(data / "a.mp4"))
    asked = recipe(tmp_path, data, validation_control_from=clips, control_kind="canny")
    asked = replace(asked, validation=replace(asked.validation, validation_prompts=("a", "b", "c")))
    with pytest.raises(UserError) as error:
        sample_clips(asked)
    assert len(error.value.problems) == 2 and "gone.mp4" in str(error.value) and "give another clip" in str(error.value)
    other = replace(asked, model=replace(asked.model, train_mode="normal"))
    with pytest.raises(UserError, match="takes no such control"):
        sample_clips(other)


@pytest.mark.slow
def test_key_points_of_a_raw_clip(data, tmp_path, caplog):
    """They are the file of `reeltune control`, drawn at the size sampled; that the clip is a poor one is said."""
    pytest.importorskip("onnxruntime")
    nets = tmp_path / "nets"
    nets.mkdir()
    tiny_onnx.write_people_net(nets / PEOPLE_FILE)
    tiny_onnx.write_pose_net(nets / POSE_FILE)
    noise = np.random.RandomState(0).randint(0, 256, (5, 9, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    write_clip(data / "a.mp4", noise, 12)
    words = ["--kind", "pose", "--detector", str(nets), "--least_score", "0", "--out", str(data / "metadata_pose.json")]
    assert main(["control", str(data / "metadata.json"), *words]) == 0
    named = data / "control/pose/a.mp4.npz"
    raw = recipe(
        tmp_path,
        data,
        validation_control_from=(str(data / "a.mp4"),),
        control_kind="pose",
        control_detector=str(nets),
    )
    given = recipe(tmp_path, data, validation_paths=(str(named),))
    requests = [request_of(one) for one in (given, raw)]
    assert "its control of kind pose scores" in caplog.text
    assert Path(requests[1].control).read_bytes() == named.read_bytes()
    controls = [request.batch().control_BFCHW for request in requests]
    assert torch.equal(*controls) and controls[0].shape == (1, 5, 3, 64, 64) and controls[0].any()
