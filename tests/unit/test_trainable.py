import pytest
from torch import nn

from reeltune.core.errors import UserError
from reeltune.optim.trainable import released_names, select


def net():
    return nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2), "head": nn.Linear(2, 2, bias=False)})


def rename(state):
    return {name.replace("to_q", "self_attn.q").replace("to_k", "self_attn.k"): w for name, w in state.items()}


def trained(model):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_patterns_are_released_names():
    model = net()
    groups = select(model, released_names(model, rename), ["attn.q"], ["head"])
    assert trained(model) == ["head.weight", "to_q.bias", "to_q.weight"]
    assert [(group["rate"], len(group["params"])) for group in groups] == [(1.0, 2), (0.5, 1)]


def test_dot_is_everything_and_low_rate_wins():
    model = net()
    groups = select(model, released_names(model, rename), ["."], ["attn.k"])
    assert trained(model) == sorted(name for name, _ in model.named_parameters())
    assert [(group["rate"], len(group["params"])) for group in groups] == [(1.0, 3), (0.5, 2)]


def test_patterns_that_match_nothing_are_all_named():
    model = net()
    with pytest.raises(UserError) as error:
        select(model, released_names(model, rename), ["attn", "to_q"], ["nothing"])
    assert [line.split(" has ")[1].split(",")[0] for line in error.value.problems] == ["'to_q'", "'nothing'"]
    assert "self_attn.q.weight" in str(error.value)
    with pytest.raises(UserError, match="nothing would learn"):
        select(model, released_names(model, rename), [])
