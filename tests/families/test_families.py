"""What every family and variant must do, whatever it is."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from transformers import CLIPImageProcessorPil, T5Config, T5EncoderModel

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Crop, Draw, Shape
from reeltune.diffusion import denoise
from reeltune.diffusion.loss import diffusion_loss, settle
from reeltune.families import tokenizers, weights
from reeltune.families.spec import check_mode
from reeltune.optim.trainable import released_names, select
from reeltune.sampling.sample import Setup

SHAPE = Shape(5, 32, 64)
NEAR = 1e-5  # of a tensor's norm: clips encoded together and alone, in fp32


@pytest.fixture(scope="module")
def family_and_parts(any_checkpoint, tmp_path_factory):
    folder = any_checkpoint.lay_out(tmp_path_factory.mktemp("checkpoint"))
    family = families.find(folder)
    return family, family.load(folder, frozen_dtype=torch.float32)


def batch_for(family, ref_frame=0):
    """Two clips with everything that any mode may need, nothing dropped."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, SHAPE.frames, 3, SHAPE.height, SHAPE.width), generator=generator).byte()
    draws = [
        Draw(i, SHAPE, Crop(*SHAPE[1:], 0, 0), tuple(range(SHAPE.frames)), ref_frame=ref_frame, seed=i) for i in (0, 1)
    ]
    mask = torch.zeros(2, SHAPE.frames, SHAPE.height, SHAPE.width, dtype=torch.bool)
    mask[:, 1:] = True
    return Batch(
        draws=draws,
        text=["a red bird", ""],
        pixels_BFCHW=pixels,
        ref_frame_B=torch.tensor([ref_frame, ref_frame]),
        keep={name: torch.ones(2, dtype=torch.bool) for name in ("text", *family.drop)},
        control_BFCHW=pixels.flip(1),
        camera_BFCHW=torch.randn(2, SHAPE.frames, 6, SHAPE.height, SHAPE.width, generator=generator),
        mask_BFHW=mask,
    ).to("cpu")


def options(family):
    return {"add_full_ref_image_in_self_attention": "full_ref" in family.drop}


@pytest.mark.quick_by_family
def test_every_mode_goes_from_pixels_to_pixels(family_and_parts):
    family, parts = family_and_parts
    for mode in family.modes:
        encoded = family.encode(parts, batch_for(family), mode, options=options(family))
        T, h, w = family.geometry.latent(SHAPE)
        assert encoded.x0.mean.shape == encoded.x0.logvar.shape == (2, family.geometry.channels, T, h, w)
        x0, cond = settle(encoded, [0, 1], parts.null)
        answer = family.denoise(parts.net, x0, family.objective.timestep(torch.tensor([0.3, 0.9])), cond)
        assert answer.shape == x0.shape
        assert torch.isfinite(answer).all()
        pixels = family.decode(parts, x0)
        assert pixels.shape == (2, *SHAPE[:1], 3, *SHAPE[1:])
        assert torch.isfinite(pixels).all()


@pytest.mark.quick_by_family
def test_what_may_be_dropped_is_there_and_matters(family_and_parts):
    """Each name in `drop` is a condition of some mode, and the network's answer changes when it is blanked."""
    family, parts = family_and_parts
    timestep_B = torch.tensor([300.0, 900.0])

    def settled(mode, ref_frame, *, all_is_made, without=""):
        batch = batch_for(family, ref_frame)
        batch.keep = {name: torch.full((2,), name != without) for name in batch.keep}
        if all_is_made:
            batch.mask_BFHW = torch.ones_like(batch.mask_BFHW)
        return settle(family.encode(parts, batch, mode, options=options(family)), [0, 1], parts.null)

    unseen = set(family.drop)
    for mode, ref_frame in product(family.modes, (0, 2)):
        wholes = {}
        for name in sorted(unseen):
            all_is_made = name == "inpaint"  # which is dropped nowhere else
            if all_is_made not in wholes:
                x0, cond = settled(mode, ref_frame, all_is_made=all_is_made)
                wholes[all_is_made] = x0, family.denoise(parts.net, x0, timestep_B, cond)
            x0, whole = wholes[all_is_made]
            _, cond = settled(mode, ref_frame, all_is_made=all_is_made, without=name)
            if name in cond and not torch.equal(family.denoise(parts.net, x0, timestep_B, cond), whole):
                unseen.remove(name)
    assert not unseen


def test_a_condition_has_one_shape_for_all_captions(family_and_parts):
    family, parts = family_and_parts
    picture = batch_for(family).pixels_BFCHW[:1, 0] if family.caption_sees_picture else None
    shapes = [
        {name: value.shape for name, value in family.describe(parts, [text], picture).cond.items()}
        for text in ("a red bird", "a " + "very " * 20 + "red bird over the sea")
    ]
    assert shapes[0] == shapes[1]
    assert all(shape[0] == 1 for shape in shapes[0].values())


def three_clips(family):
    """As a reader gives them. They differ in all that any mode sees of them."""
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, SHAPE.frames, 3, *SHAPE[1:]), generator=chance, dtype=torch.uint8)
    crop, frames = Crop(*SHAPE[1:], 0, 0), tuple(range(SHAPE.frames))
    return Batch(
        draws=[Draw(i, SHAPE, crop, frames, ref_frame=i, seed=i) for i in range(3)],
        text=["a red bird", "", "a dog on a beach"],
        pixels_BFCHW=pixels,
        ref_frame_B=torch.arange(3),
        keep={name: torch.tensor([True, False, True]) for name in ("text", *family.drop)},
        control_BFCHW=pixels.flip(1),
        camera_BFCHW=torch.randn(3, SHAPE.frames, 6, *SHAPE[1:], generator=chance),
        mask_BFHW=torch.arange(SHAPE.frames)[:, None, None].ge(torch.arange(3)[:, None, None, None]).expand(3, *SHAPE),
    )


@pytest.mark.quick_by_family
def test_clips_encoded_together_are_those_alone_to_within_rounding(family_and_parts):
    family, parts = family_and_parts

    def encoded(mode, **more):
        """(tensors, clips of each call)"""
        calls = []

        def noted(parts, batch, *how):
            calls.append(len(batch.text))
            return family.encode_clips(parts, batch, *how)

        chosen = options(family) | more
        setup = Setup(replace(family, encode_clips=noted), mode, parts, family.objective, options=chosen)
        return setup.encode(three_clips(family)).tensors(), calls

    for mode in family.modes:
        (alone, singly), (together, in_groups) = encoded(mode), encoded(mode, vae_mini_batch=2)
        assert (singly, in_groups) == ([1, 1, 1], [2, 1]) and alone.keys() == together.keys()
        captions = {f"{part}.{name}" for part in ("cond", "null") for name in family.caption}
        for name, ours in together.items():
            theirs = alone[name]
            assert ours.shape == theirs.shape and torch.equal(ours[2], theirs[2]), name  # alone in its group
            if name in captions or not theirs.is_floating_point():
                assert torch.equal(ours, theirs), name
                continue
            finite = theirs.isfinite()  # not of a mask, which is known exactly: its variance is 0
            assert torch.equal(ours[~finite], theirs[~finite]), name
            assert (ours - theirs)[finite].norm() <= NEAR * theirs[finite].norm(), (mode, name)


def test_the_files_that_encoding_reads_are_named(family_and_parts):
    """By them a cache knows that it was filled by the same networks."""
    family, parts = family_and_parts
    assert all(path.exists() for path in family.frozen_files.values())
    assert len(family.frozen_files) >= len(parts.frozen)


def test_block_names_exist(family_and_parts):
    family, parts = family_and_parts
    assert family.blocks
    assert set(family.blocks) <= {type(module).__name__ for module in parts.net.modules()}


def test_names_go_there_and_back(family_and_parts):
    family, parts = family_and_parts
    state = parts.net.state_dict()
    released = family.to_released(state, parts.config)
    assert len(released) == len(state)
    back = family.from_released(released, parts.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_needs_name_modes_and_inputs(family_and_parts):
    family, _ = family_and_parts
    assert set(family.needs) <= set(family.modes)
    assert {need for needs in family.needs.values() for need in needs} <= {"control", "camera", "mask", "ref"}
    assert check_mode(family, None) == family.modes[0]


@pytest.mark.quick_by_family
def test_a_step_moves_only_what_may_move(family_and_parts):
    family, parts = family_and_parts
    names = released_names(parts.net, partial(family.to_released, config=parts.config))
    inside = [name for name, module in parts.net.named_modules() if type(module).__name__ in family.blocks]
    pattern = next(names[name] for name in names if name.startswith(f"{inside[0]}.")).rsplit(".", 1)[0]
    groups = select(parts.net, names, [pattern])
    before = {name: w.detach().clone() for name, w in parts.net.named_parameters()}
    encoded = family.encode(parts, batch_for(family), family.modes[0], options=options(family))
    loss = diffusion_loss(family.denoise, parts.net, family.objective, encoded, parts.null, [0, 1], [(0, 1), (0, 1)])
    loss.value.backward()
    torch.optim.SGD(groups[0]["params"], lr=0.1).step()
    moved = {name for name, w in parts.net.named_parameters() if not torch.equal(w, before[name])}
    with torch.no_grad():
        for name, w in parts.net.named_parameters():
            w.copy_(before[name])
            w.grad = None
    assert moved
    assert all(pattern in names[name] for name in moved)


@pytest.mark.quick_by_family
def test_an_oracle_is_sampled_back(family_and_parts):
    """A network that knows the clip gives it back through the family's own schedule."""
    family, parts = family_and_parts
    x0, cond = settle(family.encode(parts, batch_for(family), family.modes[0]), [0, 1], parts.null)
    objective = family.objective

    def oracle(net, x, timestep_B, cond):
        level_B = timestep_B / objective.steps
        kept_x0, noise_share = (
            objective.corrupt(*pair, level_B) for pair in ((x0, 0 * x0), (0 * x0, torch.ones_like(x0)))
        )
        return objective.target(x0, (x - kept_x0) / noise_share, level_B)

    settings = {"scheduler": denoise.sampler(objective), "seeds": [0, 1], "steps": 4}
    found = denoise.sample(oracle, None, objective, cond, parts.null, x0.shape, **settings)
    torch.testing.assert_close(found, x0, atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is no tokenizer"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"special_tokens_map.json": '{"eos'}, "is not JSON"),
        ({"tokenizer_config.json": "{}"}, "is no tokenizer"),
    ],
)
def test_a_folder_that_is_no_tokenizer_is_refused_by_name(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}(.|\n)*{words}(.|\n)*download it again"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b'{"d_model": 8', "config.json(.|\n)*is not JSON"),
        ("config.json", b"[8]", "config.json(.|\n)*is no table"),
        ("model.safetensors", None, "model.safetensors(.|\n)*cannot be read"),
        ("model.safetensors.index.json", b'{"weight_map": {', "index.json(.|\n)*is not JSON"),
    ],
)
def test_half_of_a_download_is_told(name, content, words, tmp_path):
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path)
    weights.load_encoder(T5EncoderModel, tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=rf"{words}(.|\n)*download it again"):
        weights.load_encoder(T5EncoderModel, tmp_path)


def test_an_image_processor_without_settings_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no preprocessor_config\.json; download it"):
        tokenizers.load_image_processor(CLIPImageProcessorPil, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 9}}')
    assert tokenizers.load_image_processor(CLIPImageProcessorPil, tmp_path).size["shortest_edge"] == 9
