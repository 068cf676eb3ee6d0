"""Runs whose previews are held against their control."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from reeltune.cache.fill import fill
from reeltune.cli import main
from reeltune.config.recipe import Validation
from reeltune.control.judge import Asked, judge_by
from reeltune.control.kinds import open_for_previews
from reeltune.control.records import Made
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.families.toy.family import FAMILY
from reeltune.sampling.obedience import obedience_of
from reeltune.sampling.prompts import Request
from reeltune.sampling.sample import Setup
from reeltune.training.loop import train
from tests.runs.same_run import StopAfter, assert_same_end
from tests.runs.small_run import recipe, write_array

SETTINGS = {
    "control_kind": "canny",
    "preview_count": 2,
    "preview_steps": 2,
    "guidance_scale": 1.0,
    "validation_steps": 2,
    "max_train_steps": 4,
    "held_out_share": 0.3,
    "learning_rate": 0.02,
    "lr_warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def arrays(monkeypatch):
    """Previews and controls are written as arrays, without loss."""
    for module in ("sample", "validate"):
        monkeypatch.setattr(f"reeltune.sampling.{module}.write_pixels", write_array)


def obeyed(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "obedience"]


def read(path) -> np.ndarray:
    return np.load(path).transpose(0, 2, 3, 1)


def test_a_run_tells_how_far_its_previews_obey(toy, data, tmp_path, reports):
    with reports():
        assert train(recipe(toy, data, tmp_path / "run", **SETTINGS)) == 0
    rows = obeyed(tmp_path / "run")
    assert [(row["step"], row["start_step"], row["n"]) for row in rows] == [(0, 0, 2), (2, 0, 2), (4, 0, 2)]
    judge, folder = judge_by("canny", open_for_previews("canny", None, "cpu")), tmp_path / "run/previews"
    for row in rows:
        for i, preview in enumerate(row["previews"]):
            control = read(folder / f"control/{i}.mp4")
            asked = Asked(Draw(0, Shape(*control.shape[:3]), Crop(*control.shape[1:3], 0, 0), (), 0, 0), None, control)
            for name, part in (("score", f"step-{row['step']}"), ("truth", "truth")):
                scores = judge.scores(asked, read(folder / part / f"{i}.mp4"), 8.0)
                assert preview[name] == scores["f1"]
    assert rows[2]["score"] != rows[0]["score"] == rows[2]["score_start"]
    assert rows[2]["truth"] > 0.5
    page = (tmp_path / "run/report.html").read_text()
    assert "follows its control" in page and f"real clips: {rows[2]['truth']:.2f}" in page


def test_a_resumed_run_obeys_as_an_unbroken_one(toy, data, tmp_path):
    unbroken, broken = (recipe(toy, data, tmp_path / name, **SETTINGS) for name in ("unbroken", "broken"))
    assert train(unbroken) == 0
    with StopAfter(3):
        assert train(broken) == 128 + signal.SIGTERM
    resumed = recipe(toy, data, tmp_path / "broken", resume_from_checkpoint="latest", **SETTINGS)
    assert train(resumed) == 0
    assert_same_end(tmp_path / "unbroken", tmp_path / "broken", step=4)
    assert len(obeyed(tmp_path / "broken")) == 3


def test_a_cached_run_obeys_as_a_live_one(toy, data, tmp_path):
    settings = SETTINGS | {"max_train_steps": 2, "cache_variants": 1}
    live = recipe(toy, data, tmp_path / "live", **settings)
    cached = recipe(toy, data, tmp_path / "cached", cache_folder=str(tmp_path / "cache"), **settings)
    assert fill(cached) == train(cached) == train(live) == 0
    assert obeyed(tmp_path / "live") == obeyed(tmp_path / "cached") != []


def test_without_a_kind_nothing_is_measured(toy, data, tmp_path):
    assert train(recipe(toy, data, tmp_path / "run", **SETTINGS | {"control_kind": None, "max_train_steps": 1})) == 0
    assert not obeyed(tmp_path / "run") and not (tmp_path / "run/validation/start_obedience.json").exists()


def test_a_kind_that_the_mode_takes_no_control_of_is_refused(toy, data, tmp_path):
    with pytest.raises(
        UserError, match="control_kind is camera and train_mode is control, which takes no such control"
    ):
        train(recipe(toy, data, tmp_path / "run", **SETTINGS | {"control_kind": "camera"}))


@pytest.mark.slow
def test_controls_of_reeltune_control_are_known_by_kind(toy, data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("control", "index"))
    out = str(folder / "metadata_control.json")
    (folder / "metadata_control.json").unlink()
    assert main(["control", str(folder / "metadata.json"), "--kind", "canny", "--least_score", "0", "--out", out]) == 0
    settings = SETTINGS | {"control_kind": None, "max_train_steps": 1}
    assert train(recipe(toy, folder, tmp_path / "run", **settings)) == 0
    assert {(row["control_kind"], row["start_step"]) for row in obeyed(tmp_path / "run")} == {("canny", 0)}


@pytest.mark.parametrize(
    ("kinds", "detector", "measured", "said"),
    [
        (["canny", "canny"], None, "canny", ""),
        (["canny", "depth"], None, None, ""),
        ([None, None], None, None, ""),
        (["depth", None], None, None, "made the controls as depth.*give it as control_detector"),
    ],
)
def test_which_kind_is_measured(kinds, detector, measured, said, tmp_path, monkeypatch):
    made = {f"{i}.mp4": None if kind is None else Made("", kind, "", "", "") for i, kind in enumerate(kinds)}
    monkeypatch.setattr("reeltune.sampling.obedience.made_by", made.get)
    records = [Record(i, "a", "", "video", 9, 8.0, 64, 64, control_path=f"{i}.mp4") for i in range(len(kinds))]
    requests = [Request("", dict, 0, 8.0, record=record) for record in records]
    setup = Setup(FAMILY, "control", FAMILY.load("toy"), FAMILY.objective)
    found, notices = obedience_of(Validation(control_detector=detector), setup, requests, tmp_path)
    assert (found and found.judge.kind) == measured
    assert re.search(said, "".join(notices)) and bool(notices) == bool(said)
    assert obedience_of(Validation(control_kind="canny"), setup, [], tmp_path) == (None, [])  # no previews
