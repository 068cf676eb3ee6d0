"""Runs whose previews are held against their control."""

import json
import signal

import numpy as np
import pytest

from reeltune.control.judge import Asked, judge_of
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Shape
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
    judge, folder = judge_of("canny", None), tmp_path / "run/previews"
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


def test_without_a_kind_nothing_is_measured(toy, data, tmp_path):
    assert train(recipe(toy, data, tmp_path / "run", **SETTINGS | {"control_kind": None, "max_train_steps": 1})) == 0
    assert not obeyed(tmp_path / "run") and not (tmp_path / "run/validation/start_obedience.json").exists()


def test_a_kind_that_the_mode_takes_no_control_of_is_refused(toy, data, tmp_path):
    with pytest.raises(UserError, match="control_kind is camera and train_mode is control, which takes no such control"):
        train(recipe(toy, data, tmp_path / "run", **SETTINGS | {"control_kind": "camera"}))
