"""What leaves the device while something else learns there."""

import pytest
import torch
from torch import nn

from reeltune.config.parse import build
from reeltune.distributed.engine import Engine
from reeltune.families.toy.family import FAMILY
from reeltune.memory.resting import Resting
from reeltune.training.learner import learner_of

CPU = torch.device("cpu")  # in place of a device that is not here


def test_all_leaves_and_comes_back_in_its_place():
    """Each tensor once, and stays the one that others know it by."""
    learns, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), False)
    came, there = [], torch.empty(1, device="meta")  # on another device, as blocks_to_swap has it
    resting = Resting(
        lambda: [(learns, True), (frozen, False), (learns, True), (there, True)],
        CPU,
        to_host=lambda tensor: torch.full_like(tensor, 7),
        to_device=lambda home, device: came.append(home) or home + 1,
    )
    state = {learns: "of it"}
    resting.leave()
    resting.leave()  # is away
    assert learns.tolist() == [7] * 3 and frozen.tolist() == [7] * 2 and there.is_meta
    resting.come()
    resting.come()
    assert learns.tolist() == [8] * 3 and len(came) == 2
    assert learns.requires_grad and not frozen.requires_grad and state[learns] == "of it"
    resting.leave()
    assert learns.tolist() == [8] * 3 and frozen.tolist() == [7] * 2
    assert frozen.data_ptr() == came[1].data_ptr()  # kept, page-locked


def test_what_did_not_change_is_not_sent():
    sent = []
    learns, frozen = torch.zeros(3), torch.zeros(2)
    resting = Resting(
        lambda: [(learns, True), (frozen, False)],
        CPU,
        to_host=lambda tensor: sent.append(len(tensor)) or tensor.clone(),
        to_device=lambda home, device: home.clone(),
    )
    resting.leave()
    resting.come()
    learns += 1
    frozen += 1  # which nothing does: told by its old value
    resting.leave()
    assert sent == [3, 2]
    assert learns.tolist() == [1, 1, 1] and frozen.tolist() == [0, 0]


def test_a_tensor_of_another_size_gets_another_place():
    grows = torch.zeros(2)
    resting = Resting(lambda: [(grows, True)], CPU, to_host=torch.clone, to_device=lambda home, _: home.clone())
    resting.leave()
    resting.come()
    grows.data = torch.ones(4)
    resting.leave()
    assert grows.tolist() == [1] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_ema": True, "trained_weights": "bf16_stochastic"},
        {"rank": 4, "target_name": ["text"], "use_ema": True},
        {"use_came": True},
        {"use_muon": True},
        {"use_8bit_adam": True},
    ],
)
def test_nothing_of_a_learner_stays(settings, tmp_path):
    """Weights, the optimizer's state and the average, and it steps to the same bits after."""
    if "use_8bit_adam" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    ends = []
    for rests in (False, True):
        (tmp_path / "toy.json").write_text("{}")
        recipe = build(
            {
                "pretrained_model_name_or_path": str(tmp_path),
                "mixed_precision": "bf16" if "trained_weights" in settings else "no",
                **settings,
            }
        )
        dtype = torch.bfloat16 if "trained_weights" in settings else torch.float32
        parts = FAMILY.load(tmp_path, dtype=dtype)
        learner = learner_of(recipe, FAMILY, parts, Engine("no"), batch=1, accumulate=1)
        gone = []

        def leaves(tensor, gone=gone):
            home = tensor.clone()
            gone.append(tensor)
            return home

        learner.resting = Resting(learner._on_device, CPU, to_host=leaves, to_device=lambda home, _: home.clone())
        for step in range(3):
            if rests:
                learner.resting.leave()
                for tensor in gone:
                    tensor.fill_(float("nan"))  # what is not sent, or stays in use there, would be seen
                learner.resting.come()
            for weight in learner.learning:
                weight.grad = torch.full_like(weight, 0.1 + step)
            learner.step(step, 1e-2)
        ends.append([weight.detach().clone() for weight in learner.plain.parameters()])
        if rests:
            held = sum(tensor.nbytes for tensor in gone)
            assert held >= sum(learner.held_bytes().values()) - learner.held_bytes()["gradients"]
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
