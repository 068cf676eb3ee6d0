"""A run goes on with another number of processes: the same samples, each once, or it is refused with the numbers."""

import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Progress
from reeltune.data.loader import stream
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training.loop import train
from reeltune.training.parallelism import BatchSplit, parallelism_of, split_batch
from tests.runs.small_run import recipe

GROUP = 4


@pytest.fixture(scope="module")
def asked(data, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return lambda name, **changes: recipe(toy, data, folder / name, **changes)


@pytest.fixture(scope="module")
def reader(asked):
    wanted = asked("read")
    family, mode, _ = choose_family(wanted)
    return gather(wanted, family, mode, group=GROUP).reader


def test_the_micro_step_is_kept():
    assert split_batch(2, 4) == BatchSplit(group=8, passes=1, batch=2)
    kept = {world: split_batch(2, world, 8) for world in (1, 2, 4, 8)}
    assert {world: (split.passes, split.batch) for world, split in kept.items()} == {
        1: (4, 2),
        2: (2, 2),
        4: (1, 2),
        8: (1, 1),  # each takes fewer
    }
    for world, split in kept.items():
        assert world * split.passes * split.batch == split.group == 8
        told = split.notices(2, world)
        assert [
            f"keeps the 8 samples that the run began with: a process takes {split.batch} of" in line for line in told
        ] == ([] if world == 4 else [True])


@pytest.mark.parametrize(("engine", "told"), [("zero2", 1), ("fsdp", 1), ("ddp", 0)])
def test_one_process_with_an_engine_is_told_that_it_deals_out_nothing(engine, told, asked, monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    notices = parallelism_of(asked("one", engine=engine)).notices
    assert [f"engine is {engine}, but one process was started" in line for line in notices] == [True] * told
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallelism_of(asked("one", engine=engine)).notices == ()


@pytest.mark.parametrize(
    ("batch", "world", "group", "fits", "sizes"),
    [
        (2, 3, 8, "1, 2, 4, 8", ""),
        (2, 16, 8, "1, 2, 4, 8", ""),
        (3, 2, 8, "4, 8", "1, 2, 4"),
        (4, 5, 12, "1, 3, 4, 6, 12", ""),
    ],
)
def test_what_does_not_come_out_even_is_refused_with_the_numbers_that_do(batch, world, group, fits, sizes):
    with pytest.raises(UserError) as error:
        split_batch(batch, world, group)
    (told,) = error.value.problems
    assert f"takes {group} samples in a micro-step" in told
    assert f"processes: {world} and train_batch_size: {batch};" in told
    or_sizes = f", or with so many processes give one of {sizes}" if sizes else ""
    assert told.endswith(f"as many processes as one of {fits}{or_sizes}")
    for size in map(int, filter(None, sizes.split(", "))):
        assert split_batch(size, world, group).group == group
    for count in map(int, fits.split(", ")):
        assert split_batch(batch, count, group).group == group
    with pytest.raises(UserError, match=f"processes: {3 * world} and .* one of {3 * int(fits[0])}, "):
        split_batch(batch, world, group, sharing=3)


def taken(reader, start, micro_steps, world, train_batch_size):
    """The draws of so many micro-steps from `start` on, in the plan's order, and where they end."""
    split = split_batch(train_batch_size, world, GROUP)
    found = []
    for rank in range(world):
        batches = stream(reader, start, workers=0, rank=rank, world=world, passes=split.passes)
        mine = [next(batches) for _ in range(micro_steps * split.passes)]
        assert all(len(batch.draws) == split.batch for batch, *_ in mine)
        found.append([mine[k * split.passes : (k + 1) * split.passes] for k in range(micro_steps)])
        _, epoch, cursor = mine[-1]
    draws = [draw for k in range(micro_steps) for steps in found for batch, *_ in steps[k] for draw in batch.draws]
    return draws, Progress(epoch=epoch, cursor=cursor, group=GROUP)


def test_the_same_samples_in_the_same_order_whoever_takes_them(reader):
    first, two = (reader.plan(0).micro_steps_before(epochs) for epochs in (1, 2))
    assert two < 2 * first  # a group runs on into the second epoch
    whole, end = taken(reader, Progress(), two + 2, 1, 4)
    assert len({(draw.record, draw.seed) for draw in whole}) == 4 * (two + 2)  # told apart by what is compared
    here, found = Progress(), []
    moves = [(2, 2, 1), (1, 2, first - 2), (4, 1, 2), (1, 1, 1), (2, 1, two - first)]  # over the ends of epochs too
    for world, train_batch_size, micro_steps in moves:
        draws, here = taken(reader, here, micro_steps, world, train_batch_size)
        found += draws
    assert found == whole
    assert here == end and here.epoch == 2


def test_a_run_that_cannot_be_taken_evenly_is_refused(asked):
    assert train(asked("run", train_batch_size=4, max_train_steps=1)) == 0
    with pytest.raises(UserError, match=r"takes 4 samples .* processes: 1 and train_batch_size: 3; .* one of 2, 4"):
        train(asked("run", train_batch_size=3, max_train_steps=2, resume_from_checkpoint="latest"))
