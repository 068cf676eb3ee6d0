"""From raw clips to a trained checkpoint: controls are made, checked and trained on as they stand."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from reeltune.cli import main
from reeltune.control import released_net
from reeltune.control.hed_net import Hed
from reeltune.control.mlsd_net import Mlsd
from reeltune.control.source import source_of
from reeltune.data.media import write_clip
from tests.families.tiny_wan import tiny_checkpoint
from tests.unit.released_nets import save
from tests.unit.test_control_canny import scene


def clips(folder: Path, count: int) -> Path:
    """A data set's folder, with clips and a list of them."""
    (folder / "train").mkdir(parents=True)
    rows = []
    for n in range(count):
        write_clip(folder / f"train/{n}.mp4", np.roll(scene(9), 9 * n, axis=2), 8)
        rows.append({"file_path": f"train/{n}.mp4", "text": f"discs {n}", "type": "video"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def flags_for(data: Path, model: Path, meta: Path, out: Path) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": model, "train_data_dir": data, "train_data_meta": meta,
        "output_dir": out, "train_mode": "control", "video_sample_n_frames": 5, "video_sample_stride": 1,
        "video_sample_size": 32, "image_sample_size": 32, "token_sample_size": 32, "max_train_steps": 2,
        "mixed_precision": "no", "dataloader_num_workers": 0, "held_out_share": 0, "report_to": "none",
    }  # fmt: skip
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "wan", "control_v1.1")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "net"), [("hed", Hed), ("mlsd", Mlsd)])
def test_lists_of_released_networks_are_trained_on(kind, net, model, tmp_path, monkeypatch):
    """By random weights in the released form. What the run sees as control is what was drawn."""
    monkeypatch.setattr(released_net, "SIDE_PX", 64)
    data, file = clips(tmp_path / "data", 2), save(net, tmp_path / "net.pth")
    made = data / "new.json"
    words = ["--kind", kind, "--detector", str(file), "--least_score", "0", "--out", str(made)]
    assert main(["control", str(data / "metadata.json"), *words]) == 0
    assert [row["control_file_path"] for row in json.loads(made.read_text())] == [
        f"control/{kind}/train/{n}.mp4" for n in range(2)
    ]
    seen = []
    monkeypatch.setattr("reeltune.training.duties.write_first_batch", lambda batch, *_, **__: seen.append(batch))
    run = tmp_path / "run"
    assert main(["train", *flags_for(data, model, made, run)]) == 0
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["used"] == ledger["entries"] == 2
    (draw, *_), control_FCHW = seen[0].draws, seen[0].control_BFCHW[0]
    drawn = list(source_of(data / f"control/{kind}/train/{draw.record}.mp4", "video").frames())
    crop, (_, H, W) = draw.crop, draw.shape
    for at, seen_CHW in zip(draw.frames, control_FCHW.numpy(), strict=True):
        resized_HW3 = cv2.resize(drawn[at], (crop.width, crop.height), interpolation=cv2.INTER_AREA)
        expected_HW3 = resized_HW3[crop.top :, crop.left :][:H, :W]
        assert np.corrcoef(seen_CHW.transpose(1, 2, 0).ravel(), expected_HW3.ravel())[0, 1] > 0.95


def test_a_list_with_controls_is_checked_and_trained_on(model, tmp_path, capsys):
    data = clips(tmp_path / "data", 3)
    rows = json.loads((data / "metadata.json").read_text())
    Image.fromarray(scene(1)[0]).save(data / "train/still.jpg")
    rows.append({"file_path": "train/still.jpg", "text": "discs", "type": "image"})
    (data / "metadata.json").write_text(json.dumps(rows))
    made = data / "metadata_control.json"
    assert main(["control", str(data / "metadata.json"), "--kind", "canny", "--out", str(made)]) == 0

    flags = flags_for(data, model, made, tmp_path / "run")
    capsys.readouterr()
    assert main(["check", *flags]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\b4\b", told) and "cannot be used" not in told and "another clip" not in told
    assert main(["train", *flags]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row][-1] == 2
    assert (tmp_path / "run/checkpoint-2/transformer").is_dir()

    write_clip(data / "train/0.mp4", scene(9)[::-1], 8)  # of as many frames: nothing else would tell
    listed = json.loads(made.read_text())
    listed[1]["control_file_path"] = listed[2]["control_file_path"]
    made.write_text(json.dumps(listed))
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "again")
    assert main(["check", *flags]) == 0
    assert "2 entries (0, 1): the control was made of another clip" in capsys.readouterr().out
    assert main(["control", str(data / "metadata.json"), "--kind", "canny", "--out", str(made)]) == 0
    assert main(["check", *flags]) == 0 and "another clip" not in capsys.readouterr().out
