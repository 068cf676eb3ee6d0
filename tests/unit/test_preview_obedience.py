"""Previews' scores beside those of the starting weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from reeltune.control.judge import Judge, Measure
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Crop, Draw, Shape
from reeltune.data.findings import content_of
from reeltune.sampling.obedience import Obedience
from reeltune.sampling.paired import band95
from reeltune.sampling.prompts import Request

SHAPE = Shape(2, 16, 16)


def brightness(asked, found):
    """The clip's, unless its control is black; the control's own brightness beside it."""
    if not asked.control_FHWC.any():
        return None
    return {"brightness": np.concatenate(found).mean() / 255, "asked": asked.control_FHWC.mean() / 255}


MEASURE = Measure("brightness", "", True, brightness)
JUDGE = Judge("canny", "digest 1", MEASURE, lambda source, put: [put(chunk) for chunk in source.chunks()])


def clip(value: int) -> torch.Tensor:
    return torch.full((1, 2, 3, 16, 16), value, dtype=torch.uint8)


def batch(control: int, real: int = 255) -> Batch:
    draw = Draw(0, SHAPE, Crop(16, 16, 0, 0), (0, 1), 0, 0)
    return Batch([draw], ["a"], clip(real), torch.zeros(1, dtype=torch.int64), {}, clip(control))


def requests(count=3, entry=None):
    return [
        Request(f"prompt {i}", lambda: batch(51), seed=i, fps=8.0, control=f"{i}.mp4", entry=entry)
        for i in range(count)
    ]


def obedience(tmp_path, count=3, *, entry=None, **more) -> Obedience:
    settings = {"preview_steps": 4, "guidance_scale": 6.0, "negative_prompt": ""}
    return replace(Obedience(JUDGE, requests(count, entry), settings, tmp_path), **more)


def measured(judged, step, values, controls=None):
    controls = controls or [51] * len(values)
    return judged.row(
        step,
        [
            judged.scores(i, batch(control), clip(value))
            for i, (value, control) in enumerate(zip(values, controls, strict=True))
        ],
    )


def test_scores_are_paired_with_the_starts(tmp_path):
    judged = obedience(tmp_path)
    first = measured(judged, 0, [51, 102, 0])
    assert first["score"] == first["score_start"] == pytest.approx(0.2) and first["band95"] == [0, 0]
    later = measured(judged, 9, [102, 102, 51])
    assert (later["step"], later["start_step"], later["n"], later["control_kind"]) == (9, 0, 3, "canny")
    assert (later["score"], later["score_start"]) == (pytest.approx(1 / 3), pytest.approx(0.2))
    changes = np.array([0.2, 0, 0.2])
    assert later["difference"] == pytest.approx(changes.mean()) and later["band95"] == pytest.approx(band95(changes))
    assert later["previews"][0].pop("truth") is None  # of prompts there are no real clips
    numbers = {"score": 0.4, "score_start": 0.2, "brightness": 0.4, "asked": 0.2}
    assert later["previews"][0] == pytest.approx(numbers)
    assert later["truth"] is None
    json.dumps(later)


def test_held_out_clips_are_measured_themselves(tmp_path):
    asked = []

    def compare(asked_for, found):
        asked.append(np.concatenate(found).mean())
        return brightness(asked_for, found)

    judge = replace(JUDGE, measure=MEASURE._replace(compare=compare))
    judged = obedience(tmp_path, 2, entry=5, judge=judge)
    assert measured(judged, 0, [51, 51])["truth"] == 1.0
    assert measured(judged, 4, [51, 51])["previews"][1]["truth"] == 1.0
    assert sorted(asked) == [51] * 4 + [255] * 2  # the real clips once


def test_previews_of_which_nothing_can_be_said_are_left_out_of_both_means(tmp_path):
    judged = obedience(tmp_path)
    measured(judged, 0, [51, 102, 51], controls=[51, 0, 51])
    later = measured(judged, 2, [102, 255, 102])
    assert later["n"] == 2 and later["score"] == pytest.approx(0.4) and later["score_start"] == pytest.approx(0.2)
    assert later["previews"][1]["score"] == 1.0 and later["previews"][1]["score_start"] is None
    assert measured(judged, 3, [1, 1, 1], controls=[0, 0, 0]) is None
    assert (
        "see that control_kind is what the controls are, and that previews are large and long enough"
        in JUDGE.unmeasured
    )


def test_a_resumed_run_pairs_with_the_same_start(tmp_path):
    measured(obedience(tmp_path), 0, [51, 102, 0])
    moved = [replace(one, control=f"/elsewhere/{one.control}") for one in requests()]
    again = measured(obedience(tmp_path, requests=moved), 7, [102, 102, 102])
    assert again["start_step"] == 0 and again["score_start"] == pytest.approx(0.2)
    anew = measured(obedience(tmp_path), 0, [102, 102, 102])  # a run that starts anew in the same folder
    assert anew["score_start"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {"preview_steps": 5, "guidance_scale": 6.0, "negative_prompt": ""}},
        {"judge": replace(JUDGE, detector="digest 2")},
        {"requests": list(reversed(requests()))},
    ],
)
def test_previews_made_or_measured_in_another_way_start_anew(changed, tmp_path):
    measured(obedience(tmp_path), 0, [51, 51, 51])
    assert obedience(tmp_path).kept() and not obedience(tmp_path, **changed).kept()
    row = measured(obedience(tmp_path, **changed), 6, [102, 102, 102])
    assert (row["start_step"], row["difference"]) == (6, 0.0)
    assert measured(obedience(tmp_path, **changed), 8, [204, 204, 204])["start_step"] == 6


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 0}', '{"step": 0, "control_kind": 3}', '{"step": -1}'])
def test_a_damaged_start_is_named(text, tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation/start_obedience.json").write_text(text)
    with pytest.raises(UserError, match=r"start_obedience\.json"):
        measured(obedience(tmp_path), 5, [1, 2, 3])


def test_a_start_of_which_nothing_is_known_is_none(tmp_path):
    """As of a run that was begun when such controls were not measured."""
    assert measured(obedience(tmp_path), 0, [1, 1, 1], controls=[0, 0, 0]) is None
    row = measured(obedience(tmp_path), 6, [102, 102, 102])
    assert (row["start_step"], row["n"]) == (6, 3)


def test_files_are_read_again_where_they_changed(tmp_path, monkeypatch):
    control, read = tmp_path / "control.mp4", []
    monkeypatch.setattr("reeltune.sampling.obedience.content_of", lambda path: read.append(path) or content_of(path))
    judged = obedience(tmp_path, requests=[replace(requests(1)[0], control=str(control))])
    control.write_bytes(b"first")
    for step in (0, 2, 4):
        assert measured(judged, step, [51])["start_step"] == 0
    assert read == [str(control)]
    control.write_bytes(b"other one")
    assert measured(judged, 6, [51])["start_step"] == 6 and len(read) == 2


def test_a_control_that_was_replaced_under_its_name_begins_anew(tmp_path):
    control = tmp_path / "control.mp4"
    one = [replace(requests(1)[0], control=str(control))]
    control.write_bytes(b"first")
    measured(obedience(tmp_path, requests=one), 0, [51])
    assert measured(obedience(tmp_path, requests=one), 5, [102])["start_step"] == 0
    control.write_bytes(b"other")
    assert measured(obedience(tmp_path, requests=one), 9, [102])["start_step"] == 9
