"""Every tensor of every Wan golden file, within the bounds of benchmarks/parity_wan.py."""

import pytest

from benchmarks import parity, parity_wan
from benchmarks.golden import Row
from benchmarks.parity import main, table
from benchmarks.parity_wan import golden_files, kind_of, measure  # noqa: F401 - the files are asked of this module
from tests.families.parity import assert_parity

pytestmark = pytest.mark.golden("wan_fun/golden/**/*.safetensors")

INPUTS = {  # what is read and not computed
    "transformer": {"x", "y", "t", "probe", "text", "text_lens", "clip_fea", "full_ref", "y_camera"},
    "train_step": {
        *("pixel_u8", "control_pixel_u8", "control_camera_values", "mask", "noise", "indices", "clip_idx", "t2v_flag"),
        *("eps_latents", "eps_control", "eps_ref", "eps_mask_latents"),
    },
    "vae": {"pixels_u8", "eps", "z"},
    "text_encoder": set(),
    "clip": {"image_u8"},
    "camera": {"frame_index", "batch_index", "rows", "video_length", "in", "plucker_as_reference"},
    "scheduler": set(),
}


def test_within_bounds(file):
    assert_parity(file, measure(file), INPUTS[kind_of(file)])


def test_an_error_above_its_bound_fails_the_command(goldens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity_wan, "golden_files", lambda folder: [folder / "wan_fun/golden/scheduler.safetensors"])
    monkeypatch.setattr(parity, "FAMILIES", (parity_wan,))
    arguments = ["--goldens", str(goldens), "--write", str(tmp_path / "p.md")]
    assert main(arguments) == 0
    assert "scheduler.safetensors" in (tmp_path / "p.md").read_text()
    monkeypatch.setattr(parity_wan, "SCHEDULE", -1.0)
    assert main(arguments) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_table_shows_the_worst_of_a_tensor():
    rows = [Row("f", "A.out", 1e-6, 1e-6, 5e-5, "absolute"), Row("f", "B.out", 1e-4, 1e-3, 5e-5, "absolute")]
    assert "| f | out | 1.0e-04 | 1.0e-03 | 5e-05 absolute | ABOVE |" in table(rows)
    assert "1.0e-06" not in table(rows)
