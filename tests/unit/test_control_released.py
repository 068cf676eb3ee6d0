"""HED and M-LSD by random weights in the released formats: the released tools' own maps, lines that stay, refusals.

released_maps.npz holds what controlnet-aux 0.0.10 made of `released_nets.picture` with those weights, shown to its
networks at 64 x 128, and the names and shapes of its networks' state dicts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reeltune.cli import main
from reeltune.control import mlsd, released_net
from reeltune.control.hed import edges_of, open_hed, score_of
from reeltune.control.hed_net import Hed
from reeltune.control.judge import Asked, judge_by
from reeltune.control.kind import Settings, Source, pictures
from reeltune.control.kinds import kind_named, open_for_previews
from reeltune.control.mlsd import STRONG, WEAK, lines_of, open_mlsd
from reeltune.control.mlsd_net import Mlsd
from reeltune.control.released_net import open_net, shown, shown_size
from reeltune.control.source import source_of
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Shape
from tests.unit.released_nets import picture, save
from tests.unit.test_media import encode

RECORDED = np.load(Path(__file__).with_name("released_maps.npz"))
NETS = {"hed": (Hed, "ControlNetHED.pth"), "mlsd": (Mlsd, "mlsd_large_512_fp32.pth")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    for make, name in NETS.values():
        save(make, folder / name)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Networks are shown small pictures, as the recorded ones were."""
    monkeypatch.setattr(released_net, "SIDE_PX", 64)


@pytest.mark.parametrize("kind", NETS)
def test_networks_have_the_released_names_and_shapes(kind):
    with torch.device("meta"):
        state = NETS[kind][0]().state_dict()
    assert [f"{name} {list(tensor.shape)}" for name, tensor in state.items()] == RECORDED[f"{kind}_names"].tolist()


def test_edges_are_the_released_tools(folder):
    net, _ = open_net(Hed, folder, ["ControlNetHED.pth"], "cpu")
    found, expected = edges_of(net, picture(), "cpu"), RECORDED["edges"]
    assert expected.std() > 20  # it is no grey alone
    assert np.abs(found.astype(np.uint8).astype(int) - expected).max() <= 1
    assert np.abs(found - expected - 0.5).max() < 0.501  # which it cut off


def test_lines_are_the_released_tools(folder):
    net, _ = open_net(Mlsd, folder, ["mlsd_large_512_fp32.pth"], "cpu")
    lines, scores = lines_of(net, picture(), "cpu")
    lines = lines[scores > STRONG]
    assert lines.shape == RECORDED["lines"].shape and len(lines) > 20
    np.testing.assert_allclose(lines, RECORDED["lines"], atol=0.01)
    expected = np.unpackbits(RECORDED["drawn"]).reshape(64, 128) * 255
    assert (mlsd.drawn(lines, 64, 128) != expected).mean() < 0.002


@pytest.mark.parametrize(("kind", "found"), [("hed", edges_of), ("mlsd", lambda *given: lines_of(*given)[0])])
def test_bits_do_not_depend_on_the_cores_of_a_machine(kind, found, folder):
    make, name = NETS[kind]
    net, _ = open_net(make, folder / name, [], "cpu")
    before, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(found(net, picture(128, 256), "cpu"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*made)


def test_the_size_that_networks_are_shown():
    sizes = {(480, 832): (512, 896), (1080, 1920): (512, 896), (300, 200): (768, 512), (512, 512): (512, 512)}
    assert {size: shown_size(*size) for size in sizes} == sizes  # of controlnet-aux's resize_image
    assert shown_size(100, 4000) == (64, 2048)
    for size in ((512, 896), (64, 128)):
        assert shown(picture(), size).shape == (*size, 3)


@pytest.mark.parametrize(("kind", "open_kind"), [("hed", open_hed), ("mlsd", open_mlsd)])
def test_controls_are_drawn_at_the_clips_size(kind, open_kind, folder, small):
    detector = open_kind(folder, Settings())
    clip = np.stack([picture(80, 112)] * 2 + [255 - picture(80, 112)])[:, :79, :111]
    drawn = pictures(detector, Source.of(clip, 8))
    assert drawn.shape == clip.shape and drawn.dtype == np.uint8 and drawn.std() > 10
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    quality = detector.detect(Source.of(clip[:2], 8), lambda chunk: None)
    assert quality.facts["steady_share"] == 1 and 0 <= quality.score <= 1
    assert 0 < kind_named(kind).least_score < 1


def test_the_score_of_soft_edges():
    """Half of what is enough, enough, more, and nearly all."""
    assert [score_of(np.array([share])) for share in (0, 0.0025, 0.005, 0.1, 0.9)] == [0, 0.5, 1, 1, 0]
    assert score_of(np.array([0.1, 0])) == 0.5


def test_a_control_of_the_shown_size_is_the_networks(folder, small):
    drawn = pictures(open_hed(folder, Settings()), Source.of(picture()[None], 8))
    assert np.abs(drawn[0, ..., 0].astype(int) - RECORDED["edges"]).max() <= 1


def test_lines_stay_once_they_are_there(folder, small, monkeypatch):
    """A strong one stays when it is weak and goes when it is weaker; a weak one does not come."""
    one, other = np.array([10.0, 10, 50, 40]), np.array([100.0, 5, 100, 60])
    told = iter(
        [
            (np.stack([one, other]), np.array([STRONG + 0.01, WEAK + 0.01])),
            (np.stack([one[[2, 3, 0, 1]] + 1, other]), np.array([WEAK + 0.02, WEAK + 0.01])),  # from its other end
            (np.stack([one + 30, other]), np.array([WEAK + 0.02, WEAK + 0.01])),
        ]
    )
    monkeypatch.setattr(mlsd, "lines_of", lambda *given: next(told))
    put = []
    quality = open_mlsd(folder, Settings()).detect(Source.of(np.stack([picture()] * 3), 8), put.append)
    expected = [mlsd.drawn(lines, 64, 128) for lines in (one[None], one[None] + 1, np.empty((0, 4)))]
    np.testing.assert_array_equal(np.concatenate(put)[..., 0], expected)
    assert quality.facts["lines"] == pytest.approx(2 / 3) and quality.facts["steady_share"] == 1
    assert quality.score == pytest.approx(2 / 3 * np.hypot(40, 30) / np.hypot(64, 128))


@pytest.mark.parametrize(("kind", "open_kind"), [("hed", open_hed), ("mlsd", open_mlsd)])
def test_weights_are_read_from_file_folder_and_safetensors(kind, open_kind, folder, tmp_path):
    name = NETS[kind][1]
    by_folder, by_file = open_kind(folder, Settings()), open_kind(folder / name, Settings())
    assert by_folder.digest == by_file.digest
    state = torch.load(folder / name, weights_only=True)
    save_file(state, tmp_path / Path(name).with_suffix(".safetensors").name)
    assert open_kind(tmp_path, Settings()).digest != by_file.digest  # of other bytes


@pytest.mark.parametrize(("kind", "open_kind"), [("hed", open_hed), ("mlsd", open_mlsd)])
def test_other_files_are_refused_in_words(kind, open_kind, folder, tmp_path):
    def refused(given: Path | None, device: str = "cpu") -> str:
        with pytest.raises(UserError) as error:
            open_kind(given, Settings(device=device))
        return str(error.value)

    name = NETS[kind][1]
    assert f"give the released file {name}" in refused(None)
    assert "has none of these" in refused(tmp_path) and name in refused(tmp_path)
    assert "gone" in refused(tmp_path / "gone")
    (other,) = {"hed", "mlsd"} - {kind}
    told = refused(folder / NETS[other][1])
    assert f"tensors are not those of {name}" in told and "missing: " in told
    assert "cuda:77" in refused(folder, "cuda:77")
    broken = tmp_path / name
    broken.write_bytes((folder / name).read_bytes()[:5000])
    assert name in refused(tmp_path)
    state = torch.load(folder / name, weights_only=True)
    state.pop(next(iter(state)))
    torch.save(state, broken)
    assert f"1 of its tensors are not those of {name}" in refused(tmp_path)
    torch.save({"net": test_other_files_are_refused_in_words}, broken)  # a pickle that names code
    assert "loading it could run code" in refused(tmp_path)


@pytest.mark.parametrize(
    ("kind", "open_kind", "layer"),
    [("hed", open_hed, "block1.projection"), ("mlsd", open_mlsd, "block23.conv3"), ("mlsd", open_mlsd, "backbone")],
)
def test_numbers_that_are_none_are_refused(kind, open_kind, layer, folder, tmp_path, small):
    name = NETS[kind][1]
    state = torch.load(folder / name, weights_only=True)
    state[next(one for one in state if one.startswith(layer) and one.endswith("bias"))].fill_(float("nan"))
    torch.save(state, tmp_path / name)
    with pytest.raises(UserError, match="no numbers"):
        pictures(open_kind(tmp_path, Settings()), Source.of(picture()[None], 8))


@pytest.mark.parametrize("kind", NETS)
def test_by_the_command_and_measured_again(kind, folder, small, tmp_path):
    """Controls have their clips' frames, times and size; a clip obeys the control that was made of it."""
    clip = np.stack([np.roll(picture(80, 112), 9 * f, axis=1) for f in range(3)])
    encode(tmp_path / "uneven.mp4", clip, pts=[0, 3, 4], ticks=25)
    encode(tmp_path / "odd.mp4", clip[:, :79, :111], pix_fmt="yuv444p")
    rows = [{"file_path": name, "text": name, "type": "video"} for name in ("uneven.mp4", "odd.mp4")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    out = tmp_path / "new.json"
    words = ["--kind", kind, "--detector", str(folder / NETS[kind][1]), "--least_score", "0", "--out", str(out)]
    assert main(["control", str(tmp_path / "list.json"), *words]) == 0
    for row in json.loads(out.read_text()):
        source, control = (source_of(tmp_path / row[key], "video") for key in ("file_path", "control_file_path"))
        assert (control.height, control.width) == (source.height, source.width)
        np.testing.assert_allclose(control.times_s, source.times_s, atol=1e-6)
    written = np.stack(list(source_of(tmp_path / "control" / kind / "uneven.mp4", "video").frames()))
    read = np.stack(list(source_of(tmp_path / "uneven.mp4", "video").frames()))
    draw = Draw(0, Shape(3, 80, 112), Crop(80, 112, 0, 0), (0, 1, 2), 0, 0)
    by = judge_by(kind, open_for_previews(kind, str(folder), "cpu"))
    own, other = (by.scores(Asked(draw, None, written), clip, 8.0)["f1"] for clip in (read, read[::-1]))
    assert own > 0.99 and other < own - 0.01


def test_weights_of_both_are_refused_by_name(folder, tmp_path, capsys):
    """And where several kinds lack theirs, each names its own."""
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "list.json").write_text(json.dumps([{"file_path": "a.png", "text": "a", "type": "image"}]))
    gone, other = tmp_path / "gone", folder / NETS["hed"][1]
    words = ["--kind", "hed", "mlsd", "--detector", f"hed={gone}", f"mlsd={other}"]
    assert main(["control", str(tmp_path / "list.json"), *words, "--out", str(tmp_path / "{kind}.json")]) == 2
    told = capsys.readouterr().err
    assert f"{gone}: " in told and f"{other}: " in told and not list(tmp_path.glob("hed.json"))
