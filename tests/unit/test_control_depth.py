"""Depth by tiny random networks in the released formats: the library's own numbers, one scale for a clip, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from reeltune.control.depth import NEAREST_M, TAILS, open_depth
from reeltune.control.kind import Settings, Source, pictures
from reeltune.core.errors import UserError
from tests.families.tiny_wan import filled
from tests.unit.test_control_canny import scene

PICTURES = {
    "depth_anything": {
        "image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True, "ensure_multiple_of": 14,
        "size": {"height": 56, "width": 56}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "resample": 3,
        "rescale_factor": 1 / 255,
    },
    "zoedepth": {
        "image_processor_type": "ZoeDepthImageProcessor", "keep_aspect_ratio": True, "ensure_multiple_of": 32,
        "size": {"height": 64, "width": 96}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "do_pad": True, "resample": 2, "rescale_factor": 1 / 255,
    },
}  # fmt: skip


def depth_anything(metric: bool = False) -> transformers.PreTrainedModel:
    backbone = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=12, neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=4, head_hidden_size=4, depth_estimation_type="metric" if metric else "relative",
        max_depth=20 if metric else 1,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config)


def zoedepth() -> transformers.PreTrainedModel:
    backbone = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=64, patch_size=16,
        use_relative_position_bias=True, reshape_hidden_states=False, out_indices=[1, 2, 3, 4],
    )  # fmt: skip
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, bottleneck_features=8,
        num_relative_features=4, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1], num_patch_transformer_layers=1,
        patch_transformer_hidden_size=8, patch_transformer_intermediate_size=8,
        patch_transformer_num_attention_heads=2,
        bin_configurations=[{"n_bins": 4, "min_depth": 0.5, "max_depth": 10.0, "name": "nyu"}],
    )  # fmt: skip
    return transformers.ZoeDepthForDepthEstimation(config)


def saved(folder: Path, net: transformers.PreTrainedModel, kind: str) -> Path:
    filled(net, 5)
    if kind == "depth_anything":
        torch.nn.init.constant_(net.head.conv3.bias, 2.0)  # of the last layer, whose ReLU would cut all away
    net.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES[kind]))
    return folder


@pytest.mark.parametrize("kind", ["relative", "metric", "zoedepth"])
def test_pixels_are_the_librarys_depths_on_one_scale(tmp_path, kind):
    """Against transformers' own processor and its post-processing in torch, frame by frame."""
    net = zoedepth() if kind == "zoedepth" else depth_anything(kind == "metric")
    folder = saved(tmp_path, net, "zoedepth" if kind == "zoedepth" else "depth_anything")
    clip = scene(5, 70, 98)
    clip[2] //= 4  # a frame of another range
    source = Source.of(clip, 8)
    own = transformers.ZoeDepthImageProcessorPil if kind == "zoedepth" else transformers.DPTImageProcessorPil
    prepare = own.from_pretrained(folder)
    near = []
    for frame in clip:
        with torch.no_grad():
            found = net(**prepare(images=frame, return_tensors="pt")).predicted_depth
        found = found if kind == "relative" else 1 / found.clamp(min=NEAREST_M)
        down, right = (int(np.sqrt(side / 2) * 3) if kind == "zoedepth" else 0 for side in (70, 98))
        whole = F.interpolate(found[None], (70 + 2 * down, 98 + 2 * right), mode="bicubic")[0, 0]
        near.append(whole[down : down + 70, right : right + 98].numpy())
    ends = np.quantile(np.stack(near), TAILS, axis=(1, 2))
    expected = np.clip((np.stack(near) - ends[0].min()) / (ends[1].max() - ends[0].min()), 0, 1) * 255
    drawn = pictures(open_depth(folder, Settings()), source)
    assert drawn.shape == clip.shape and drawn.std() > 10
    assert np.abs(drawn[..., 0] - expected).max() <= 1
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])


def test_a_frame_is_drawn_the_same_beside_others(tmp_path):
    """On one scale, equal frames are equal; a scale of each frame's own would draw them so too, but not two halves."""
    detector = open_depth(saved(tmp_path, depth_anything(), "depth_anything"), Settings())
    one, other = scene(2, 56, 56)
    other = 255 - other // 2
    drawn = pictures(detector, Source.of(np.stack([one, other, one]), 8))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (pictures(detector, Source.of(other[None], 8))[0] != drawn[1]).any()
    quality = detector.detect(Source.of(np.stack([one] * 3), 8), lambda chunk: None)
    assert quality.facts["steady_share"] == 1 and quality.score > 0


def test_a_detector_is_known_by_every_byte_of_its_files(tmp_path):
    folder = saved(tmp_path, depth_anything(), "depth_anything")
    first = open_depth(folder, Settings()).digest
    assert open_depth(folder, Settings()).digest == first
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("56", "42"))
    assert open_depth(folder, Settings()).digest != first


def test_other_folders_are_refused_in_words(tmp_path):
    def refused(folder: Path, device: str = "cpu") -> str:
        with pytest.raises(UserError) as error:
            open_depth(folder, Settings(device=device))
        return str(error.value)

    assert "is no folder" in refused(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")
    folder = saved(tmp_path / "net", depth_anything(), "depth_anything")
    assert "--device cuda:77" in refused(folder, "cuda:77")
    settings = (folder / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(settings.replace("DPTImageProcessor", "BitImageProcessor"))
    assert "image_processor_type is 'BitImageProcessor'; depth_anything needs DPTImageProcessor" in refused(folder)
    (folder / "preprocessor_config.json").write_text(settings.replace("DPTImageProcessor", "DPTImageProcessorFast"))
    assert open_depth(folder, Settings())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "net" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "vitpose"}')
    assert "model_type is 'vitpose'; depth needs depth_anything or zoedepth" in refused(folder)
