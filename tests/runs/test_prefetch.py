"""Encoding beside training: the next batch while the network is at work, and never another run for it."""

import json
import time
from threading import Event, current_thread, main_thread

import pytest
import torch

from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.demo.main import FAMILIES as SHOWN
from reeltune.families.toy import family as toy
from reeltune.training import loop as module
from reeltune.training.prefetch import Prefetcher, encodes_ahead
from tests.families.every_family import Pair
from tests.runs.same_run import StopAfter, assert_same_end
from tests.runs.small_run import recipe

CPU = torch.device("cpu")
LIMIT_SECONDS = 300  # for a thread to begin
TOY = Pair("toy", "toy", toy.FAMILY.modes[0], SHOWN["toy"].write)


def placed(count):
    return ((f"batch {i}", 0, i + 1) for i in range(count))


class Encoder:
    """Says when it has begun with a batch, and works when it may."""

    def __init__(self, count, free=True):
        self.begun, self.free = [Event() for _ in range(count)], Event()
        self.threads, self.ended = [], []
        if free:
            self.free.set()

    def __call__(self, batch):
        self.threads.append(current_thread())
        self.begun[int(batch.split()[1])].set()
        assert self.free.wait(LIMIT_SECONDS)
        time.sleep(0.1)
        self.ended.append(batch)
        return f"{batch}, encoded"


@pytest.mark.parametrize("ahead", [True, False])
def test_each_batch_comes_with_its_own(ahead):
    encode = Encoder(4)
    with Prefetcher(placed(4), encode, device=CPU, ahead=ahead) as prefetcher:
        for i in range(4):
            assert prefetcher.batch() == (f"batch {i}", 0, i + 1)
            assert prefetcher.encoded() == f"batch {i}, encoded"
            prefetcher.begin_next()
    assert [thread is main_thread() for thread in encode.threads] == [True, *[not ahead] * 3]


def test_the_next_is_at_work_while_the_network_trains():
    encode = Encoder(3)
    with Prefetcher(placed(3), encode, device=CPU, ahead=True) as prefetcher:
        prefetcher.batch(), prefetcher.encoded()
        encode.free.clear()
        prefetcher.begin_next()
        assert encode.begun[1].wait(LIMIT_SECONDS)  # here the network would train on batch 0
        encode.free.set()
        prefetcher.wait()
        assert encode.ended == ["batch 0", "batch 1"]
        assert not encode.begun[2].is_set()
        assert prefetcher.batch()[0] == "batch 1"
        assert prefetcher.encoded() == "batch 1, encoded"


def test_without_it_nothing_begins_before_it_is_asked_for():
    encode = Encoder(2)
    prefetcher = Prefetcher(placed(2), encode, device=CPU, ahead=False)
    prefetcher.batch(), prefetcher.encoded(), prefetcher.begin_next(), prefetcher.wait()
    assert not encode.begun[1].is_set()


@pytest.mark.parametrize("where", ["read", "encode"])
def test_what_goes_wrong_is_raised_with_its_own_batch(where):
    def batches():
        yield "batch 0", 0, 1
        if where == "read":
            raise OSError("gone")
        yield "batch 1", 0, 2

    def encode(batch):
        if batch == "batch 1":
            raise OSError("gone")
        return batch

    with Prefetcher(batches(), encode, device=CPU, ahead=True) as prefetcher:
        prefetcher.batch(), prefetcher.encoded()
        prefetcher.begin_next()
        prefetcher.wait()
        if where == "encode":
            assert prefetcher.batch()[0] == "batch 1"
        with pytest.raises(OSError, match="gone"):
            prefetcher.batch() if where == "read" else prefetcher.encoded()


def test_where_batches_are_encoded_ahead():
    cases = {(None, True, False): True, (None, True, True): False, (None, False, False): False}
    cases |= {(True, False, False): True, (False, True, False): False}

    def ahead(asked, on_gpu, low_vram=False, **more):
        return encodes_ahead(build({"encode_ahead": asked, "low_vram": low_vram, **more}), on_gpu=on_gpu)

    assert {case: ahead(*case) for case in cases} == cases
    assert not ahead(None, True, attention="flash")  # which encoders may not have
    assert not ahead(None, True, deterministic=True)  # what encoders have may have no such kernel
    assert ahead(None, True, attention="flash", cache_folder="x", cache_variants=1)


def test_not_with_low_vram():
    with pytest.raises(UserError, match="encode_ahead and low_vram are true"):
        build({"low_vram": True, "encode_ahead": True})


def run(pair: Pair, data, folder, name, **changes):
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (folder / "laid_out").write_text(str(pair.lay_out(model)))
    made = recipe((folder / "laid_out").read_text(), data, folder / name, **pair.asked, **changes)
    module.train(made)
    return folder / name


def test_a_run_is_the_same_with_it(one_of_a_family, data, tmp_path):
    torch.set_num_threads(1)
    own = {"max_train_steps": 3, "held_out_share": 0.0}
    ends = [run(one_of_a_family, data, tmp_path, f"{on}", encode_ahead=on, **own) for on in (False, True)]
    assert_same_end(*ends, 3)


def test_a_run_that_was_stopped_is_the_same(data, tmp_path):
    """Over an epoch's end, with validation in between."""
    own = {"gradient_accumulation_steps": 2, "validation_steps": 2, "dataloader_num_workers": 1}
    plain = run(TOY, data, tmp_path, "plain", encode_ahead=False, **own)
    with StopAfter(3):
        cut = run(TOY, data, tmp_path, "cut", encode_ahead=True, **own)
    assert json.loads((cut / "checkpoint-3" / "progress.json").read_text())["step"] == 3
    run(TOY, data, tmp_path, "cut", encode_ahead=True, resume_from_checkpoint="latest", **own)
    assert_same_end(cut, plain)


def test_no_more_is_encoded_than_is_trained_on(data, tmp_path, monkeypatch):
    encoded = []

    class Counting(Prefetcher):
        def __init__(self, batches, encode, **more):
            super().__init__(batches, lambda batch: encoded.append(batch) or encode(batch), **more)

    monkeypatch.setattr(module, "Prefetcher", Counting)
    run(TOY, data, tmp_path, "out", encode_ahead=True, held_out_share=0.0)
    assert len(encoded) == 6
