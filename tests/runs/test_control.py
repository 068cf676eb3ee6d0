"""From raw clips to a trained checkpoint: controls are made, checked and trained on as they stand."""

import json
import re

import numpy as np
from PIL import Image

from reeltune.cli import main
from reeltune.data.media import write_clip
from tests.families.tiny_wan import tiny_checkpoint
from tests.unit.test_control_canny import scene


def test_a_list_with_controls_is_checked_and_trained_on(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    rows = []
    for n in range(3):
        write_clip(data / f"train/{n}.mp4", np.roll(scene(9), 9 * n, axis=2), 8)
        rows.append({"file_path": f"train/{n}.mp4", "text": f"discs {n}", "type": "video"})
    Image.fromarray(scene(1)[0]).save(data / "train/still.jpg")
    rows.append({"file_path": "train/still.jpg", "text": "discs", "type": "image"})
    (data / "metadata.json").write_text(json.dumps(rows))
    made = data / "metadata_control.json"
    assert main(["control", str(data / "metadata.json"), "--kind", "canny", "--out", str(made)]) == 0

    model = tiny_checkpoint(tmp_path / "model", "control_v1.1")
    settings = {
        "pretrained_model_name_or_path": model, "train_data_dir": data, "train_data_meta": made,
        "output_dir": tmp_path / "run", "train_mode": "control", "video_sample_n_frames": 5, "video_sample_stride": 1,
        "video_sample_size": 32, "image_sample_size": 32, "token_sample_size": 32, "max_train_steps": 2,
        "mixed_precision": "no", "dataloader_num_workers": 0, "held_out_share": 0, "report_to": "none",
    }  # fmt: skip
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
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
