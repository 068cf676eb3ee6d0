"""Controls that are key points: the run is the one of clips drawn without loss at the size that is trained."""

import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reeltune.cache import fill
from reeltune.core.types import Crop, Shape
from reeltune.data import keypoints, pose_drawing
from reeltune.data.keypoints import read_keypoints, write_keypoints
from reeltune.data.media import read_frames
from reeltune.families.spec import Parts
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import STEPS, cached, entries_written
from tests.runs.same_run import assert_same_end
from tests.runs.test_cache import never
from tests.unit.people import walk


def write_lossless(path: Path, frames_FHWC: np.ndarray, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "bgr0"
        for rgb_HWC in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb_HWC, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def posed(data, tmp_path_factory) -> Path:
    """The data set with key points for controls."""
    folder = tmp_path_factory.mktemp("posed") / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("index"))
    rows = json.loads((folder / "metadata_control.json").read_text())
    for number, row in enumerate(rows):
        frames = 12 if row["type"] == "video" else 1
        row["control_file_path"] = f"pose/{number}.npz"
        write_keypoints(folder / row["control_file_path"], walk(frames, 48, 64, count=1 + number % 2))
    (folder / "metadata_control.json").write_text(json.dumps(rows))
    return folder


def draws(recipe):
    family, mode, *_ = choose_family(recipe)
    inputs = gather(recipe, family, mode, show_progress=False)
    return inputs, [draw for micro in inputs.plan(0) for draw in micro]


@pytest.fixture
def drawn(posed, run) -> Path:
    """A list of the same with each control drawn as a lossless clip, or picture, of the size to which it is resized."""
    folder = posed
    (folder / "drawn").mkdir()
    inputs, made = draws(run("sizes", data=posed, held_out_share=0.0))
    crop_of = {inputs.train[draw.record].entry: draw.crop for draw in made}
    rows = json.loads((folder / "metadata_control.json").read_text())
    for entry, row in enumerate(rows):
        points, crop = read_keypoints(folder / row["control_file_path"]), crop_of[entry]
        whole, shape = Crop(crop.height, crop.width, 0, 0), Shape(points.frames, crop.height, crop.width)
        frames_FHWC = read_frames(folder / row["control_file_path"], range(points.frames), whole, shape)
        frames_FHWC = np.ascontiguousarray(frames_FHWC.transpose(0, 2, 3, 1))
        row["control_file_path"] = f"drawn/{entry}.{'mkv' if points.frames > 1 else 'png'}"
        if points.frames > 1:
            write_lossless(folder / row["control_file_path"], frames_FHWC, 8)
        else:
            Image.fromarray(frames_FHWC[0]).save(folder / row["control_file_path"])
    (folder / "metadata_drawn.json").write_text(json.dumps(rows))
    return folder / "metadata_drawn.json"


def test_batches_and_weights_are_those_of_clips_drawn_at_the_trained_size(posed, drawn, run, tmp_path):
    given = {"data": posed, "held_out_share": 0.0}
    both = [run("points", **given), run("clips", train_data_meta=str(drawn), **given)]
    (inputs, made), (inputs_of_clips, _) = map(draws, both)
    readers = inputs.reader, inputs_of_clips.reader
    assert {draw.shape[0] for draw in made} == {1, 5}
    for draw in made:
        ours, theirs = (reader.open(draw).control_FCHW for reader in readers)
        assert ours.numpy().any() and np.array_equal(ours, theirs)
    assert [train(recipe) for recipe in both] == [0, 0]
    assert_same_end(tmp_path / "points", tmp_path / "clips", STEPS)


@pytest.mark.slow
def test_a_run_from_the_cache_is_the_live_run(posed, run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    assert train(run("live", model, data=posed)) == 0
    from_cache = cached(run("cached", model, data=posed), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    monkeypatch.setattr(Parts, "_read", never)
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)


def test_a_cache_knows_key_points_by_their_bytes_and_by_how_they_are_drawn(posed, run, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "data"
    shutil.copytree(posed, folder)
    given = cached(run("run", data=folder), tmp_path / "cache")
    assert fill.fill(given) == 0 and fill.fill(given) == 0
    first, second = entries_written(capfd)
    assert first > 8 and second == 0
    path = folder / "pose/0.npz"
    status, moved = path.stat(), walk(12, 48, 64)
    moved.points[0, 5] += 0.01
    write_keypoints(path, moved)
    replaced = path.stat()
    assert replaced.st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    keypoints._remembered_digest.cache_clear()  # it is told apart by time alone
    assert fill.fill(given) == 0
    told = capfd.readouterr().err
    assert "pose/0.npz" in told and "left out" in told and "touch" in told  # what was measured is not what is there
    os.utime(path, ns=(replaced.st_atime_ns, replaced.st_mtime_ns))
    assert fill.fill(given) == 0
    (changed,) = entries_written(capfd)
    assert 0 < changed < first / 2
    monkeypatch.setattr(pose_drawing, "DRAWING_VERSION", pose_drawing.DRAWING_VERSION + 1)
    assert fill.fill(given) == 0
    (redrawn,) = entries_written(capfd)
    assert redrawn > changed * 3
