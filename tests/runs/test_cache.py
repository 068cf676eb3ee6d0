"""The cache: the same bits as live, whatever kills a process that writes it; never a stale or a held-out entry."""

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from reeltune import cli, families
from reeltune.cache import entries, fill, maintenance, store
from reeltune.cache.keys import Keys
from reeltune.config.parse import dump
from reeltune.core.errors import UserError
from reeltune.core.rng import dice
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.data import loader
from reeltune.data.media import MediaError
from reeltune.families.spec import Parts
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training.loop import train
from tests.distributed.processes import changes, wait
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs import fill_slowly
from tests.runs.same_run import assert_same_end, rows
from tests.runs.small_run import data_set, recipe

STEPS = 4
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["reeltune.cache.fill", *families.MODULES.values()])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.json").write_text("{}")
    return folder


@pytest.fixture
def run(data, index, toy, tmp_path):
    """A recipe whose folder is new, and whose data is measured once for all tests."""

    def make(name, model=toy, data=data, **changes):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        if not (out / "index").is_symlink():
            (out / "index").symlink_to(index)
        settings = {"max_train_steps": STEPS, "checkpointing_steps": 100, "cache_variants": 2, "text_drop_ratio": 0.4}
        return recipe(model, data, out, **settings | changes)

    return make


def cached(given, folder):
    return replace(given, cache=replace(given.cache, cache_folder=str(folder)))


def never(*_):
    raise AssertionError("a frozen network was read")


# ---- the same bits


def test_a_run_from_the_cache_is_the_live_run(pair, run, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    (tmp_path / "model").mkdir()
    model = pair.lay_out(tmp_path / "model")
    changes = {"train_mode": pair.mode}
    if "full_ref" in families.find(model).drop and pair.mode == "control_ref":
        changes |= {"control_ref_image": "random", "add_full_ref_image_in_self_attention": True}
    live = run("live", model, **changes)
    assert train(live) == 0
    from_cache = cached(run("cached", model, **changes), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    monkeypatch.setattr(Parts, "_read", never)
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)
    assert len({row["loss"] for row in rows(tmp_path / "live", ("step",))}) == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"random_frame_crop": True, "random_hw_adapt": True, "image_sample_size": 48, "cache_variants": 4},
        {"use_ema": True, "ema_decay": 0.9, "seed": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_with_other_settings_too(changes, run, tmp_path):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    assert train(run("live", model, **changes)) == 0
    from_cache = cached(run("cached", model, dataloader_num_workers=2, **changes), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)


def test_a_live_run_goes_on_from_the_cache(run, tmp_path):
    assert train(run("live")) == 0
    assert train(run("half", max_train_steps=3)) == 0
    rest = cached(run("half", resume_from_checkpoint="latest"), tmp_path / "cache")
    assert fill.fill(rest) == 0
    assert train(rest) == 0
    assert_same_end(tmp_path / "half", tmp_path / "live", STEPS)


def test_other_seeds_share_a_cache(run, tmp_path, capfd):
    assert fill.fill(cached(run("a"), tmp_path / "cache")) == 0
    assert fill.fill(cached(run("b", seed=1), tmp_path / "cache")) == 0
    assert written(capfd)[-1] == 0


def test_files_that_cannot_be_read_have_the_same_stand_ins(run, tmp_path, monkeypatch):
    def read(path, *how, real=loader.read_frames):
        if Path(path).name == "3.mp4":
            raise MediaError("is damaged at 0.12 s")
        return real(path, *how)

    monkeypatch.setattr(loader, "read_frames", read)
    whole = {"held_out_share": 0, "max_bad_share": 0.5}
    assert train(run("live", **whole)) == 0
    from_cache = cached(run("cached", **whole), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)
    assert json.loads((tmp_path / "live/ledger.json").read_text())["failed_reads"] > 0
    maintenance.prune(from_cache)  # which does not forget that they cannot be read
    assert "2 of files that cannot be read" in maintenance.verify(from_cache)


def test_held_out_previews_come_from_the_cache_and_read_the_decoder_alone(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_v1.0")
    previews = {"preview_count": 1, "preview_steps": 2, "max_train_steps": 1}
    assert train(run("live", model, **previews)) == 0
    from_cache = cached(run("cached", model, **previews), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    read = []
    monkeypatch.setattr(Parts, "_read", lambda parts, name, real=Parts._read: (read.append(name), real(parts, name)))
    assert train(from_cache) == 0
    assert read == ["vae"]
    for name in ("step-1/0.mp4", "truth/0.mp4", "control/0.mp4"):
        assert (tmp_path / "cached/previews" / name).read_bytes() == (tmp_path / "live/previews" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "cached/first_batch").iterdir()) == sorted(
        path.name for path in (tmp_path / "live/first_batch").iterdir()
    )


def test_filling_reads_no_weights_of_the_trained_network(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_v1.1")
    places = []

    def noted(*given, real=fill.load_parts, **how):
        parts = real(*given, **how)
        places.append({weight.device.type for weight in parts.net.parameters()})
        return parts

    monkeypatch.setattr(fill, "load_parts", noted)
    assert fill.fill(cached(run("a", model), tmp_path / "cache")) == 0
    assert places == [{"meta"}]


# ---- what is encoded again


def written(capfd) -> list[int]:
    """Entries written by each `fill` since the last call."""
    return [int(count) for count in re.findall(r": (\d+) entries written", capfd.readouterr().err)]


@pytest.fixture
def own_data(tmp_path):
    return data_set(tmp_path / "data", clips=4, stills=1)


def edit(data, entry, **changes):
    path = data / "metadata_control.json"
    listed = json.loads(path.read_text())
    listed[entry] |= changes
    path.write_text(json.dumps(listed))


def test_only_what_changed_is_encoded_again(run, own_data, tmp_path, capfd):
    given = cached(run("run", data=own_data, held_out_share=0), tmp_path / "cache")
    fill.fill(given)
    assert written(capfd) == [1 + 5 + 4 * 2 + 1]  # the empty caption, captions, clips in two windows, the still
    fill.fill(given)
    edit(own_data, 1, text="another thing")
    with pytest.raises(UserError, match=r"lacks 2 of 10 readings of clips, the first of .*/1\.mp4; run reeltune cache"):
        train(given)
    fill.fill(given)
    os.utime(own_data / "train/2.mp4", (1, 1))
    fill.fill(given)
    os.utime(own_data / "control/0.mp4", (1, 1))
    fill.fill(given)
    fill.fill(replace(given, cache=replace(given.cache, cache_variants=3)))
    assert written(capfd) == [0, 1, 2, 2, 4]
    assert train(given) == 0


def test_another_way_of_encoding_is_another_cache_and_told(run, tmp_path, capfd):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    other = replace(given, training=replace(given.training, mixed_precision="bf16"))
    with pytest.raises(UserError) as error:
        train(other)
    assert error.value.problems[1:] == ["it was made with mixed_precision no, which now is bf16"]


def test_what_was_found_complete_is_not_looked_at_again_until_something_changes(run, own_data, tmp_path, monkeypatch):
    given = cached(run("run", data=own_data, held_out_share=0, max_train_steps=1), tmp_path / "cache")
    looked, real = [], entries.items_of
    fill.fill(given)
    monkeypatch.setattr(entries, "items_of", lambda *of: looked.append(of) or real(*of))

    def again(given=given) -> int:
        looked.clear()
        family, mode, _ = choose_family(given)
        entries.open_cache(given, family, mode, gather(given, family, mode, show_progress=False))
        return len(looked)

    assert [again(), again()] == [1, 0]
    assert again(replace(given, cache=replace(given.cache, cache_variants=1))) == 1
    os.utime(own_data / "train/2.mp4", (1, 1))
    with pytest.raises(UserError, match="lacks"):
        again()
    fill.fill(given)
    assert [again(), again()] == [1, 0]
    next((tmp_path / "cache/shards").glob("*")).unlink()
    with pytest.raises(UserError, match="lacks"):
        again()


def test_other_weights_of_an_encoder_are_told(run, tmp_path):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    given = cached(run("run", model), tmp_path / "cache")
    fill.fill(given)
    same = tiny_checkpoint(tmp_path / "same", "control_t2v")
    moved = replace(given, model=replace(given.model, pretrained_model_name_or_path=str(same)))
    assert train(moved) == 0  # known by their bytes, wherever they lie
    vae = model / "Wan2.1_VAE.pth"
    weights = torch.load(vae, weights_only=True)
    next(iter(weights.values())).view(-1)[0] += 1
    torch.save(weights, vae)
    with pytest.raises(UserError, match="it was made with vae "):
        train(cached(run("again", model), tmp_path / "cache"))


def test_held_out_clips_are_never_trained_on(run, tmp_path):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    family, mode, _ = choose_family(given)
    inputs, keys = gather(given, family, mode, show_progress=False), entries.keys_of(given, family, mode)
    by_split = {split: set() for split in ("train", "held_out")}
    for item in entries.items_of(keys, inputs):
        by_split[item.split].add(item.clip)
    held = store.Store(tmp_path / "cache")
    assert by_split["held_out"] and not by_split["train"] & by_split["held_out"]
    assert all(held.entries[key][1] == split for split, found in by_split.items() for key in found)
    for key in by_split["held_out"]:
        with pytest.raises(UserError, match="was written for held_out and is asked for train"):
            held.read(key, "train")
    record, draw = inputs.held_out[0], entries.ways(inputs, inputs.plan(0), "held_out", 0)[0]
    with pytest.raises(UserError, match="is not in the cache"):  # the very reading that is there, but held out
        entries.View(held, keys, "train")(record, draw, {})
    with pytest.raises(UserError, match="lacks"):
        train(replace(given, data=replace(given.data, held_out_share=0.0)))


# ---- kills, full disks, many processes


def started(given, world):
    processes = [PROCESSES.Process(target=fill_slowly.run, args=(given, rank, world)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def stepped_on(folder, there, processes):
    """There is another shard, or there will be none."""
    return len(list(folder.glob("shards/*"))) > there or not any(process.is_alive() for process in processes)


def contents(folder):
    held = store.Store(folder)
    return {key: held.read(key, split) for key, (_, split) in held.entries.items()}


def assert_same_contents(folder, other, *, part=False):
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() <= theirs.keys() if part else ours.keys() == theirs.keys()
    for key, tensors in ours.items():
        assert tensors.keys() == theirs[key].keys()
        assert all(torch.equal(tensors[name], theirs[key][name]) for name in tensors)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(run, tmp_path):
    """Processes that share the work are killed again and again; what they left is whole, and is not made again."""
    whole = cached(run("whole"), tmp_path / "whole_cache")
    fill.fill(whole)
    cache, there = tmp_path / "cache", 0
    given = cached(run("killed"), cache)
    for attempt, world in enumerate((3, 1, 2)):
        processes = started(given, world)
        assert wait(partial(stepped_on, cache, there, processes), lambda: changes(cache))
        time.sleep(dice(attempt, "kill").uniform(0, 0.02))
        for process in processes:
            process.kill()
            process.join()
        assert_same_contents(tmp_path / "cache", tmp_path / "whole_cache", part=True)
        there = len(store.Store(tmp_path / "cache").entries)
    processes = started(given, 2)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert_same_contents(tmp_path / "cache", tmp_path / "whole_cache")
    names = [key for shard in store.read_manifest(tmp_path / "cache").shards.values() for key in shard.entries]
    assert len(names) == len(set(names))


def test_shares_are_disjoint_and_whole(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert fill.fill(given) == 0
    assert not torch.distributed.is_initialized()
    counts = written(capfd)
    assert min(counts) > 0 and sum(counts) == len(store.Store(tmp_path / "cache").entries)
    assert "all whole" in maintenance.verify(given)


def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")
    monkeypatch.setattr(fill, "Writer", lambda folder, facts: store.Writer(folder, facts, shard_bytes=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # bytes of a file: captions fit, clips do not
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\); nothing in it is lost: make room"):
            fill.fill(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = contents(tmp_path / "cache")
    assert before and not list((tmp_path / "cache/shards").glob(".*"))
    fill.fill(given)
    after = contents(tmp_path / "cache")
    assert written(capfd)[-1] == len(after) - len(before) > 0
    assert all(torch.equal(tensor, after[key][name]) for key, held in before.items() for name, tensor in held.items())


def test_a_line_cut_short_is_no_line(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")
    monkeypatch.setattr(fill, "Writer", lambda folder, facts: store.Writer(folder, facts, shard_bytes=1))
    fill.fill(given)
    (part,) = store.parts(tmp_path / "cache")
    text = part.read_text()
    part.write_text(text[:-9])
    fill.fill(given)
    assert written(capfd)[1:] == [1]
    part.write_text(text[:300] + "\n" + text[300:])
    with pytest.raises(UserError, match=r"line \d of .*/00001\.jsonl is damaged"):
        train(given)


@pytest.mark.parametrize(
    ("there", "instead"), [(b'"shard"', b'"shbrd"'), (b'"facts"', b'"f\xffcts"'), (b'{"format"', b'[1]\n{"format"')]
)
def test_a_damaged_manifest_is_told(there, instead, tmp_path):
    for key in ("a", "b"):  # a manifest each
        writer = store.Writer(tmp_path, {"how": 1})
        writer.add(key, "text", {"cond.text": torch.ones(1, 2)})
        writer.close()
    for part in store.parts(tmp_path):
        part.write_bytes(part.read_bytes().replace(there, instead))
    with pytest.raises(UserError) as error:
        store.Store(tmp_path)
    told = "\n".join(error.value.problems)
    assert re.findall(r"line \d of .*/0000(\d)\.jsonl is damaged", told) == ["1", "2"]


def test_an_error_keeps_what_was_made(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")

    def fail(encoder, batch, real=fill.Encoder._clip, left=[5]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real(encoder, batch)

    monkeypatch.setattr(fill.Encoder, "_clip", fail)
    with pytest.raises(torch.OutOfMemoryError):
        fill.fill(given)
    held = store.Store(tmp_path / "cache")
    assert [split for _, split in held.entries.values()].count("train") == 4
    monkeypatch.undo()
    fill.fill(given)
    assert written(capfd) == [len(store.Store(tmp_path / "cache").entries) - len(held.entries)]


def test_a_cache_that_cannot_be_written_is_read(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    given = cached(run("run", model, max_train_steps=1), tmp_path / "cache")
    fill.fill(given)
    (tmp_path / "cache/fingerprints.json").unlink()

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("reeltune.cache.entries.whole_file", refuse)
    monkeypatch.setattr("reeltune.cache.keys.whole_file", refuse)
    assert train(given) == 0
    assert not (tmp_path / "cache/complete").exists()


def test_a_stop_keeps_what_was_made(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")

    def stop(writer, *entry, real=store.Writer.add):
        real(writer, *entry)
        if len(writer._entries) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(store.Writer, "add", stop)
    assert fill.fill(given) == 128 + signal.SIGTERM
    monkeypatch.undo()
    fill.fill(given)
    first, rest = written(capfd)
    assert first == 7 and rest == len(store.Store(tmp_path / "cache").entries) - 7


# ---- care


def test_verify_finds_a_changed_bit(run, tmp_path, capfd):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    assert "all whole" in maintenance.verify(given)
    (shard,) = (tmp_path / "cache/shards").glob("*")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert train(given) == 0  # which reads lengths alone
    with pytest.raises(UserError, match="is not as it was written"):
        maintenance.verify(given)
    with pytest.raises(UserError, match="lacks"):
        train(cached(run("again"), tmp_path / "cache"))
    fill.fill(given)
    assert "all whole" in maintenance.verify(given)


def test_prune_keeps_what_the_recipe_asks_for(run, tmp_path):
    many = cached(run("many", cache_variants=3), tmp_path / "cache")
    fill.fill(many)
    (tmp_path / "cache/shards/00009-00001.safetensors").write_bytes(b"left by a kill")
    few = cached(run("few", cache_variants=1), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    maintenance.prune(few)
    after = contents(tmp_path / "cache")
    _, asked = maintenance._asked_for(few)
    assert after.keys() == asked < before.keys()
    assert all(torch.equal(tensor, before[key][name]) for key, held in after.items() for name, tensor in held.items())
    assert len(list((tmp_path / "cache/shards").glob("*"))) == len(list((tmp_path / "cache/manifest").glob("*"))) == 1
    assert "all whole" in maintenance.verify(few)
    assert train(run("live", cache_variants=1)) == 0 == train(few)
    assert_same_end(tmp_path / "few", tmp_path / "live", STEPS)


def test_prune_waits_for_no_writer(run, tmp_path):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    writer = store.Writer(tmp_path / "cache", {}, shard_bytes=1)
    writer.add("key", "text", {"cond.text": torch.ones(1, 2)})
    writer.flush()
    other = store.Writer(tmp_path / "cache", {})  # writers wait for none either
    other.add("other", "text", {"cond.text": torch.ones(1, 2)})
    other.close()
    with pytest.raises(UserError, match="a process is writing"):
        maintenance.prune(given)
    writer.close()
    maintenance.prune(given)
    assert "key" not in store.Store(tmp_path / "cache").entries


# ---- numbers


def test_packing_is_exact():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(64, generator=generator)
    for given, stored in (
        (full, torch.float32),
        (full.bfloat16().float(), torch.bfloat16),
        (full.half().float(), torch.float16),
        (torch.tensor([-torch.inf, 0.0, -0.0]), torch.bfloat16),
        (torch.tensor([torch.nan]).view(torch.int32).add(1).view(torch.float32), torch.float32),
        (torch.tensor([1e-45, 3e38]), torch.float32),
        (torch.arange(5), torch.int64),
        (torch.tensor([True, False]), torch.bool),
    ):
        packed = store.pack(given)
        assert packed.dtype == stored and packed.data_ptr() != given.data_ptr()
        back = store.unpack(packed)
        assert back.dtype == given.dtype
        assert back.numpy().tobytes() == given.numpy().tobytes()


def test_shards_are_bounded(tmp_path):
    writer = store.Writer(tmp_path, {"how": 1}, shard_bytes=1000)
    entries = {f"{i:02}": {"x0.mean": torch.full((1, 60), 1 / 3 + i)} for i in range(10)}  # 240 bytes each
    for key, tensors in entries.items():
        writer.add(key, "train", tensors)
    writer.close()
    shards = store.read_manifest(tmp_path).shards.values()
    assert [len(shard.entries) for shard in shards] == [4, 4, 2]
    assert [shard.bytes for shard in shards] == [(tmp_path / "shards" / shard.name).stat().st_size for shard in shards]
    held = store.Store(tmp_path)
    assert all(torch.equal(held.read(key, "train")["x0.mean"], entries[key]["x0.mean"]) for key in entries)


def test_an_entry_is_known_by_all_that_it_is_made_of(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, (9, 9))
    paths = {name: str(tmp_path / f"{name}.mp4") for name in "abc"}
    record = Record(0, paths["a"], "a", "video", 9, 8.0, 64, 64, control_path=paths["b"])
    draw = Draw(0, Shape(5, 32, 32), Crop(32, 32, 0, 0), (0, 1, 2, 3, 4), ref_frame=0, seed=1, variant_seed=2)
    of_masks, plain = (Keys({"how": 1}, str(tmp_path), seeds, text_of_clip=False) for seeds in (True, False))

    def clip(keys=of_masks, of=record, split="train", **changes):
        return keys.clip(of, replace(draw, **changes), split)

    others = [
        clip(of=replace(record, path=paths["c"])),
        clip(of=replace(record, control_path=paths["c"])),
        clip(of=replace(record, control_path=None, camera_path=paths["b"])),
        clip(shape=Shape(5, 32, 48)),
        clip(crop=Crop(32, 32, 0, 1)),
        clip(frames=(1, 2, 3, 4, 5)),
        clip(ref_frame=1),
        clip(variant_seed=3),
        clip(split="held_out"),
        clip(replace(of_masks, facts={"how": 2})),
        clip(plain),
    ]
    alike = [
        clip(),
        clip(seed=7, stratum=(1, 2), repeat=True),  # what is drawn at every use
        clip(of=replace(record, text="b", entry=5)),
    ]
    assert len({*others, clip()}) == len(others) + 1 and set(alike) == {clip()}
    assert clip(plain) == clip(plain, variant_seed=3)
    before = clip(), clip(of=replace(record, control_path=None))
    os.utime(tmp_path / "b.mp4", (10, 10))
    assert clip() != before[0] and clip(of=replace(record, control_path=None)) == before[1]
    texts = [plain.text(replace(record, text=text), key) for text, key in (("a", "k"), ("a", "l"), ("b", "k"))]
    assert texts[0] == texts[1] != texts[2]
    seeing = replace(plain, text_of_clip=True)
    assert seeing.text(record, "k") != seeing.text(record, "l")


# ---- the command


def test_the_command(run, toy, data, tmp_path, capfd):
    given = cached(run("run"), tmp_path / "cache")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(given))
    assert cli.main(["cache", str(path)]) == 0
    told = capfd.readouterr().err
    assert re.search(r"\d+ entries written \(.* GB\), 0 were there", told)
    assert cli.main(["cache", "verify", str(path)]) == 0
    assert cli.main(["cache", "prune", str(path)]) == 0
    told = capfd.readouterr().out
    assert "all whole" in told and "0 GB freed" in told
    assert cli.main(["cache", str(path), "--cache_variants", "0"]) == 2
    assert "it keeps a fixed number of ways" in capfd.readouterr().err
    assert cli.main(["cache", str(path), "--cache_folder", "none"]) == 2
    assert "cache_folder is missing" in capfd.readouterr().err
