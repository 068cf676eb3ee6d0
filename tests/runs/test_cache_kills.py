"""The cache: whatever kills, fills or damages it, what is there is whole."""

import json
import os
import re
import resource
import shutil
import signal
import time
from functools import partial

import pytest
import torch

from reeltune.cache import fill, maintenance, store
from reeltune.core.errors import UserError
from reeltune.core.files import CannotWriteError
from reeltune.core.rng import dice
from reeltune.estimate.check import check
from reeltune.training.loop import train
from tests.distributed.processes import FORKS, changes, wait
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs import fill_slowly
from tests.runs.caching import STEPS, assert_same_contents, cached, contents, entries_written
from tests.runs.same_run import assert_same_end

# ---- kills, full disks, many processes


def started(given, world):
    processes = [FORKS.Process(target=fill_slowly.run, args=(given, rank, world)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def stepped_on(folder, there, processes):
    """There is another shard, or there will be none."""
    return len(list(folder.glob("shards/*"))) > there or not any(process.is_alive() for process in processes)


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
    counts = entries_written(capfd)
    assert min(counts) > 0 and sum(counts) == len(store.Store(tmp_path / "cache").entries)
    assert "all whole" in maintenance.verify(given)


def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")
    monkeypatch.setattr(fill, "Writer", lambda folder, facts: store.Writer(folder, facts, shard_bytes=1))
    list(check(given))  # so that the data is measured
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))  # bytes of a file: captions fit, clips do not
    try:
        with pytest.raises(UserError, match=r"(?s)cache.*File too large; .* GB free"):
            fill.fill(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = contents(tmp_path / "cache")
    assert before and not list((tmp_path / "cache/shards").glob(".*"))
    fill.fill(given)
    after = contents(tmp_path / "cache")
    assert entries_written(capfd)[-1] == len(after) - len(before) > 0
    assert all(torch.equal(tensor, after[key][name]) for key, held in before.items() for name, tensor in held.items())


def test_a_line_cut_short_is_no_line(run, tmp_path, monkeypatch, capfd):
    given = cached(run("run"), tmp_path / "cache")
    monkeypatch.setattr(fill, "Writer", lambda folder, facts: store.Writer(folder, facts, shard_bytes=1))
    fill.fill(given)
    (part,) = store.parts(tmp_path / "cache")
    text = part.read_text()
    part.write_text(text[:-9])
    fill.fill(given)
    assert entries_written(capfd)[1:] == [1]
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

    def fail(encoder, batch, real=fill.Encoder._clips, left=[5]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("out of memory")
        return real(encoder, batch)

    monkeypatch.setattr(fill.Encoder, "_clips", fail)
    with pytest.raises(UserError, match=r"the host is full while clips are encoded \(out of memory\)"):
        fill.fill(given)
    held = store.Store(tmp_path / "cache")
    assert [split for _, split in held.entries.values()].count("train") == 4
    monkeypatch.undo()
    fill.fill(given)
    assert entries_written(capfd) == [len(store.Store(tmp_path / "cache").entries) - len(held.entries)]


def test_a_cache_that_cannot_be_written_is_read(run, tmp_path, monkeypatch):
    model = tiny_checkpoint(tmp_path / "wan", "control_t2v")
    given = cached(run("run", model, max_train_steps=1), tmp_path / "cache")
    fill.fill(given)
    shutil.rmtree(tmp_path / "cache/fingerprints")

    def refuse(path):
        raise CannotWriteError(str(path), "cannot be written")

    monkeypatch.setattr("reeltune.cache.entries.whole_file", refuse)
    monkeypatch.setattr("reeltune.cache.fingerprints.whole_file", refuse)
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
    first, rest = entries_written(capfd)
    assert first == 7 and rest == len(store.Store(tmp_path / "cache").entries) - 7


# ---- care


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_changed_bit_is_found_in_training_and_by_verify(has_sums, run, tmp_path):
    given = cached(run("run"), tmp_path / "cache")
    fill.fill(given)
    if not has_sums:  # as versions before 0.2 wrote
        (manifest,) = (tmp_path / "cache/manifest").glob("*")
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        manifest.write_text("".join(json.dumps(line | {"crc32": None}) + "\n" for line in lines))
    assert "all whole" in maintenance.verify(given)
    (shard,) = (tmp_path / "cache/shards").glob("*")
    data = bytearray(shard.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in range(begin, len(data), 4):  # of every entry, for a run need not read all
        data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name} is damaged.*reeltune cache verify"):
        train(given)
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
    assert after.keys() == asked.keys() < before.keys()
    assert all(torch.equal(tensor, before[key][name]) for key, held in after.items() for name, tensor in held.items())
    assert len(list((tmp_path / "cache/shards").glob("*"))) == len(list((tmp_path / "cache/manifest").glob("*"))) == 1
    assert "all whole" in maintenance.verify(few)
    assert train(run("live", cache_variants=1)) == 0 == train(few)
    assert_same_end(tmp_path / "few", tmp_path / "live", STEPS)


def test_prune_of_no_folder_is_told(run, tmp_path):
    with pytest.raises(UserError, match="holds no cache; give one that does"):
        maintenance.prune(cached(run("a"), tmp_path))
    with pytest.raises(UserError, match=r"mistyped is no folder; give that of a cache"):
        maintenance.prune(cached(run("run"), tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


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
