"""`vae_mini_batch`: clips of a batch encoded together, in every family and mode."""

from dataclasses import replace

import pytest
import torch

from reeltune import families
from reeltune.core.types import Batch, Crop, Draw, Shape
from reeltune.sampling.sample import Setup

SHAPE, CLIPS = Shape(5, 32, 64), 3
NEAR = 1e-5  # of a tensor's norm, in fp32


@pytest.fixture(scope="module")
def family_and_parts(any_checkpoint, tmp_path_factory):
    torch.set_num_threads(1)
    folder = any_checkpoint.lay_out(tmp_path_factory.mktemp("checkpoint"))
    family = families.find(folder)
    return family, family.load(folder, frozen_dtype=torch.float32)


def batch_for(family):
    """Clips that differ in all that any mode may see of them."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (CLIPS, SHAPE.frames, 3, *SHAPE[1:]), generator=chance, dtype=torch.uint8)
    mask = torch.zeros(CLIPS, *SHAPE, dtype=torch.bool)
    for i in range(CLIPS):
        mask[i, i:] = True
    crop, frames = Crop(*SHAPE[1:], 0, 0), tuple(range(SHAPE.frames))
    return Batch(
        draws=[Draw(i, SHAPE, crop, frames, ref_frame=i, seed=i) for i in range(CLIPS)],
        text=["a red bird", "", "a dog on a beach"],
        pixels_BFCHW=pixels,
        ref_frame_B=torch.arange(CLIPS),
        keep={name: torch.tensor([True, False, True]) for name in ("text", *family.drop)},
        control_BFCHW=pixels.flip(1),
        camera_BFCHW=torch.randn(CLIPS, SHAPE.frames, 6, *SHAPE[1:], generator=chance),
        mask_BFHW=mask,
    )


def test_clips_are_those_encoded_alone_to_within_rounding(family_and_parts):
    family, parts = family_and_parts
    asked = {"add_full_ref_image_in_self_attention": "full_ref" in family.drop}

    def encoded(mode, **options):
        """(tensors, clips of each call)"""
        calls = []

        def noted(parts, batch, *how):
            calls.append(len(batch.text))
            return family.encode_clips(parts, batch, *how)

        setup = Setup(replace(family, encode_clips=noted), mode, parts, family.objective, options=asked | options)
        return setup.encode(batch_for(family)).tensors(), calls

    for mode in family.modes:
        (alone, singly), (together, in_groups) = encoded(mode), encoded(mode, vae_mini_batch=2)
        assert singly == [1, 1, 1] and in_groups == [2, 1]
        assert alone.keys() == together.keys()
        captions = {f"{part}.{name}" for part in ("cond", "null") for name in family.caption}
        for name, ours in together.items():
            theirs = alone[name]
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
            if name in captions or not theirs.is_floating_point():
                assert torch.equal(ours, theirs), name
                continue
            finite = theirs.isfinite()  # of a mask that is known exactly the log-variance is not
            assert torch.equal(ours.isfinite(), finite) and torch.equal(ours[~finite], theirs[~finite])
            apart = (ours - theirs)[finite].norm() / theirs[finite].norm().clamp_min(1e-12)
            assert apart <= NEAR, (mode, name, apart.item())
            rows = (theirs[i] for i in range(CLIPS))
            assert len({row.flatten().sum().item() for row in rows}) > 1 or name not in ("x0.mean", "cond.control.mean")
        last = {name: tensor[-1:] for name, tensor in together.items()}  # which is alone in its group
        assert all(torch.equal(tensor, alone[name][-1:]) for name, tensor in last.items())
