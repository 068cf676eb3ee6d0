"""Every tensor of every golden file of Wan2.1 and Wan2.2, and what the goldens would not forgive."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.golden import Golden
from benchmarks.parity_wan import as_stored, batch_in, padded
from benchmarks.parity_wan22 import (  # golden_files: the files are asked of this module
    EXPERTS,
    case_of,
    golden_files,
    kept,
    kind_of,
    loaded,
    measure,
    settled,
)
from reeltune.core.types import Posterior
from reeltune.diffusion import loss as losses
from reeltune.families.wan_fun import conditions as wan
from tests.families.parity import assert_parity

pytestmark = pytest.mark.golden("wan22/*/golden/**/*.safetensors")

INPUTS = {  # what is read and not computed
    "transformer": {
        *("x", "y", "t", "t_tokens", "t_random_tokens", "probe", "text", "text_lens"),
        *("clip_fea", "full_ref", "y_camera_f16"),
    },
    "train_step": {
        *("pixel_u8", "control_pixel_u8", "control_camera_values_f16", "mask", "noise", "indices", "clip_idx"),
        *("t2v_flag", "eps_latents", "eps_control", "eps_ref", "eps_mask_latents"),
    },
    "vae": {"pixels_u8", "eps", "z"},
    "scheduler": set(),
}
FAR = 1.0  # what is wrong by design differs by 3.9 to 6.8 on the set that was made with these tests


def test_within_bounds(file):
    assert_parity(file, measure(file), INPUTS[kind_of(file)])


# ---- what must not pass unseen


def of_kind(goldens: Path, kind: str) -> list[Golden]:
    return [Golden(path) for path in golden_files(goldens) if kind_of(path) == kind]


def answer(golden: Golden, expert: str, y: torch.Tensor | None, case: str) -> torch.Tensor:
    parts = loaded(case_of(golden.path), golden.metadata["variant"], expert)[1]
    x, camera = golden[f"{case}.x"], golden.get(f"{case}.y_camera_f16")
    joined = x if y is None else torch.cat([x, y], 1)
    text = padded(golden.numbered(f"{case}.text."), wan.TEXT_LENGTH)
    more = golden.get(f"{case}.full_ref"), None if camera is None else camera.float()
    with torch.no_grad():
        return parts.net(joined, golden[f"{case}.t"], text, golden.get(f"{case}.clip_fea"), *more)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def test_the_other_expert_answers_otherwise(goldens):
    seen = 0
    for golden in of_kind(goldens, "transformer"):
        if golden.metadata["expert"] in EXPERTS:
            other = next(name for name in EXPERTS if name != golden.metadata["expert"])
            for case in golden.cases(".x"):
                assert apart(answer(golden, other, golden.get(f"{case}.y"), case), golden[f"{case}.out"]) > FAR
                seen += 1
    assert seen


def test_conditioning_channels_in_another_order_are_answered_otherwise(goldens):
    seen = 0
    for golden in of_kind(goldens, "transformer"):
        for case in [case for case in golden.cases(".x") if f"{case}.y" in golden]:
            y = golden[f"{case}.y"]
            swapped = torch.cat([y[:, wan.MASK_CHANNELS :], y[:, : wan.MASK_CHANNELS]], 1)
            found = answer(golden, golden.metadata["expert"], swapped, case)
            assert apart(found, golden[f"{case}.out"]) > FAR
            seen += 1
    assert seen


def with_known_frame(goldens: Path) -> list[Golden]:
    """Steps of which every sample has a known first frame in x."""
    steps = [golden for golden in of_kind(goldens, "train_step") if golden["model_t"].ndim == 2]
    return [golden for golden in steps if not golden["model_t"][:, 0].any()]


def test_a_known_frame_left_out_is_answered_otherwise(goldens):
    steps = with_known_frame(goldens)
    assert steps
    for golden in steps:
        family, parts = loaded(case_of(golden.path), golden.metadata["variant"], "None")
        cond = {"text": padded(golden.numbered("prompt_embeds."), wan.TEXT_LENGTH)}
        if "y" in golden:
            control = golden["y"].shape[1] - golden["latents"].shape[1] - wan.MASK_CHANNELS
            cond |= {"control": golden["y"][:, :control], "inpaint": golden["y"][:, control:]}
        if "full_ref" in golden:
            cond["full_ref"] = golden["full_ref"][:, :, None]
        level_B = golden["sigmas"]
        with torch.no_grad():
            x = family.objective.corrupt(golden["latents"], golden["noise"], level_B)
            found = family.denoise(parts.net, x, golden["timesteps"], cond)
        assert apart(found, golden["noise_pred"]) > FAR


def test_each_sample_has_its_own_known_frame(goldens):
    """In a batch in which one sample lacks it: ours is what each sample is alone, the reference's leaves it out."""
    seen = 0
    for golden in of_kind(goldens, "train_step"):
        mask = golden.get("mask_conditions")
        if mask is None or golden.metadata["train_mode"] == "ti2v":
            continue
        known_B = (mask[:, :, 0].flatten(1) == 0).all(1)
        if known_B.all() or not known_B.any():
            continue
        seen += 1
        family, parts = loaded(case_of(golden.path), golden.metadata["variant"], "None")
        cond = step_conditions(golden, family, parts)
        assert cond["known"][:, 0, 0, 0, 0].tolist() == known_B.float().tolist()
        assert not cond["known"][:, :, 1:].any()
        level_B, noise, x0 = golden["sigmas"], golden["noise"], golden["latents"]

        def answered(cond, rows, x0=x0, noise=noise, level_B=level_B, family=family, parts=parts):
            some = {name: value[rows] for name, value in cond.items()}
            with torch.no_grad():
                given = x0[rows], some, noise[rows], level_B[rows]
                return losses.answer_at(family.denoise, parts.net, family.objective, *given)

        together = answered(cond, torch.arange(len(known_B)))
        for row, known in enumerate(known_B.tolist()):
            assert apart(answered(cond, torch.tensor([row])), together[row : row + 1]) < 1e-5
            difference = apart(together[row], golden["noise_pred"][row])
            assert difference > 0.01 if known else difference < 5e-5
    assert seen


def step_conditions(golden: Golden, family, parts) -> dict[str, torch.Tensor]:
    """As the step has them, with the known frame where ours has it."""
    full_ref = golden.metadata["add_full_ref_image_in_self_attention"] == "True"
    mode, count = golden.metadata["train_mode"], len(golden["pixel_u8"])
    batch = batch_in(golden, kept(golden, mode, count, full_ref))
    encoded = family.encode(parts, batch, mode, options={"add_full_ref_image_in_self_attention": full_ref})
    stored = as_stored(golden, settled(golden, encoded, parts), parts)
    return stored | {"known": encoded.cond["known"]}


def test_the_kept_clip_that_rides_in_x_is_drawn_once(goldens):
    """Networks that take it beside x too get the same draw of it in both places."""
    for golden in with_known_frame(goldens):
        if "y" in golden:
            C = golden["latents"].shape[1]
            assert torch.equal(golden["noisy_latents"][:, :, 0], golden["y"][:, -C:, 0])


def test_the_known_frame_is_put_back_where_it_was_given():
    x0, given = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    known = torch.zeros(2, 1, 4, 2, 2)
    known[0, :, 0] = 1
    found = wan.finish(x0, {"first_frame": torch.cat([known, given], 1)})
    assert torch.equal(found[0, :, 0], given[0, :, 0])
    assert torch.equal(found[0, :, 1:], x0[0, :, 1:]) and torch.equal(found[1], x0[1])
    assert torch.equal(wan.finish(x0, {"text": given}), x0)


def test_a_posterior_of_what_is_known_keeps_its_mask_exact():
    mask = torch.ones(1, 5, 8, 8, dtype=torch.bool)
    mask[:, :1] = False
    given = Posterior(torch.zeros(1, 48, 2, 2, 2), torch.zeros(1, 48, 2, 2, 2))
    found = wan.inpaint_conditions(mask, given, "ti2v")["first_frame"]
    assert isinstance(found, Posterior)
    assert found.mean[0, 0, :, 0, 0].tolist() == [1.0, 0.0] and torch.isneginf(found.logvar[:, 0]).all()
    mask[:, 0, 0, 0] = True  # one corner is to be made: nothing rides in x
    both = wan.inpaint_conditions(mask, given, "inpaint")
    assert isinstance(both["known"], torch.Tensor) and not both["known"].any()
    sixteen = replace(given, mean=given.mean[:, :16], logvar=given.logvar[:, :16])
    assert "known" not in wan.inpaint_conditions(mask, sixteen, "inpaint")
