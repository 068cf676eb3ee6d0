"""In every network: merged into the weights, an adapter answers as the layers do in which it is trained; and a
negative prompt takes the blank caption's place."""

import copy

import pytest
import torch

from reeltune import families
from reeltune.adapters import saved
from reeltune.adapters.apply import applied, check
from reeltune.adapters.layers import begin, inject
from reeltune.adapters.targets import targets
from reeltune.diffusion.loss import blank, gaussian, settle
from reeltune.export.forward_check import black_clip
from reeltune.optim.trainable import released_names
from reeltune.sampling.sample import Setup

pytestmark = [pytest.mark.quick_by_family("toy", "wan_fun"), pytest.mark.first_by_network]


@pytest.fixture(scope="module")
def setup(pair, tmp_path_factory) -> Setup:
    torch.set_num_threads(1)
    model = pair.lay_out(tmp_path_factory.mktemp("model"))
    family = families.find(model)
    return Setup(family, pair.mode, family.load(model), family.objective)


@pytest.fixture(scope="module")
def batch(setup):
    """A clip of noise."""
    made = black_clip(setup.family, setup.mode)
    generator = torch.Generator().manual_seed(0)
    made.pixels_BFCHW.random_(0, 256, generator=generator)
    return made


@pytest.fixture(scope="module")
def encoded(setup, batch):
    return setup.encode(batch)


@pytest.fixture(scope="module")
def answer(setup, encoded):
    """Network -> what it makes of the clip."""
    x0, cond = settle(encoded, [0], setup.parts.null)
    noise, timestep_B = gaussian(x0, [0], "noise"), setup.objective.timestep(torch.tensor([0.7]))

    def ask(net):
        with torch.no_grad():
            return setup.denoise(net, noise, timestep_B, cond)

    return ask


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_it_answers_as_in_training(use_dora, setup, answer):
    net, family = copy.deepcopy(setup.parts.net).eval(), setup.family
    names = released_names(net, lambda state: family.to_released(state, setup.parts.config))
    shapes = {released: net.get_parameter(name).shape for name, released in names.items()}
    around = targets(net, family.blocks, names, rank=1, alpha=3.0, ranks=["0=1"])
    unmerged = copy.deepcopy(net)
    own_names = inject(unmerged, around, names, dtype=torch.float32, use_dora=use_dora)
    begin(unmerged, own_names, how="uniform", seed=0)
    weights = {own_names[name]: weight.data for name, weight in unmerged.named_parameters()}
    learnt = {name: weight for name, weight in weights.items() if name not in shapes}
    generator = torch.Generator().manual_seed(1)
    for name, weight in learnt.items():
        if name.endswith("lora_B.weight"):
            weight.normal_(0, 0.3, generator=generator)
        elif name.endswith("dora_scale"):
            weight.mul_(1.2)
    adapter = saved.adapter_of(learnt, {"alphas": {target.released: target.alpha for target in around}})
    assert len(adapter.layers) == len(around) > 3
    check(adapter, shapes, "adapter")

    plain, trained = (answer(one) for one in (net, unmerged))
    with applied(net, names, [(adapter, 1.0)]):
        merged = answer(net)
    size = plain.abs().max()
    assert (trained - plain).abs().max() > 0.01 * size
    assert (merged - trained).abs().max() < 1e-5 * max(size, 1)
    assert torch.equal(answer(net), plain)


def test_a_negative_prompt_takes_the_blank_captions_place(setup, batch, encoded):
    _, cond = settle(encoded, [0], setup.parts.null)
    null = setup.parts.null | encoded.null
    assert setup.guided_away(batch, "") == {}
    drop = dict.fromkeys(setup.family.caption, torch.tensor([False]))
    blind = blank(cond, drop, null | setup.guided_away(batch, "blurry"))
    batch.text = ["blurry"]
    _, told = settle(setup.encode(batch), [0], setup.parts.null)
    batch.text = ["a clip"]
    assert blind.keys() == told.keys()
    assert all(torch.equal(blind[name], told[name]) for name in told)
    text = setup.family.caption[0]
    assert not torch.equal(blind[text], blank(cond, drop, null)[text])
