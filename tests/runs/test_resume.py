"""A killed run, resumed, ends in the same bits as an unbroken one."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reeltune.checkpoint.folder import complete, progress_of
from reeltune.core.errors import UserError
from reeltune.core.rng import dice
from reeltune.core.types import Progress
from reeltune.run.lock import locked
from reeltune.training.loop import train
from tests.distributed.processes import FORKS, NAP_SECONDS, changes, wait
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.faults import flip
from tests.runs.same_run import StopAfter, assert_same_end, rows, same_checkpoint
from tests.runs.small_run import measured, recipe

MODES = {  # train mode -> the checkpoint it is run on, and settings that go with it
    "control_ref": ("control_v1.1", {"control_ref_image": "random", "add_full_ref_image_in_self_attention": True}),
    "control": ("control_v1.0", {}),
    "control_ref_camera": ("control_camera", {}),
    "inpaint": ("inp", {}),
    "i2v": ("inp", {}),
    "toy": ("toy", {}),
    "adapter": ("control_v1.1", {"train_mode": "control_ref", "rank": 4, "use_ema": True}),
    "both experts": ("2.2_a14b_t2v", {"train_mode": "normal", "expert": "both", "rank": 4, "use_ema": True}),
    "adapter of toy": ("toy", {"train_mode": None, "rank": 4, "target_name": ["text"], "train_whole": ["head"]}),
}
WORKERS = dict(zip(MODES, (3, 1, 0, 3, 1, 0, 1, 1, 0), strict=True))  # reading processes of the run that is killed
BEFORE_THE_ROOMS = Path(__file__).parent / "before_the_rooms"
"""A run of the toy family, written by the code of 2026-11-26 before its files moved into rooms (torch 2.13, CPU)."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for variant in {variant for variant, _ in MODES.values()}:
        if variant == "toy":
            (folder / "toy").mkdir()
            (folder / "toy" / "toy.json").write_text("{}")
        else:
            tiny_checkpoint(folder / variant, variant)
    return folder


def settings_of(mode, **changes):
    _, more = MODES[mode]
    return {"train_mode": None if mode == "toy" else mode, **more, **changes}


def run(settings, *where):
    torch.set_num_threads(1)
    return train(recipe(*where, **settings))


def child(settings, *where):
    os.setpgrp()  # so that a kill takes its reading processes with it
    raise SystemExit(run(settings, *where))


def run_and_kill(when, settings, *where, nap_seconds=0.0005):
    """Runs in a process of its own, until `when(output folder)` is true; then SIGKILL."""
    process = FORKS.Process(target=child, args=(settings, *where))
    process.start()
    assert wait(lambda: not process.is_alive() or when(where[-1]), lambda: changes(where[-1]), nap_seconds=nap_seconds)
    killed = process.is_alive()
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return killed


def after_a_step(out):
    """The first step's line is on the disk, so the second is under way."""
    path = out / "metrics.jsonl"
    return path.is_file() and '"kind": "step"' in path.read_text()


def in_a_save(step):
    return lambda out: (out / f".checkpoint-{step}.partial").exists()


@pytest.fixture(scope="module")
def unbroken(data, checkpoints, tmp_path_factory):
    """mode, settings -> the folder of a run that nothing disturbed; made once."""
    made = {}

    def get(mode, **changes):
        key = (mode, *sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("unbroken") / "run"
            assert run(settings_of(mode, **changes), checkpoints / MODES[mode][0], data, out) == 0
            made[key] = out
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_a_random_moment(mode, data, checkpoints, unbroken, tmp_path):
    where = checkpoints / MODES[mode][0], data, tmp_path / "run"
    extra = dice(7, "kill", mode).uniform(0, 0.02 if "toy" in mode else 0.5)  # seconds

    def moment(out):
        if after_a_step(out):
            time.sleep(extra)
            return True
        return False

    nap_seconds = 0.0005 if "toy" in mode else NAP_SECONDS
    run_and_kill(moment, settings_of(mode, dataloader_num_workers=WORKERS[mode]), *where, nap_seconds=nap_seconds)
    assert run(settings_of(mode, resume_from_checkpoint="latest"), *where) == 0
    assert_same_end(tmp_path / "run", unbroken(mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["toy", "adapter of toy"])
@pytest.mark.parametrize("step", [2, 4])
def test_killed_within_a_save(step, mode, data, checkpoints, unbroken, tmp_path):
    where = checkpoints / "toy", data, tmp_path / "run"
    assert run_and_kill(in_a_save(step), settings_of(mode), *where)
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-2"][: step // 4]
    assert run(settings_of(mode, resume_from_checkpoint="latest"), *where) == 0
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert_same_end(tmp_path / "run", unbroken(mode))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers, data, checkpoints, unbroken, tmp_path):
    where = checkpoints / "toy", data, tmp_path / "run"
    settings = settings_of("toy", dataloader_num_workers=workers)
    run_and_kill(in_a_save(4), settings, *where)
    assert run({**settings, "resume_from_checkpoint": "latest"}, *where) == 0
    assert_same_end(tmp_path / "run", unbroken("toy"))


OF_A_STEP = (  # each changes what a step does, and not how a run goes on
    {"use_ema": True, "ema_decay": 0.9},
    {"use_came": True},
    {"use_prodigy": True, "learning_rate": 1.0, "use_ema": True},
    {"use_muon": True},
    {"max_grad_norm": None, "step_in_backward": True, "use_adafactor": True},
    {"mixed_precision": "bf16"},
)


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_weights": "bf16_stochastic", "mixed_precision": "bf16"},
        {"step_in_backward": True, "trained_weights": "bf16_stochastic", "mixed_precision": "bf16", "use_ema": True},
        {"offload_activations": True, "gradient_checkpointing": True, "gradient_checkpointing_share": 0.5},
        {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"uniform_sampling": True, "motion_sub_loss": True, "random_frame_crop": True},
        *(pytest.param(changes, marks=pytest.mark.slow) for changes in OF_A_STEP),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_in_two_parts_is_the_run(changes, data, checkpoints, unbroken, tmp_path):
    where = checkpoints / "toy", data, tmp_path / "run"
    with StopAfter(3):
        assert run(settings_of("toy", checkpointing_steps=100, **changes), *where) == 128 + signal.SIGTERM
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-3"]
    assert run(settings_of("toy", checkpointing_steps=100, resume_from_checkpoint="latest", **changes), *where) == 0
    assert_same_end(tmp_path / "run", unbroken("toy", checkpointing_steps=100, **changes))


def test_a_second_run_in_the_same_folder_is_refused(data, checkpoints, unbroken):
    out = unbroken("toy")
    with pytest.raises(UserError, match="already holds checkpoint-6"):
        run(settings_of("toy"), checkpoints / "toy", data, out)


def test_latest_of_nothing_starts_anew_with_a_notice(data, checkpoints, tmp_path):
    out = tmp_path / "run"
    settings = settings_of("toy", resume_from_checkpoint="latest", max_train_steps=1)
    assert run(settings, checkpoints / "toy", data, out) == 0
    assert "a new run starts" in (out / "metrics.jsonl").read_text()


def test_what_would_change_the_samples_is_refused_and_other_changes_are_told(data, checkpoints, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken("toy"), out)
    where = checkpoints / "toy", data, out
    more = {"resume_from_checkpoint": "latest", "max_train_steps": 7}
    with pytest.raises(UserError) as error:
        run(settings_of("toy", **more, seed=1, video_sample_size=48), *where)
    assert sorted(line.split(" ")[0] for line in error.value.problems) == ["seed", "video_sample_size"]
    with pytest.raises(UserError, match="no optimizer can go on with the state of another"):
        run(settings_of("toy", **more, use_muon=True), *where)
    with pytest.raises(UserError, match="started with other held-out levels than now"):  # before it trains
        run(settings_of("toy", **more, held_out_levels=5), *where)
    assert not (out / "checkpoint-7").exists()
    assert run(settings_of("toy", **more, learning_rate=1e-4), *where) == 0
    assert "resume_from_checkpoint: null" in (out / "recipe.yaml").read_text()  # it begins the run anew
    assert "learning_rate was 0.001 and is 0.0001" in (out / "metrics.jsonl").read_text()
    assert "nothing is left to train" not in (out / "metrics.jsonl").read_text()
    assert run(settings_of("toy", **{**more, "max_train_steps": 1}), *where) == 0
    assert "it is of step 7, and the run is to have 1: nothing is left to train" in (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("place", ["", "set_aside"])
def test_a_run_of_another_mode_is_not_gone_on_with(place, data, checkpoints, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken("toy"), out)
    (out / "set_aside").mkdir()
    last = (out / "checkpoint-6").rename(out / place / "checkpoint-6")
    settings = settings_of("toy", resume_from_checkpoint=str(last), max_train_steps=7) | {"train_mode": "normal"}
    with pytest.raises(UserError, match=r"mode was control and is normal"):
        run(settings, checkpoints / "toy", data, out)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_with_other_micro_steps_in_a_step_it_ends_with_its_epochs(before, after, data, checkpoints, unbroken, tmp_path):
    epochs, where = {"num_train_epochs": 4, "checkpointing_steps": 100}, (checkpoints / "toy", data, tmp_path / "run")
    begun = settings_of("toy", **epochs, gradient_accumulation_steps=before, max_train_steps=4 // before)
    assert run(begun, *where) == 0
    more = {"gradient_accumulation_steps": after, "max_train_steps": None, "resume_from_checkpoint": "latest"}
    assert run(settings_of("toy", **epochs, **more), *where) == 0
    whole = unbroken("toy", **epochs, max_train_steps=None)
    assert (tmp_path / "run/ledger.csv").read_text() == (whole / "ledger.csv").read_text()


def test_in_another_folder_it_is_compared_with_the_weights_that_it_began_with_there(
    data, checkpoints, unbroken, tmp_path
):
    """And not with what is there of a run that left no checkpoint."""
    out, settings = tmp_path / "other", settings_of("toy", resume_from_checkpoint=str(unbroken("toy") / "checkpoint-4"))
    shutil.copytree(unbroken("toy"), out, ignore=shutil.ignore_patterns("checkpoint-*"))
    assert run(settings, checkpoints / "toy", data, out) == 0
    assert [row["step"] for row in rows(out, ["step"])] == [5, 6]
    found = rows(out, ["validation"])
    assert [(row["step"], row["start_step"]) for row in found] == [(4, 4), (6, 4)]
    assert found[0]["difference"] == 0 and found[1]["difference"] != 0
    with pytest.raises(UserError, match=r"has checkpoint-6 of its own; go on from that with latest"):
        run(settings, checkpoints / "toy", data, out)
    shutil.rmtree(out / "checkpoint-6")  # as if it had been killed before
    with pytest.raises(UserError, match=r"no complete checkpoint yet; its run went on from .*checkpoint-4: give that"):
        run(settings_of("toy", resume_from_checkpoint="latest"), checkpoints / "toy", data, out)


def stopped_at_2(checkpoints, data, out, **changes):
    settings = settings_of("toy", max_train_steps=2, **changes)
    assert run(settings, checkpoints / "toy", data, out) == 0
    return settings_of("toy", resume_from_checkpoint="latest", **changes)


def notices(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines if line["kind"] == "notice"]


def test_a_flipped_bit_is_noticed_before_a_step_is_taken(checkpoints, data, tmp_path):
    more = stopped_at_2(checkpoints, data, tmp_path / "run")
    flip(tmp_path / "run/checkpoint-2/transformer/diffusion_pytorch_model.safetensors", 0.7)
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged.*\n.*safetensors has other bytes"):
        run(more, checkpoints / "toy", data, tmp_path / "run")


@pytest.mark.parametrize("given", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_flipped_bit_is_noticed_in_weights_that_a_run_begins_with(given, checkpoints, data, tmp_path):
    stopped_at_2(checkpoints, data, tmp_path / "run")
    kept = tmp_path / "run/checkpoint-2"
    (kept / "optimizer.pt").unlink()  # of no use here, and large
    begun = settings_of("toy", max_train_steps=1, transformer_path=str(kept / given))
    assert run(begun, checkpoints / "toy", data, tmp_path / "sound") == 0
    flip(kept / "transformer/diffusion_pytorch_model.safetensors", 0.7)
    with pytest.raises(UserError, match=r"checkpoint-2 is damaged.*\n.*safetensors has other bytes"):
        run(begun, checkpoints / "toy", data, tmp_path / "other")


@pytest.mark.slow
def test_a_list_in_another_order_is_refused_and_a_longer_one_only_if_that_is_said(checkpoints, data, tmp_path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    rows, meta = json.loads((own / "metadata_control.json").read_text()), own / "metadata_control.json"
    meta.write_text(json.dumps(rows[:-1]))
    more = stopped_at_2(checkpoints, own, tmp_path / "run")
    meta.write_text(json.dumps([rows[1], rows[0], *rows[2:-1]]))
    with pytest.raises(UserError, match=r"in another place of the list: entry 0 \(1\.mp4\), entry 1 \(0\.mp4\)"):
        run(more, checkpoints / "toy", own, tmp_path / "run")
    meta.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="set accept_changed_data"):
        run(more, checkpoints / "toy", own, tmp_path / "run")
    assert run({**more, "accept_changed_data": True}, checkpoints / "toy", own, tmp_path / "run") == 0
    assert any("new: entry 8 (8.png)" in text for text in notices(tmp_path / "run"))
    summary = json.loads((tmp_path / "run/ledger.json").read_text())
    assert summary["entries"] == 9 and summary["samples"] == 6 * 2  # of both parts


def test_going_back_sets_later_checkpoints_aside(checkpoints, data, unbroken, tmp_path):
    """Also those that are links to another disk, which lead there as before."""
    out = tmp_path / "run"
    shutil.copytree(unbroken("toy"), out)
    (tmp_path / "disk").mkdir()
    for name, leads in (("checkpoint-2", tmp_path / "disk"), ("checkpoint-6", Path("../disk"))):
        (out / name).rename(tmp_path / "disk" / name)
        (out / name).symlink_to(leads / name)
    more = settings_of("toy", resume_from_checkpoint="checkpoint-2", max_train_steps=3, checkpoints_total_limit=1)
    assert run(more, checkpoints / "toy", data, out) == 0
    assert [path.name for path in complete(out)] == ["checkpoint-3"]
    assert sorted(path.name for path in (out / "set_aside").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert all((path / "progress.json").is_file() for path in (out / "set_aside").iterdir())
    assert sum("set_aside" in text for text in notices(out)) == 2


def test_other_tools_checkpoints_are_named_with_the_way_on(checkpoints, data, tmp_path):
    theirs = tmp_path / "run/checkpoint-50/transformer"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    for resume in (None, "latest"):
        with pytest.raises(UserError, match=rf"checkpoint-50 of another tool.*transformer_path {theirs}"):
            run(settings_of("toy", resume_from_checkpoint=resume), checkpoints / "toy", data, tmp_path / "run")
    assert [path.name for path in theirs.iterdir()] == ["config.json"]


def test_a_second_run_at_the_same_time_is_refused(checkpoints, data, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(UserError, match=f"another run, process {os.getpid()} on "):
        run(settings_of("toy"), checkpoints / "toy", data, tmp_path / "run")


def test_a_cursor_beyond_its_epoch_is_refused(checkpoints, data, tmp_path):
    more = stopped_at_2(checkpoints, data, tmp_path / "run")
    path = tmp_path / "run/checkpoint-2"
    (path / "progress.json").write_text(json.dumps({"step": 2, "epoch": 0, "cursor": 9999, "group": 2}))
    (path / "digests.json").unlink()  # or it would have been noticed before
    with pytest.raises(UserError, match="cursor 9999, and epoch 0 has"):
        run(more, checkpoints / "toy", data, tmp_path / "run")


def test_a_checkpoint_from_before_the_rooms_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Each of its epochs fills up its own groups, and it goes on so."""
    shutil.copytree(BEFORE_THE_ROOMS, tmp_path, dirs_exist_ok=True)
    before, resumed, data = tmp_path / "run", tmp_path / "resumed", measured(tmp_path / "data")
    accounted = before / "ledger.csv"
    accounted.write_text(accounted.read_text().replace("data/", f"{data}/"))
    shutil.copytree(before, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "ledger.json", "ledger.csv"))

    def run_to_4(out, **more):
        settings = {"max_train_steps": 4, "lr_scheduler": "cosine", **more}
        assert run(settings, tmp_path / "toy", data, out) == 0

    with monkeypatch.context() as then:
        then.setattr("reeltune.training.loop.Progress", partial(Progress, plan_version=0))
        run_to_4(tmp_path / "anew")
    run_to_4(resumed, resume_from_checkpoint=str(resumed / "checkpoint-2"))
    if same_checkpoint(tmp_path / "anew" / "checkpoint-2", before / "checkpoint-2"):  # CPUs differ in the last bits
        assert_same_end(resumed, before, 4)
    else:
        assert_near_end(resumed, before, 4)


def assert_near_end(ours: Path, theirs: Path, step: int, atol: float = 1e-6) -> None:
    """As assert_same_end, but numbers that a network made are within atol."""
    a, b = ours / f"checkpoint-{step}", theirs / f"checkpoint-{step}"
    for path in a.glob("transformer*/*.safetensors"):
        torch.testing.assert_close(load_file(path), load_file(b / path.relative_to(a)), rtol=0, atol=atol)
    assert progress_of(a) == progress_of(b)
    for name in ("ledger.json", "ledger.csv"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    made = {"loss", "grad_norm"}
    for one, two in zip(rows(ours, ["step"]), rows(theirs, ["step"]), strict=True):
        assert {**one, **dict.fromkeys(made)} == {**two, **dict.fromkeys(made)}
        assert [one[name] for name in made] == pytest.approx([two[name] for name in made], rel=0, abs=atol)
