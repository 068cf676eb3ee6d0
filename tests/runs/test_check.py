"""What `check` prints, against data whose answer is known."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reeltune import cli
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Record
from reeltune.data.media import write_clip
from reeltune.data.records import Records
from reeltune.data.shapes import SizeRules
from reeltune.estimate.check import check
from reeltune.families.wan_fun import layout
from reeltune.run import machine, precision
from reeltune.run.sizes import short_clips
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """What is said of this machine's CPU is no part of the answers here, but where a test gives it another."""
    monkeypatch.setattr(precision, "computes_bf16", lambda: True)
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Three clips of 20 frames at 10 per second, one still, one row without a file."""
    folder = tmp_path_factory.mktemp("data")
    tiny_checkpoint(folder / "model", "inp")
    ramp = np.arange(20 * 64 * 96 * 3, dtype=np.uint32).reshape(20, 64, 96, 3)
    rows = [{"file_path": f"{i}.mp4", "text": "a ramp", "type": "video"} for i in range(3)]
    for i, row in enumerate(rows):
        write_clip(folder / row["file_path"], (ramp * (i + 3) % 251).astype(np.uint8), 10.0)
    Image.fromarray(ramp[0].astype(np.uint8)).save(folder / "still.png")
    rows += [{"file_path": "still.png", "text": "still", "type": "image"}]
    rows += [{"file_path": "gone.mp4", "text": "nothing", "type": "video"}]
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def recipe_of_words(given, tmp_path, *words, **more) -> Recipe:
    flags = {
        "pretrained_model_name_or_path": given / "model",
        "train_data_dir": given,
        "train_data_meta": given / "metadata.json",
        "output_dir": tmp_path,
        "video_sample_size": 64,
        "image_sample_size": 64,
        "video_sample_n_frames": 9,
        "max_bad_share": 0.2,
    }
    argv = [f"--{name}={value}" for name, value in (flags | more).items()]
    return cli.recipe_of([*argv, *words], "check")


def lines_of(given, tmp_path, *words, **more) -> list[str]:
    return list(check(recipe_of_words(given, tmp_path, *words, **more)))


def test_counts_reasons_and_sizes(given, tmp_path):
    lines = lines_of(given, tmp_path, gradient_accumulation_steps=3, num_train_epochs=5)
    said = "\n".join(lines)
    assert lines[0] == "model    wan_fun/inp, train_mode inpaint"
    assert "5 entries; usable: 3 videos and 1 image" in lines[1]
    assert lines[2] == "left out 1 (20.0%; up to 20.0%)" and "entry 4, gone.mp4: " in lines[3]
    assert "held out 0 clips" in lines
    assert "epoch    4 micro-steps of 1 sample" in lines
    assert "run      6 optimizer steps of 3 micro-steps, 5 epochs; 0 repeats fill up its last groups" in lines
    video, still = (line.split() for line in lines[-2:])
    assert video == ["3", "9", "64", "64", "48", "1.70"]  # 3 x 4 x 4 tokens; frames 0 to 16 of a stride of 2 at 10/s
    assert still == ["1", "1", "64", "64", "16", "still"]
    assert "notice" not in said


def test_seconds_of_footage_by_frame_rate(given, tmp_path):
    more = {"video_sample_n_frames": 5, "train_batch_size": 2, "num_train_epochs": 3}
    lines = lines_of(given, tmp_path, video_sample_fps=5.0, **more)
    assert "epoch    3 micro-steps of 2 samples" in lines
    assert "run      7 optimizer steps of 1 micro-step, 3 epochs; 2 repeats fill up its last groups" in lines
    assert lines[-2].split() == ["4", "5", "64", "64", "32", "0.90"]  # frames 0, 2, 4, 6, 8


def test_clips_shorter_than_asked_for_are_told(given, tmp_path):
    def told(**more):
        return [line for line in lines_of(given, tmp_path, **more) if line.startswith("notice")]

    words = "the clip has fewer than {} frames at {}, and is used as it is"
    assert told(video_sample_n_frames=12) == []  # of which 9 are used, and there are 10
    assert told(video_sample_n_frames=13) == ["notice   3 entries (0, 1, 2): " + words.format(13, "stride 2")]
    by_time = told(video_sample_fps=2.0, video_sample_n_frames=5)  # 20 frames at 10 per second are 4
    assert by_time == ["notice   3 entries (0, 1, 2): " + words.format(5, "2 per second")]
    clips = Records.of(Record(i, "a", "", "video", frames, 8.0, 64, 64) for i, frames in enumerate((96, 97, 98, 1)))
    (line,) = short_clips(clips, SizeRules(video_sample_n_frames=49, video_sample_stride=2))
    assert line.startswith("2 entries (0, 1): ")  # 97 are 48 pairs; 1 is none, which the plan tells


def test_settings_without_effect_and_unlikely_ones_are_told(given, tmp_path):
    lines = lines_of(given, tmp_path, token_sample_size=32, adam_weight_decay=30)
    said = [line.partition(",")[0] for line in lines if line.startswith("notice")]
    assert said == [
        "notice   token_sample_size is 32 and training_with_video_token_length is false and random_hw_adapt is false",
        "notice   adam_weight_decay is 30",
    ]


def test_a_second_list_is_told_of_too(given, tmp_path):
    rows = json.loads((given / "metadata.json").read_text())
    lists = {"train.json": rows[:2], "val.json": [rows[2] | {"text": ""}, *rows[3:]]}
    for name, listed in lists.items():
        (tmp_path / name).write_text(json.dumps(listed))
    metas = {"train_data_meta": tmp_path / "train.json", "validation_data_meta": tmp_path / "val.json"}
    lines = lines_of(given, tmp_path, **metas, max_bad_share=0.5)
    assert f"held out 2 clips of validation_data_meta, {tmp_path / 'val.json'}" in lines
    told = [line.removeprefix("notice   ") for line in lines if line.startswith("notice")]
    assert [line.partition(": ")[0] for line in told] == ["val.json"] * 2
    assert "entry 2, gone.mp4: the file cannot be opened" in told[0] and "the caption is empty" in told[1]
    with pytest.raises(UserError, match=r"train_data_meta has 4 of its files too: .*/0\.mp4"):
        lines_of(given, tmp_path, validation_data_meta=given / "metadata.json", max_bad_share=0.5)


def test_more_workers_than_cores_are_told(given, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    told = [
        [line for line in lines_of(given, tmp_path, dataloader_num_workers=count) if line.startswith("notice")]
        for count in (2, 3)
    ]
    assert told[0] == [] and "dataloader_num_workers is 3 and this process may use 2 cores" in told[1][0]


def test_what_training_would_refuse(given, tmp_path):
    with pytest.raises(UserError, match=r"gone\.mp4"):
        lines_of(given, tmp_path, max_bad_share=0.1)
    with pytest.raises(UserError, match="it can do inpaint and i2v; set train_mode to inpaint"):
        lines_of(given, tmp_path, train_mode="control_ref")


def test_clips_that_are_all_too_short(given, tmp_path):
    clips = [{"file_path": f"{i}.mp4", "text": "a ramp", "type": "video"} for i in range(2)]
    (tmp_path / "clips.json").write_text(json.dumps(clips))
    with pytest.raises(UserError, match="nothing to train on: 2 problems") as told:
        lines_of(given, tmp_path, train_data_meta=tmp_path / "clips.json", video_sample_stride=1000)
    assert all("video_sample_stride needs at least 1000" in line for line in told.value.problems)


def test_weights_that_training_would_refuse(given, tmp_path):
    """Also those that training would only meet after the scan."""
    with pytest.raises(UserError, match="nowhere"):
        lines_of(given, tmp_path, transformer_path=given / "nowhere")
    tiny_checkpoint(tmp_path / "other", "inp", text=48)
    with pytest.raises(UserError, match="other"):  # of the same family, for another text encoder
        lines_of(given, tmp_path, transformer_path=tmp_path / "other")
    tiny_checkpoint(tmp_path / "same", "inp")
    assert lines_of(given, tmp_path, transformer_path=tmp_path / "same") == lines_of(given, tmp_path)


@pytest.mark.parametrize("part", ["vae", "text", "image"])
def test_weights_of_vae_and_encoders_that_training_would_refuse(part, given, tmp_path):
    """Cut, and without one tensor; where training reads them: from a cache and without previews it does not."""
    model = tiny_checkpoint(tmp_path, "inp")
    file = model / layout.RELEASED[part]
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    lost = list(state)[3]
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, file)
    for damaged in (file.read_bytes(), whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=file.name):
            lines_of(given, tmp_path, pretrained_model_name_or_path=model)
        flags = {"cache_folder": tmp_path / "cache", "cache_variants": 1, "preview_count": 0}
        assert lines_of(given, tmp_path, pretrained_model_name_or_path=model, **flags)


REFUSED = {  # of which weights learn, of levers beside that, and of sizes
    "trainable_modules": (["--trainable_modules", "blocks.0.", "nothing"], "nothing"),
    "trainable_modules_low_learning_rate": (["--trainable_modules_low_learning_rate", "nothing"], "nothing"),
    "blocks_to_swap": (["--blocks_to_swap=1"], "blocks 0 have weights that do not learn"),
    "more blocks than wait": (["--blocks_to_swap=2", "--trainable_modules", "blocks.1."], "set it to at most 1"),
    "rank": (["--rank=64"], "its own is 48 at most; lower rank there"),
    "twice the rank": (["--rank=32", "--lora_init=pissa"], "written in twice the rank"),
    "target_name": (["--rank=2", "--target_name", "nothing"], "nothing"),
    "train_whole": (["--rank=2", "--train_whole", "nothing"], "train_whole has 'nothing'"),
    "train_whole of few bits": (["--rank=2", "--train_whole", "ffn", "--base_weights=int8"], "needs to learn"),
    "more pixels than there is memory": (["--fix_sample_size", "99968", "99968"], "GB of pixels before anything"),
    "more pixels than FFmpeg makes": (["--fix_sample_size", "22000", "22000"], "22000 x 22000 pixels are asked of a"),
    "adapter_path": (["--rank=2", "--adapter_path=ADAPTER"], "adapter_path is "),
}


@pytest.mark.parametrize(("words", "told"), REFUSED.values(), ids=REFUSED)
def test_what_training_refuses_before_its_first_step_is_refused_in_its_words(words, told, given, tmp_path):
    layer = "diffusion_model.blocks.0.self_attn.q"
    pair = {f"{layer}.lora_A.weight": torch.ones(4, 48), f"{layer}.lora_B.weight": torch.ones(48, 4)}
    save_file(pair, tmp_path / "adapter.safetensors")
    words = [word.replace("ADAPTER", str(tmp_path / "adapter.safetensors")) for word in words]
    recipe = recipe_of_words(given, tmp_path / "out", *words, mixed_precision="no", preview_count=0)
    with pytest.raises(UserError, match=told) as checked:
        list(check(recipe))
    with pytest.raises(UserError) as trained:
        train(recipe)
    assert checked.value.problems == trained.value.problems


def test_what_is_wrong_with_both_experts_is_told_once(given, tmp_path):
    tiny_checkpoint(tmp_path / "model", "2.2_a14b_inp")
    with pytest.raises(UserError) as told:
        lines_of(given, tmp_path, pretrained_model_name_or_path=tmp_path / "model", expert="both", blocks_to_swap=1)
    (problem,) = told.value.problems
    assert problem.startswith("blocks_to_swap is 1, but of the network's 2 blocks 0 have weights")


def test_a_precision_that_this_machine_has_not_is_told(given, tmp_path, monkeypatch):
    """It is no refusal: training may be meant for another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = [line for line in lines_of(given, tmp_path, mixed_precision="fp16") if line.startswith("notice")]
    assert told == [
        "notice   mixed_precision is fp16, which needs a GPU, and there is none here: on this machine training is "
        "refused"
    ]


def test_what_clips_are_is_told(given, tmp_path):
    """HDR ones are left out; the rates of uneven ones are said, and sides at which a clip is one frame."""
    rows = json.loads((given / "metadata.json").read_text())[:3]
    slowing = [n + 3 * max(n - 9, 0) for n in range(20)]
    for name, transfer, times in (("hdr.mp4", 18, range(20)), ("uneven.mp4", 1, slowing)):
        with av.open(str(given / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            stream.codec_context.color_trc = transfer
            for n in times:
                frame = av.VideoFrame(96, 64, "yuv420p")
                frame.pts, frame.time_base = n, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        rows.append(rows[0] | {"file_path": name})
    meta = tmp_path / "told.json"
    meta.write_text(json.dumps(rows))
    sizes = {"image_sample_size": 192, "random_hw_adapt": True, "training_with_video_token_length": True}
    lines = lines_of(given, tmp_path, train_data_meta=meta, token_sample_size=64, **sizes)
    assert "entry 3, hdr.mp4: the file is HDR (HLG), and would be read in false colours. Write it as SDR" in lines[3]
    notices = [line for line in lines if line.startswith("notice")]
    assert "1 entry (4): its frames are unevenly spaced in time, at 2 to 10 a second" in notices[0]
    assert any("at side 192 the token budget leaves one frame" in notice for notice in notices)


def test_all_that_does_not_suit_the_model_is_told_at_once(given, tmp_path):
    size = "--fix_sample_size", "50", "70"
    with pytest.raises(UserError) as error:
        more = {"loss_type": "ddpm", "add_full_ref_image_in_self_attention": True}
        lines_of(given, tmp_path, *size, train_mode="control_ref", video_sample_n_frames=4, **more)
    assert [problem.split(" is ")[0] for problem in error.value.problems] == [
        "train_mode",
        "loss_type",
        "video_sample_n_frames",
        "fix_sample_size",
        "add_full_ref_image_in_self_attention",
    ]
    assert "takes multiples of 16; set it to 48 64" in error.value.problems[3]
    assert lines_of(given, tmp_path, "--fix_sample_size", "48", "64")[-1].split()[2:4] == ["48", "64"]


def test_what_training_reads_before_its_first_step_is_looked_at_too(given, tmp_path):
    """All at once: files that are not there, of a prompt and an adapter; a kind that the mode has no control of."""
    prompt = ["--validation_prompts=a ramp", "--validation_paths=/nope.png"]
    with pytest.raises(UserError) as told:
        lines_of(given, tmp_path, *prompt, rank=2, adapter_path="/nope", control_kind="canny")
    assert [problem.split(" ")[0] for problem in told.value.problems] == ["control_kind", "/nope.png", "adapter_path"]
    assert "adapter_path is '/nope': is missing" in told.value.problems[-1]
