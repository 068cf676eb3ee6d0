"""The memory that saves in the background take: whether there is room, that it is kept, and when it is given back."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves

from reeltune.distributed.engine import Engine
from reeltune.memory.host import room_bytes
from reeltune.training import background_save
from reeltune.training.background_save import Saving, saves_in_background
from reeltune.training.host_copies import HostCopies
from reeltune.training.loop import train
from tests.distributed.processes import forked
from tests.runs.small_run import recipe


@pytest.fixture
def to_do(data, toy, tmp_path):
    settings = {"max_train_steps": 6, "held_out_share": 0.0, "use_ema": True}
    return lambda **changes: recipe(toy, data, tmp_path / "run", **{**settings, **changes})


def lines(out, kind="save"):
    rows = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, rows) if row["kind"] == kind]


class Little:
    """Rank 1's machine has little memory left."""

    def __call__(self, rank):
        background_save.room_bytes = lambda: 1000 if rank == 1 else 2**40
        background_save.platform.node = lambda: f"machine-{rank}"


@pytest.mark.parametrize("engine", ["fsdp"])
def test_where_a_machine_has_no_room_all_wait_and_it_is_said_once(engine, to_do, tmp_path):
    run = forked([to_do(engine=engine)], 2, tmp_path, Little())
    assert run.end() == [0, 0], run.print()
    said = [row["text"] for row in lines(tmp_path / "run", "notice") if "training waits" in row["text"]]
    assert len(said) == 1 and said[0].endswith("for a copy, and machine-1 has 0.00 GiB left")
    assert [row["step"] for row in lines(tmp_path / "run")] == [2, 4, 6]
    assert all(row["blocked_seconds"] >= row["seconds"] for row in lines(tmp_path / "run"))


class Recorded(HostCopies):
    """Of a run. `reserved` and `made` hold all of it, so that nothing else can come to lie in that memory."""

    def __init__(self):
        super().__init__()
        self.reserved, self.made = [], []

    def reserve(self, tree):
        super().reserve(tree)
        self.reserved = list(self._free)

    def copied(self, tree):
        self.made.append(super().copied(tree))
        return self.made[-1]


@pytest.fixture
def copies(monkeypatch):
    """Of the runs of a test, in their order."""
    runs = []
    monkeypatch.setattr(background_save, "HostCopies", lambda: runs.append(Recorded()) or runs[-1])
    return runs


@pytest.mark.parametrize(("share", "has_room"), [(1.21, True), (1.19, False)])
def test_the_room_wanted_is_that_of_all_processes_of_a_machine(share, has_room, to_do, tmp_path, monkeypatch, copies):
    """One that has a third of the bytes, and two others there that have as much each; what they hold is no room."""
    learners = []
    real = Saving._contents
    monkeypatch.setattr(Saving, "_contents", lambda saving: learners.append(saving.turns.now.learner) or real(saving))
    monkeypatch.setattr(Engine, "gather", lambda engine, thing: [thing] * 3)

    def room():
        return int(3 * (share * sum(learners[-1].held_bytes().values()) - copies[0].held_bytes()))

    monkeypatch.setattr(background_save, "room_bytes", room)
    assert train(to_do(max_train_steps=5)) == 0
    notices = [row["text"] for row in lines(tmp_path / "run", "notice")]
    assert any("training waits" in text for text in notices) != has_room
    assert len(copies[0].made) == (2 if has_room else 0)


# ---- the memory of the copies


def test_all_saves_copy_into_the_memory_that_was_reserved(to_do, copies):
    def places(tree):
        return sorted(leaf.data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    assert train(to_do()) == 0
    (of_run,) = copies
    assert places(of_run.reserved) and len(of_run.made) == 2
    assert all(places(one) == places(of_run.reserved) for one in of_run.made)
    assert of_run.held_bytes() == 0  # no more, once the last is written


def test_where_room_becomes_scarce_it_is_given_back(to_do, tmp_path, copies, monkeypatch):
    """At the second save others have left no more than a tenth of the copies' bytes beside them."""
    held = []

    def room():
        held.append(copies[0].held_bytes())
        return held[-1] // 10 if len(held) == 3 else 2**40

    monkeypatch.setattr(background_save, "room_bytes", room)
    assert train(to_do(max_train_steps=8)) == 0
    assert held[0] == 0 and held[1] == held[2] > 0 and held[3:] == [0]
    assert len(copies[0].made) == 2  # of the first and the third; training waits for the second and the last
    assert [row["step"] for row in lines(tmp_path / "run")] == [2, 4, 6, 8]


def test_memory_is_reserved_once_when_all_networks_have_learnt(to_do, copies, monkeypatch):
    """Only then all optimizers have their state."""
    each = [MagicMock(expert=expert) for expert in ("high", "low")]
    run = MagicMock(recipe=to_do(), turns=SimpleNamespace(each=each), total_steps=9)
    run.engine.gather = lambda thing: [thing]
    contents, there, held = {}, torch.ones(3), []
    monkeypatch.setattr(Saving, "_contents", lambda _: contents)
    saving = Saving(run)
    for step, learnt in enumerate([0, 0, 1, 0, 1], start=1):
        contents[step] = there
        saving.prepare(each[learnt], step)
        held.append(copies[0].held_bytes())
    assert held == [0, 0, 3 * 12, 3 * 12, 3 * 12]


@pytest.mark.parametrize(
    ("every", "step", "total_steps", "are_made"),
    [(2, 1, 3, True), (2, 1, 2, False), (2, 2, 3, True), (2, 3, 4, False), (2, 3, 5, True), (500, 1, 400, False)],
)
def test_copies_are_made_of_all_but_the_last_checkpoint(every, step, total_steps, are_made, to_do):
    assert saves_in_background(to_do(checkpointing_steps=every), step, total_steps) == are_made
    waits = to_do(checkpointing_steps=every, save_in_background=False)
    assert not saves_in_background(waits, step, total_steps)


@pytest.mark.parametrize("changes", [{"max_train_steps": 2}, {"save_in_background": False}])
def test_no_memory_is_reserved_where_no_copy_is_made(changes, to_do, copies):
    assert train(to_do(**changes)) == 0
    assert not copies[0].reserved and not copies[0].made


def groups(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_room_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Told", (), {"available": 5000}))
    assert room_bytes(tmp_path) == 5000
    two = {  # the limit is that of the group above
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "3000\n",
        "sys/fs/cgroup/job/memory.current": "1800\n",
        "sys/fs/cgroup/job/memory.stat": "anon 700\ninactive_file 1000\nactive_file 100\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    assert room_bytes(groups(tmp_path / "two", two)) == 3000 - 1800 + 1000
    one = {  # within a container, where its group is the root
        "proc/self/cgroup": "5:memory:/docker/1f\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3500\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 200\n",
    }
    assert room_bytes(groups(tmp_path / "one", one)) == 4000 - 3500 + 200
