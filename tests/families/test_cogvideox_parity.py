"""Every tensor of every CogVideoX-Fun golden file, within the bounds of benchmarks/parity_cogvideox.py."""

import pytest
import torch

from benchmarks.golden import Golden, loaded
from benchmarks.parity_cogvideox import golden_files, measure
from reeltune.families import latents
from reeltune.families.cogvideox_fun import net as corrections
from tests.families.parity import assert_parity, off

pytestmark = pytest.mark.golden("multi/golden/cogvideox*/*.safetensors")

INPUTS = {  # what is read and not computed; the latents are compared as draws
    "scheduler": set(),
    "vae": {"x", "z"},
    "text": set(),
    "transformer": {"hidden_states", "inpaint_latents", "encoder_hidden_states", "timestep", "loss_weight"},
    "train": {"pixel_values", "mask", "mask_latents", "latents", "noise", "t2v_flag"},
}


def test_within_bounds(goldens, file):
    assert_parity(file, measure(file), INPUTS[file.stem.split("_")[0]])


def files_of(goldens, stem, *, rotary):
    """Those of networks with rotary positions but no time patches, or with a table of positions."""
    for path in golden_files(goldens):
        config = loaded(path.parent)[1].net.config
        if path.stem == stem and config.patch_size_t is None and config.use_rotary_positional_embeddings == rotary:
            yield path


def test_without_the_table_resized_the_answers_are_others(goldens, monkeypatch):
    paths = list(files_of(goldens, "transformer", rotary=False))
    for path in paths:
        patch = loaded(path.parent)[1].net.patch_embed
        monkeypatch.setattr(patch, "_forward_hooks", {})
        monkeypatch.setattr(patch, "use_positional_embeddings", True)
        assert "a.out" in off(measure(path))
        monkeypatch.undo()
        assert not off(measure(path))
    assert paths


def test_without_the_open_grid_the_answers_are_others(goldens, monkeypatch):
    paths = list(files_of(goldens, "transformer", rotary=True))
    monkeypatch.setattr(corrections, "open_grid", lambda start, stop, counts: (start, stop))
    for path in paths:
        assert {"a.out", "b.out", "c.out"} & off(measure(path))
    assert paths


def test_the_decoder_as_diffusers_has_it_gives_other_pixels(goldens):
    """Equal for a single frame alone; for 2 latent frames it is 8 frames long instead of 5."""
    paths = [path for path in golden_files(goldens) if path.stem == "vae"]
    for path in paths:
        golden, vae = Golden(path), loaded(path.parent)[1].frozen["vae"]
        for case in golden.cases(".z"):
            z, theirs = golden[f"{case}.z"], golden[f"{case}.dec"]
            plain = latents.decode_clip(vae, z * vae.config.scaling_factor).transpose(1, 2)
            if z.shape[2] == 1:
                torch.testing.assert_close(plain, theirs, rtol=0, atol=5e-5)
            elif z.shape[2] % 2 == 0:
                assert plain.shape[2] == 4 * z.shape[2] != theirs.shape[2]
            else:
                assert (plain - theirs).abs().max() > 0.1
    assert paths
