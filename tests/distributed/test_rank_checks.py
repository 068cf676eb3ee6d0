"""Machines that have other settings or other files: no process trains, and each says what is different where."""

import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from reeltune import cli
from reeltune.core.errors import UserError
from reeltune.distributed.engine import Engine
from reeltune.training import loop, rank_checks
from reeltune.training.rank_checks import differences, files_of, refuse_other_records, sampled
from tests.distributed.processes import FORKS, Run, _one, forked, free_port
from tests.runs.small_run import data_set, recipe


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    data_set(folder / "data")
    (folder / "model").mkdir()
    (folder / "model" / "toy.json").write_text("{}")
    (folder / "model" / "weights.bin").write_bytes(bytes(300_000))
    return folder


def asked(folder, **changes):
    where = {"checkpoint": folder / "model", "data": folder / "data", "out": folder / "run"} | {
        name: changes.pop(name) for name in ("checkpoint", "data", "out") if name in changes
    }
    return recipe(*where.values(), max_train_steps=2, held_out_share=0.0, **changes)


def each(works, folder):
    """As `forked`, but every process has work of its own."""
    port, told = free_port(), [folder / f"rank-{rank}.txt" for rank in range(len(works))]
    places = [(rank, len(works), port, work, told[rank], None) for rank, work in enumerate(works)]
    forks = [FORKS.Process(target=_one, args=place) for place in places]
    for fork in forks:
        fork.start()
    return Run(forks, told)


def assert_refused(run, *said):
    assert run.end() == [2, 2], run.print()
    for told in run.told:
        for words in said:
            assert words in told.read_text(), run.print()


OTHERS = {
    "seed is 7 for rank 1, 43 for rank 0": {"seed": 7},
    "engine is fsdp for rank 1, ddp for rank 0": {"engine": "fsdp"},
    "learning_rate is 0.5 for rank 1, 0.001 for rank 0": {"train_data_meta": "other.json", "learning_rate": 0.5},
}
NEXT = "\n---- the next\n"


def refused(one):
    """For `each`: 0 if it is refused."""
    code = cli.guarded(partial(loop.train, one))
    print(NEXT, flush=True)
    return int(code != 2)


@pytest.fixture(scope="module")
def other_settings(shared, tmp_path_factory):
    """By what is said of them: the run's folder, and what each rank was told. All in the same two processes."""
    folder = tmp_path_factory.mktemp("others")
    outs = [folder / f"run-{i}" for i in range(len(OTHERS))]
    works = [
        [partial(refused, asked(shared, out=out, **({"seed": 43} | of))) for out, of in zip(outs, changes, strict=True)]
        for changes in ([{}] * len(OTHERS), OTHERS.values())
    ]
    run = each(works, folder)
    assert run.end() == [0, 0], run.print()
    told = [path.read_text().split(NEXT)[:-1] for path in run.told]
    return dict(zip(OTHERS, zip(outs, *told, strict=True), strict=True))


@pytest.mark.parametrize("said", OTHERS)
def test_other_settings_on_one(said, other_settings):
    out, *told = other_settings[said]
    for text in told:
        assert said in text and "the same command" in text, text
    assert not list(out.glob("*.jsonl"))


def one_of(world, rank, port, told):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    try:
        Engine(rank_timeout_seconds=-58)
    except UserError as error:
        told.write_text(str(error))


def test_processes_that_never_meet_end_and_say_so(tmp_path):
    fork = FORKS.Process(target=one_of, args=(2, 0, free_port(), tmp_path / "told"))
    fork.start()
    fork.join(60)
    said = (tmp_path / "told").read_text()
    assert "2 processes were to meet at 127.0.0.1 and did not" in said and "1/2 clients joined" in said
    assert "torchrun --nproc_per_node N -m reeltune train" in said


def test_processes_that_were_told_of_other_numbers(tmp_path):
    """The first meets the second, and then nobody comes into its group."""
    port, told = free_port(), [tmp_path / "first", tmp_path / "second"]
    forks = [FORKS.Process(target=one_of, args=(2 + rank, rank, port, told[rank])) for rank in (0, 1)]
    for fork in forks:
        fork.start()
    for rank, fork in enumerate(forks):
        fork.join(60)
        assert f"{2 + rank} processes were to meet at 127.0.0.1 and did not" in told[rank].read_text()


class Machines:
    """Each process in a folder of its own, as on a machine of its own: paths that are not absolute are not shared."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        os.chdir(self.folder / f"machine-{rank}")
        rank_checks.APPEARS_SECONDS = 0.5


@pytest.fixture
def machines(shared, tmp_path):
    for rank in (0, 1):
        shutil.copytree(shared, tmp_path / f"machine-{rank}", ignore=shutil.ignore_patterns("run", "index"))
    return tmp_path


def test_another_version_of_the_checkpoint_on_one(machines, shared):
    with (machines / "machine-1/model/weights.bin").open("r+b") as file:
        file.seek(200_000)
        file.write(b"x" * 50_000)
    wanted = asked(shared, checkpoint=Path("model"), out=machines / "run")
    run = forked([wanted], 2, machines, Machines(machines))
    assert_refused(run, "model/weights.bin is 300000 bytes (", "other weights")


def test_an_output_dir_that_is_not_shared(machines, shared, monkeypatch):
    monkeypatch.chdir(machines)  # where `recipe` puts the index of the clips
    run = forked([asked(shared, out=Path("run"))], 2, machines, Machines(machines))
    assert_refused(run, "output_dir 'run' is another folder for rank 1 than for rank 0")
    assert not list(machines.glob("machine-0/run/*"))


def test_the_same_files_are_the_same_wherever_they_lie(machines, shared):
    wanted = asked(shared, checkpoint=Path("model"), out=machines / "run")
    (machines / "machine-1/model/.cache").mkdir()
    (machines / "machine-1/model/.cache/of-a-download").write_text("yesterday")
    run = forked([wanted], 2, machines, Machines(machines))
    assert run.end() == [0, 0], run.print()


# ---- what is compared


def test_differences_name_what_and_who():
    same = {"a": 1, "b": 2}
    assert differences([same, same, same]) == []
    assert differences([same, same, {"a": 1, "b": 3}, {"a": 1}]) == ["b is 3 for rank 2, 3, 2 for rank 0"]
    many = differences([{}, {str(n): n for n in range(11)}])
    assert len(many) == 9 and many[0] == "0 is 0 for rank 1, missing for rank 0" and many[-1] == "and 3 more"


def test_other_clips_on_one_are_named(shared):
    records = [SimpleNamespace(path=str(shared / f"data/train/{i}.mp4")) for i in range(7)]
    held = SimpleNamespace(world=2, gather=lambda mine: [mine, mine])
    found = SampledRecords(records, "one")
    refuse_other_records(held, found)
    there = {record.path: Path(record.path).stat().st_size for record in records}
    path = records[3].path
    for theirs, said in (
        ({"the list of usable clips": "two", **there}, "the list of usable clips is two for rank 1, one for rank 0"),
        ({"the list of usable clips": "one", **there, path: 1}, f"{path} is 1 for rank 1, {there[path]} for rank 0"),
    ):
        held.gather = lambda mine, theirs=theirs: [mine, theirs]
        with pytest.raises(UserError, match=re.escape(said)) as error:
            refuse_other_records(held, found)
        assert len(error.value.problems) == 1


class SampledRecords(list):
    def __init__(self, records, known_by):
        super().__init__(records)
        self.digest = lambda: known_by


@pytest.mark.parametrize("place", [0, 437_500, 875_000])
def test_samples_are_of_all_of_a_file(place, tmp_path):
    file = tmp_path / ".hidden" / "model" / "a"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(1_000_000))
    assert files_of(file.parent) == [file] == files_of(file)
    first = sampled(file)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"x" * 125_000)
    assert first.startswith("1000000 bytes (") and sampled(file).startswith("1000000 bytes (")
    assert sampled(file) != first
    file.write_bytes(b"")
    assert sampled(file).startswith("0 bytes")
