"""Clips of prompts by models that are shown a mask, or a known first frame in x."""

import pytest
import torch
from PIL import Image

from reeltune import families
from reeltune.data.shapes import SizeRules
from reeltune.diffusion.loss import settle
from reeltune.families.wan_fun import conditions as wan
from reeltune.sampling.prompts import prompt_requests
from reeltune.sampling.sample import Setup
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=1, stills=0)


def conditions(folder, mode, path, expert=None):
    family = families.find(folder)
    family = family.experts[expert] if expert else family
    sizes = {"video_sample_size": 64, "image_sample_size": 64, "video_sample_n_frames": 5, "video_sample_stride": 1}
    rules = SizeRules(**sizes, geometry=family.geometry)
    setup = Setup(family, mode, family.load(folder), family.objective)
    (request,) = prompt_requests(family, mode, ["a cat"], [] if path is None else [str(path)], rules, seed=0)
    encoded = setup.encode(request.batch())
    return family, settle(encoded, [0], setup.parts.null)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 60)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(("variant", "mode"), [("2.2_5b_ti2v", "ti2v"), ("2.2_5b_inp", "inpaint")])
def test_a_first_picture_is_kept_and_without_one_all_is_made(variant, mode, picture, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", variant)
    times = []

    def net(x, time, *_):
        times.append(time)
        return torch.zeros_like(x[:, :48])

    for path in (picture, None):
        family, (x0, cond) = conditions(folder, mode, path)
        x = torch.randn_like(x0)
        family.denoise(net, x, torch.tensor([500.0]), cond)
        known, latents = wan.rides_in_x(cond)
        assert known[0, 0, :, 0, 0].tolist() == [float(path is not None), 0.0]
        made = family.finish(x, cond)
        assert torch.equal(made[:, :, 0], latents[:, :, 0] if path is not None else x[:, :, 0])
        assert torch.equal(made[:, :, 1:], x[:, :, 1:])
    tokens = times[0].shape[1] // 2
    assert times[0][0].tolist() == [0.0] * tokens + [500.0] * tokens and times[1].unique().tolist() == [500.0]


def test_a_clip_that_follows_another_is_made_whole(data, tmp_path):
    """Its mask says so, and is then blanked, as in training where all is to be made."""
    folder = tiny_checkpoint(tmp_path / "model", "2.2_a14b_control")
    _, (_, cond) = conditions(folder, "control_ref", data / "control/0.mp4", "low")
    assert cond["control"].any() and not cond["inpaint"].any()


def test_a_camera_path_alone_makes_all(data, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "2.2_a14b_control_camera")
    _, (_, cond) = conditions(folder, "control_ref_camera", data / "camera/0.txt", "high")
    assert cond["camera"].any() and not cond["inpaint"].any()
