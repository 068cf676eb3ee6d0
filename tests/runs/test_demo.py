"""The demo: scenes, data set, checkpoint, the number for following, a small run from end to end."""

import json
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from reeltune import cli, families
from reeltune.control.judge import Asked, judge_by
from reeltune.control.kinds import open_for_previews
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Crop, Draw, Posterior, Shape
from reeltune.demo import clips
from reeltune.demo import main as demo
from reeltune.demo.checkpoint import WEIGHTS, shipped, tokenizer, transformer, vae, write_checkpoint
from reeltune.demo.clips import HELD_OUT_SEED, SIDE, draw_scene, scene, write_data_set
from reeltune.demo.main import FAMILIES, MARK, clear, run
from reeltune.demo.tiny import easyanimate, hunyuan_video
from reeltune.families.hunyuan_video import prompts
from reeltune.families.wan_fun.conditions import decode, encode_clip


@pytest.fixture(scope="module")
def drawn():
    """Eight held-out (clip, control) pairs, 9 frames."""
    return [draw_scene(scene(HELD_OUT_SEED + i), 9, SIDE, SIDE) for i in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_scene_is_its_seed():
    first, again, other = (draw_scene(scene(seed), 3, 32, 32) for seed in (5, 5, 6))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_scenes_move_and_controls_are_white_on_black(drawn):
    for clip, control in drawn:
        assert clip.shape == control.shape == (9, SIDE, SIDE, 3)
        assert np.abs(clip[-1].astype(int) - clip[0]).mean() > 2
        assert 0.005 < (control > 128).mean() < 0.2 and control.max() == 255 and np.median(control) == 0


def test_every_word_of_a_caption_is_a_token():
    words = tokenizer()
    for seed in range(40):
        ids = words(scene(seed).caption).input_ids
        assert len(ids) == len(scene(seed).caption.split()) + 2  # full stop, end
        assert words.unk_token_id not in ids


def test_data_set_is_in_the_guides_form(tmp_path):
    meta, held_out = write_data_set(tmp_path, clips=2, stills=1, held_out=1)
    rows, apart = json.loads(meta.read_text()), json.loads(held_out.read_text())
    assert meta.name == "metadata_control.json"
    assert [row["type"] for row in rows] == ["video", "video", "image"] and len(apart) == 1
    for row in [*rows, *apart]:
        assert set(row) == {"file_path", "control_file_path", "text", "type"}
        for path in (row["file_path"], row["control_file_path"]):
            with av.open(str(tmp_path / path)) as file:
                stream = file.streams.video[0]
                assert (stream.width, stream.height) == (SIDE, SIDE)
                if row["type"] == "video":
                    assert stream.codec_context.name == "h264"
                    assert (stream.frames, stream.average_rate) == (clips.FRAMES, clips.FPS)
    assert not {row["file_path"] for row in rows} & {row["file_path"] for row in apart}


def obeyed(clips_FHWC, drawn) -> np.ndarray:
    """F1 of each clip with each control."""
    judge = judge_by("canny", open_for_previews("canny", None, "cpu"))
    asked = [
        Asked(Draw(0, Shape(9, SIDE, SIDE), Crop(SIDE, SIDE, 0, 0), (), 0, 0), None, control) for _, control in drawn
    ]
    return np.array([[judge.scores(one, clip, 8.0)["f1"] for one in asked] for clip in clips_FHWC])


def test_scenes_obey_their_own_control_and_no_other(drawn):
    scores = obeyed([clip for clip, _ in drawn], drawn)
    own, others = np.diag(scores), scores[~np.eye(len(drawn), dtype=bool)]
    assert own.min() > 0.6 and others.max() < 0.3 and others.mean() < 0.2


def test_obedience_falls_with_the_distance_of_clip_and_control(drawn):
    clip, control = drawn[0]
    moved = [np.roll(clip, by, axis=2) for by in (0, 2, 4, 10)]
    scores = obeyed([*moved, np.zeros_like(clip)], [(clip, control)])[:, 0].tolist()
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[3] > 0.5 and scores[4] == 0


def test_shipped_weights_are_small():
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 6e6
    assert all(file.stat().st_size <= 3e6 for file in WEIGHTS.iterdir())


def test_checkpoint_is_the_released_layout(checkpoint):
    assert {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} >= {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "google/umt5-xxl/tokenizer.json",
    }
    assert families.find(str(checkpoint)).name == "wan_fun/control_v1.1"


@pytest.mark.slow
@torch.no_grad()
def test_vae_shows_clips_and_controls_as_they_are(drawn):
    parts = families.spec.Parts(transformer(), {"vae": shipped(vae(), "vae").eval()})
    for pair in drawn[:3]:
        for clip, least in zip(pair, (22, 18), strict=True):
            x = torch.from_numpy(clip).permute(0, 3, 1, 2)[None] / 127.5 - 1
            latents = encode_clip(parts.frozen["vae"], x)
            error = (decode(parts, latents.mean) - x).square().mean() / 4  # of pixels in [0, 1]
            assert -10 * error.log10() > least
            assert 0.3 < latents.mean.std() < 1.5 and latents.mean.mean().abs() < 0.5


@torch.no_grad()
def test_the_start_takes_no_notice_of_control_and_reference(checkpoint, drawn):
    family = families.find(str(checkpoint))
    parts = family.load(str(checkpoint))

    def answer(control: np.ndarray) -> torch.Tensor:
        draw = Draw(0, Shape(9, SIDE, SIDE), Crop(SIDE, SIDE, 0, 0), tuple(range(9)), 0, 0)
        pixels = [torch.from_numpy(frames).permute(0, 3, 1, 2)[None] for frames in (drawn[0][0], control)]
        batch = Batch([draw], ["A red ball"], pixels[0], torch.tensor([0]), {}, pixels[1]).to("cpu")
        options = {"add_full_ref_image_in_self_attention": True}
        encoded = family.encode(parts, batch, "control_ref", options=options)
        cond = {name: value.mean if isinstance(value, Posterior) else value for name, value in encoded.cond.items()}
        noise = torch.randn(encoded.x0.mean.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return family.denoise(parts.net, noise, torch.tensor([1000.0]), cond)

    assert torch.equal(answer(drawn[0][1]), answer(drawn[1][1]))
    parts.net.patch_embedding.weight.data[:, 16:32] = 0.05
    assert not torch.allclose(answer(drawn[0][1]), answer(drawn[1][1]))


def test_only_an_earlier_demo_is_cleared_away(tmp_path):
    out = tmp_path / "demo"
    clear(out)
    (out / "run").mkdir()
    clear(out)
    assert [path.name for path in out.iterdir()] == [MARK]
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        clear(out)
    assert (out / "thesis.txt").exists()
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        clear(out / "thesis.txt")


def test_data_of_no_demo_stay_though_their_folder_is_called_so(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"holds other files \(data\)"):
        clear(tmp_path)
    (tmp_path / "run").mkdir()
    for data, is_demo in ((tmp_path / "elsewhere", False), (tmp_path / "data", True)):  # an unmarked one, by its recipe
        (tmp_path / "run/recipe.yaml").write_text(f"train_data_dir: {data}\n")
        if not is_demo:
            with pytest.raises(UserError, match="holds other files"):
                clear(tmp_path)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


@pytest.mark.slow
def test_a_short_demo_runs_from_end_to_end(tmp_path, capsys, reports):
    with reports():
        assert run(tmp_path / "demo", clips=4, stills=4, held_out=2, steps=2) == 0
    page = (tmp_path / "demo/run/report.html").read_text()
    assert "follows its control" in page
    *_, obeys, told = capsys.readouterr().out.strip().splitlines()
    assert re.search(r"of previews: 0\.\d\d before, 0\.\d\d after training; of the real clips 0\.[89]", obeys)
    assert "reeltune train recipes/wan2.1_fun_v1.1_1.3b_control.yaml" in told
    assert (tmp_path / "demo/run/checkpoint-2/progress.json").exists()


@pytest.mark.slow
def test_the_demo_of_an_adapter(tmp_path, capsys, measured_here, reports, monkeypatch):
    monkeypatch.setattr(demo, "VARIANTS", 2)  # encoding takes most of the time
    with reports():
        assert run(tmp_path / "demo", clips=4, stills=4, held_out=2, steps=8, adapter=True) == 0
    out = tmp_path / "demo/run"
    assert (out / "checkpoint-8/adapter/adapter_model.safetensors").is_file()
    told = capsys.readouterr().out.strip().splitlines()[-1]
    assert "reeltune train recipes/wan2.1_fun_v1.1_1.3b_control_lora_12gb.yaml" in told
    page = (out / "report.html").read_text()
    assert "<span>an adapter of rank 16: " in page
    assert "<span>steps 20</span>" in page and "<span>negative prompt" not in page  # which there was none
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["kind"] == "validation"]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    with pytest.raises(UserError, match="the toy has too few linear layers"):
        run(tmp_path / "toy", family="toy", adapter=True)


def test_captions_are_cut_where_their_families_cut_them():
    caption = scene(5).caption
    words = hunyuan_video.tokenizer()
    ids, _ = prompts.tokens_of(words, prompts.TEMPLATE, [caption], prompts.TEXT_LENGTH + prompts.CROP)
    assert words.decode(ids[0, prompts.CROP :]).startswith(caption.split()[0])
    assert words.decode(ids[0, prompts.CROP - 1]) == "\n\n"
    chat = easyanimate.tokenizer()
    turns = [[{"role": "user", "content": [{"type": "text", "text": caption}]}]]
    (said,) = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert said.endswith(f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n")
    for made in (words, chat, hunyuan_video.tokenizer_2()):
        assert made.unk_token_id not in made(caption).input_ids


def test_every_family_can_be_shown():
    assert set(cli.DEMOS) == set(FAMILIES) >= set(families.MODULES)
    recipes = Path(__file__).parents[2] / "recipes"
    for name, shown in FAMILIES.items():
        for recipe in () if name == "toy" else (shown.recipe, shown.adapter_recipe):
            assert f"huggingface.co/{shown.model}" in (recipes / recipe).read_text()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("wan2.1_t2v", "wan_fun/t2v"),
        ("wan2.1_i2v", "wan_fun/inp"),
        ("wan2.2_a14b", "wan_fun/2.2_a14b_t2v"),
        ("wan2.2_5b", "wan_fun/2.2_5b_ti2v"),
    ],
)
def test_models_of_wan_are_written_as_released(name, found, tmp_path):
    model = FAMILIES[name].write(tmp_path)
    assert families.find(model).name == found
    assert sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(cli.DEMOS) - {"wan_fun"}))
def test_an_untrained_family_learns_in_a_few_steps(family, tmp_path, capsys, measured_here, reports, monkeypatch):
    def of_untrained(*given, real=demo.of_untrained, **more):  # whose previews, of random weights, are of few steps
        made = real(*given, **more)
        sizes, validation = replace(made.sizes, video_sample_n_frames=5), replace(made.validation, preview_steps=2)
        return replace(made, sizes=sizes, validation=validation)

    monkeypatch.setattr(demo, "of_untrained", of_untrained)
    clips, last = (24, 60) if family == "toy" else (4, 8)
    with reports(curves=False):
        assert run(tmp_path / "demo", family=family, clips=clips, stills=2, held_out=3, steps=last) == 0
    out = tmp_path / "demo/run"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps, held_out = ([row for row in rows if row["kind"] == kind] for kind in ("step", "validation"))
    assert sum(row["loss"] for row in steps[-3:]) < sum(row["loss"] for row in steps[:3])
    assert all(after < before for before, after in zip(*(held_out[i]["per_clip"] for i in (0, -1)), strict=True))
    assert families.find(tmp_path / "demo/model").name in (out / "report.html").read_text()
    assert {path.name for path in (out / "previews" / f"step-{last}").iterdir()} == {
        "0.mp4",
        "0.json",
        "1.mp4",
        "1.json",
    }
    said = capsys.readouterr().out
    if family == "wan2.2_a14b":
        assert {row["expert"] for row in steps} == {"high", "low"} and said.rstrip().endswith(" --expert both")
    assert f"held-out loss {held_out[0]['loss']:.4f} before, {held_out[-1]['loss']:.4f} after training" in said
    assert ("random" in said and "not to be recognised" in said) == (family != "toy")
