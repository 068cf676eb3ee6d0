"""Every tensor of every Wan golden file, within the bounds of benchmarks/parity.py."""

import pytest

from benchmarks import parity
from benchmarks.parity import FILES, Checkpoints, Golden, Row, golden_files, main, measure, table

pytestmark = pytest.mark.golden("wan_fun/golden/**/*.safetensors")


@pytest.fixture(scope="module")
def checkpoints(goldens):
    return Checkpoints(goldens / "wan_fun")


def test_within_bounds(file, checkpoints):
    rows = measure(file, checkpoints)
    assert rows
    above = [f"{row.tensor}: {row.absolute:.2e} absolute, {row.relative:.2e} relative" for row in rows if not row.ok]
    assert not above


def test_every_computed_tensor_is_compared(goldens, checkpoints):
    """What a file holds beside inputs is compared: nothing new slips by."""
    inputs = {
        "transformer": {"x", "y", "t", "probe", "text", "text_lens", "clip_fea", "full_ref", "y_camera"},
        "train_step": {"pixel_u8", "control_pixel_u8", "control_camera_values", "mask", "noise", "indices", "clip_idx"}
        | {"t2v_flag"},
        "vae": {"pixels_u8", "eps", "z"},
        "text_encoder": set(),
        "clip": {"image_u8"},
        "camera": {"frame_index", "batch_index", "rows", "video_length", "in", "plucker_as_reference"},
        "scheduler": set(),
    }
    for path in golden_files(goldens):
        kind = path.stem if path.name in FILES else path.parent.name
        compared = {row.tensor for row in measure(path, checkpoints)}
        for name in Golden(path).tensors:
            words = set(name.split("."))
            assert name in compared or words & inputs[kind] or name.startswith("eps_"), f"{path.name}: {name}"


def test_an_error_above_its_bound_fails_the_command(goldens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "golden_files", lambda folder: [folder / "wan_fun/golden/scheduler.safetensors"])
    monkeypatch.setattr(parity, "OTHERS", ())
    arguments = ["--goldens", str(goldens), "--write", str(tmp_path / "p.md")]
    assert main(arguments) == 0
    assert "scheduler.safetensors" in (tmp_path / "p.md").read_text()
    monkeypatch.setattr(parity, "SCHEDULE", -1.0)
    assert main(arguments) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_table_shows_the_worst_of_a_tensor():
    rows = [Row("f", "A.out", 1e-6, 1e-6, 5e-5, "absolute"), Row("f", "B.out", 1e-4, 1e-3, 5e-5, "absolute")]
    assert "| f | out | 1.0e-04 | 1.0e-03 | 5e-05 absolute | ABOVE |" in table(rows)
    assert "1.0e-06" not in table(rows)
