"""Ways of saving memory, in every family: the bits of the plain run."""

from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch._dynamo import lookup_backend

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.diffusion.loss import diffusion_loss
from reeltune.distributed.engine import Engine
from reeltune.memory import blocks, compiled, kept
from reeltune.memory.blocks import blocks_of
from reeltune.optim.trainable import released_names
from reeltune.run.data import gather
from reeltune.run.model import choose_family, encode_options
from reeltune.sampling.sample import Setup
from reeltune.training import trained_network
from reeltune.training.learner import Learner, learner_of
from tests.families.every_family import Pair
from tests.runs.same_run import assert_equal
from tests.runs.small_run import data_set, recipe
from tests.unit.test_attention import Operators

pytestmark = [pytest.mark.quick_by_family("toy", "wan_fun"), pytest.mark.first_by_network]
STEPS = 2  # the first makes the optimizer's state, and the second finds what the first left
KINDS = {
    "fp32": {"use_ema": True, "max_grad_norm": 1e-3},
    "bf16_stochastic": {"trained_weights": "bf16_stochastic", "mixed_precision": "bf16", "max_grad_norm": None},
}
HALF = {"gradient_checkpointing": True, "gradient_checkpointing_share": 0.5}
WAYS = {  # what is saved with, and the kind of run
    "half_recomputed": ("fp32", HALF),
    "all_recomputed": ("bf16_stochastic", {"gradient_checkpointing": True}),
    "attention_kept": ("fp32", {"gradient_checkpointing": "attention_kept"}),
    "products_kept": ("bf16_stochastic", {"gradient_checkpointing": "products_kept"}),
    "offloaded": ("fp32", {"offload_activations": True}),
    "stepped_in_backward": ("fp32", {"step_in_backward": True}),
    "all_of_it": ("bf16_stochastic", {**HALF, "offload_activations": True, "step_in_backward": True}),
}


QUICK = ("attention_kept", "all_of_it")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=6)


@pytest.fixture(scope="module")
def start(any_checkpoint: Pair, data, tmp_path_factory):
    """(family, recipe, batch of its first step, networks by their settings)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "model").mkdir()
    model = any_checkpoint.lay_out(folder / "model")
    made = recipe(model, data, folder / "out", **any_checkpoint.asked, fix_sample_size=(32, 64))
    family, mode, objective = choose_family(made)
    batch = gather(made, family, mode, show_progress=False).reader[0, 0, 0, 1]
    setup = Setup(family, mode, family.load(model), objective, options=encode_options(made))
    load = cache(partial(family.load, model, encoders=False))
    return family, made, setup.encode(batch), setup.parts.null, batch, load


def steps(start, count=STEPS, **changes) -> tuple[list, Learner]:
    """(loss and gradient norm of each step, what learned)."""
    family, made, encoded, null, batch, load = start
    made = with_changes(made, changes)
    engine = Engine(made.training.mixed_precision)
    dtype = torch.float32 if made.model.trained_weights == "fp32" else torch.bfloat16
    parts = load(dtype=dtype, base_weights=made.adapter.base_weights)
    learner = learner_of(made, family, replace(parts, net=deepcopy(parts.net)), engine, batch=2, accumulate=1)
    _, _, objective = choose_family(made)
    if learner.network.compiled is not None:
        learner.network.compiled.begin(1, "first")
    told = []
    for step in range(count):
        seeds = [seed + step for seed in batch.seeds]
        strata = [draw.stratum for draw in batch.draws]
        loss = diffusion_loss(family.denoise, learner.net, objective, encoded, null, seeds, strata)
        learner.backward(loss.value, last=True)
        told.append((loss.value.item(), learner.step(step, 1e-3).item()))
    return told, learner


def with_changes(made: Recipe, changes: dict) -> Recipe:
    """The recipe with these fields, whichever their sections."""
    sections = {
        name: replace(section, **{field: value for field, value in changes.items() if field in vars(section)})
        for name, section in vars(made).items()
    }
    return replace(made, **sections)


def assert_same(ours: tuple[list, Learner], theirs: tuple[list, Learner]) -> None:
    assert ours[0] == theirs[0]
    assert_equal(dict(ours[1].plain.state_dict()), dict(theirs[1].plain.state_dict()))
    assert_equal(ours[1].state(), theirs[1].state())


@pytest.fixture(scope="module")
def plain(start):
    return {kind: steps(start, **changes) for kind, changes in KINDS.items()}


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_the_bits_of_the_plain_run(way, start, plain, monkeypatch):
    kind, changes = WAYS[way]
    monkeypatch.setattr(blocks, "LEAST_BYTES", 0)
    told, learner = plain[kind]
    assert all(loss > 0 and norm > 0 for loss, norm in told)
    if kind == "fp32":
        assert all(norm > 1e-3 for _, norm in told)  # so that it is clipped
    assert_same(steps(start, **KINDS[kind], **changes), (told, learner))


def test_a_chosen_kernel_is_that_of_the_recomputation_too(start, plain):
    with Operators() as usual:
        steps(start, **KINDS["fp32"])
    with Operators() as chosen:
        told, learner = steps(start, **KINDS["fp32"], attention="math")
    assert chosen.fused < usual.fused or not usual.fused  # of toys, which have no attention
    assert_same(steps(start, **KINDS["fp32"], attention="math", gradient_checkpointing=True), (told, learner))
    for ours, theirs in zip(told, plain["fp32"][0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.first_by_family
@pytest.mark.parametrize("keep", kept.KEPT)
def test_compiled_it_keeps_the_same_and_torch_warns_of_nothing(keep, start, plain, monkeypatch, capfd):
    """By torch's own operators in place of compiled code."""
    made = lookup_backend("aot_eager")
    monkeypatch.setattr(compiled, "inductor", made)
    told, learner = steps(start, **KINDS["fp32"], gradient_checkpointing=keep, compile="blocks")
    assert learner.network.compiled.count > 0
    assert told == [pytest.approx(row, rel=1e-5) for row in plain["fp32"][0]]
    assert "context_fn" not in capfd.readouterr().err


@pytest.mark.parametrize("adapters", [{}, {"rank": 1, "base_weights": "nf4", "mixed_precision": "bf16"}], ids=str)
def test_products_that_are_kept_are_computed_once(adapters, start, monkeypatch):
    monkeypatch.setattr(kept, "THIN", 1000)  # of tiny networks some are thin that in real are not

    def run(recomputed):
        with Operators() as seen:
            found = steps(start, 1, **adapters, gradient_checkpointing=recomputed)
        return found, sum(seen.counts[operator] for operator in kept.PRODUCTS)

    (plain, once), (ours, ours_count), (_, twice) = map(run, (False, "products_kept", True))
    assert_same(ours, plain)
    assert once == ours_count < twice


@pytest.mark.parametrize(
    "recomputed",
    [True, *(pytest.param(how, marks=pytest.mark.slow) for how in (False, "attention_kept", "products_kept"))],
)
def test_swapped_blocks_give_the_bits_of_still_ones(recomputed, start, monkeypatch):
    family, made, *_ = start
    net = family.load(made.model.pretrained_model_name_or_path, encoders=False).net
    names, found = released_names(net, lambda state: family.to_released(state, {})), blocks_of(net, family.blocks)
    ours = {id(weight): name for name, weight in net.named_parameters()}
    first = tuple(names[ours[id(weight)]] for weight in found[0].parameters())  # so that gradients pass all others
    assert len(found) > 1
    settings = {"trainable_modules": first, "gradient_checkpointing": recomputed}
    sent = []

    def copy(there, home):
        sent.append(home.data_ptr())
        there.copy_(home)

    monkeypatch.setattr(trained_network, "swap", partial(blocks.swap, copy=copy))
    still = steps(start, **settings)
    assert not sent
    assert_same(steps(start, blocks_to_swap=1, **settings), still)
    assert len(sent) == 2 * STEPS * len(set(sent))  # each tensor in both passes
    with pytest.raises(UserError, match=f"blocks_to_swap is {len(found)}, but"):
        steps(start, blocks_to_swap=len(found), **settings)


def test_adapters_over_a_coarse_base_learn_alike_with_its_blocks_swapped(start):
    family, made, *_ = start
    net = family.load(made.model.pretrained_model_name_or_path, encoders=False, base_weights="nf4").net
    count, before = len(blocks_of(net, family.blocks)), dict(net.state_dict())
    settings = {"rank": 1, "base_weights": "nf4", "mixed_precision": "bf16"}
    still = steps(start, **settings)
    assert_same(steps(start, **settings, blocks_to_swap=count), still)
    told, learner = still
    assert all(loss > 0 and norm > 0 for loss, norm in told)
    after = {name.replace(".base_layer.", "."): weight for name, weight in learner.plain.state_dict().items()}
    assert_equal({name: after[name] for name in before}, before)


def test_what_pissa_began_with_waits_with_its_block(start):
    family, made, *_ = start
    net = family.load(made.model.pretrained_model_name_or_path, encoders=False).net
    settings = {"rank": 1, "lora_init": "pissa"}
    if family.name == "toy":
        settings["target_name"] = ("text",)  # another of its layers has one input, and twice the rank is 2
    assert_same(steps(start, **settings, blocks_to_swap=len(blocks_of(net, family.blocks))), steps(start, **settings))


class Several(Engine):
    """As if there were two processes."""

    @property
    def world(self) -> int:
        return 2


@pytest.mark.parametrize("alone", [{"step_in_backward": True}, {"blocks_to_swap": 1}], ids=str)
def test_what_only_one_process_can_do_is_refused_to_several(alone, start, monkeypatch):
    def engine(precision, real=Engine):
        found = real(precision)
        found.__class__ = Several
        return found

    monkeypatch.setitem(steps.__globals__, "Engine", engine)
    with pytest.raises(UserError, match=f"{next(iter(alone))} is .* and there are 2 processes"):
        steps(start, **alone)
