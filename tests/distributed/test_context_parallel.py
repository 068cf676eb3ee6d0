"""A clip shared by two processes is the clip of one: losses, gradients, account."""

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from diffusers import HunyuanVideoTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

from reeltune import families
from reeltune.cache.fill import fill
from reeltune.core.errors import UserError
from reeltune.families import weights
from reeltune.families.hunyuan_video import family as hunyuan
from reeltune.families.wan_fun import family as wan
from reeltune.families.wan_fun.sizes import TEXT_LENGTH
from reeltune.run.model import choose_family, even_side
from reeltune.training import loop as module
from tests.distributed.processes import FORKS, free_port, train
from tests.families.every_family import SHOWN, pairs
from tests.families.tiny_wan import filled, network, tiny_checkpoint
from tests.runs.same_run import assert_equal
from tests.runs.small_run import recipe

STEPS, CLIPS = 3, 2  # of a micro-step
with_deepspeed = importlib.util.find_spec("deepspeed") is not None
FULL_REF = {"control_ref_image": "random", "add_full_ref_image_in_self_attention": True}
QUICK = {"wan": ("ddp",)}
MORE = {  # every network's plan, and every engine over a network of each family
    "wan": ("fsdp", "zero2", "zero3"),
    "hunyuan": ("zero2",),
    "hunyuan_concat": ("fsdp",),
    "hunyuan_i2v": ("ddp", "zero3"),
}
LIVE = {"cache_folder": None}
TWOS = ("ddp", "fsdp", "zero2", "zero3")


class Runs:
    """Folders of runs: of one process, and of some that share each clip in twos, by model, engine and their number.

    Those of QUICK encode their clips as they train, as that model's one process does; the others, whose networks alone
    are another matter, read them from a cache, which takes half the time.
    """

    def __init__(self, folder, data, goldens):
        self.folder, self.data, self.goldens = folder, data, goldens
        self.alone = {}  # model -> its checkpoint, and the settings that its runs share

    def write(self, model):
        (self.folder / model).mkdir()
        if model == "wan":
            return tiny_checkpoint(self.folder / model, "control_v1.1")
        if model == "hunyuan":
            return SHOWN["hunyuan_video"].write(self.folder / model)
        name = {"hunyuan_i2v": "HunyuanVideo-I2V-i2v", "hunyuan_concat": "HunyuanVideo-I2V-other-i2v"}[model]
        (found,) = [one.values[0] for one in pairs(self.goldens()) if one.id == name]
        return found.lay_out(self.folder / model)

    def recipe(self, model, name, **changes):
        checkpoint, settings = self.alone[model]
        return recipe(checkpoint, self.data, self.folder / f"{model}-{name}", **{**settings, **changes})

    def make_alone(self, model):
        if model in self.alone:
            return
        settings = {
            "fix_sample_size": [32, 64],
            "max_train_steps": STEPS,
            "gradient_checkpointing": True,
            "cache_variants": 1,
            "cache_folder": str(self.folder / f"{model}-cache"),
            **(FULL_REF if model == "wan" else {}),
        }
        self.alone[model] = self.write(model), settings
        assert fill(self.recipe(model, "filled")) == 0
        assert module.train(self.recipe(model, "alone", **(LIVE if model in QUICK else {}))) == 0

    def make(self, wanted, processes=2, resumed=False, in_bf16=()):
        torch.set_num_threads(1)
        shared = []
        for model, engines in wanted.items():
            self.make_alone(model)
            ours = partial(self.recipe, model, context_parallel=2, train_batch_size=2 * CLIPS // processes)
            # In this order: ZeRO-3 leaves a linear layer of its own in its process, with other last bits.
            engines = [engine for engine in engines if with_deepspeed or engine[:4] != "zero"]
            live = LIVE if resumed else {}
            shared += [ours(name=f"{engine}-{processes}", engine=engine, **live) for engine in engines]
            if resumed:
                half = str(self.half_of(model, "ddp-2"))
                shared.append(ours(name="again", engine="ddp", resume_from_checkpoint=half, **LIVE))
            if model in in_bf16:
                changes = {"mixed_precision": "bf16", **LIVE}
                assert module.train(self.recipe(model, "alone-bf16", **changes)) == 0
                shared.append(ours(name="bf16", engine="ddp", **changes))
        train(shared, processes, self.folder)

    def half_of(self, model, name):
        return self.folder / f"{model}-{name}" / "checkpoint-2"

    def rows(self, name, kind):
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [row for row in lines if row["kind"] == kind]

    def assert_as_alone(self, model, engine, processes=2):
        name, alone = f"{model}-{engine}-{processes}", f"{model}-alone"
        if engine.startswith("zero") and not with_deepspeed:
            pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
        ours, theirs = self.rows(name, "step"), self.rows(alone, "step")
        for number in ("step", "epoch", "shape", "samples", "tokens", "lr"):
            assert [row[number] for row in ours] == [row[number] for row in theirs]
        for number, band in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert [row[number] for row in ours] == pytest.approx([row[number] for row in theirs], rel=band)
        held_out = [[row["loss"] for row in self.rows(which, "validation")] for which in (name, alone)]
        assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
        for file in ("ledger.csv", "ledger.json"):
            assert (self.folder / name / file).read_text() == (self.folder / alone / file).read_text()


@pytest.fixture(scope="module")
def runs(request, data, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), data, lambda: request.getfixturevalue("goldens"))


def each(wanted):
    return [pytest.param(model, engine) for model, engines in wanted.items() for engine in engines]


@pytest.fixture(scope="module")
def quick(runs):
    runs.make(QUICK, resumed=True)
    return runs


@pytest.mark.parametrize(("model", "engine"), each(QUICK))
def test_two_processes_that_share_each_clip_are_one(model, engine, quick):
    quick.assert_as_alone(model, engine)


def test_it_resumes_to_the_same_bits(quick):
    last, again = quick.rows("wan-ddp-2", "step")[-1], quick.rows("wan-again", "step")
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in again] == [(3, last["loss"], last["grad_norm"])]
    ours, unbroken = (
        weights.read(quick.folder / f"wan-{name}" / "checkpoint-3/transformer") for name in ("again", "ddp-2")
    )
    assert_equal(ours, unbroken)


def test_a_resumed_run_keeps_it(quick):
    changed = quick.recipe("wan", "changed", resume_from_checkpoint=str(quick.half_of("wan", "ddp-2")))
    with pytest.raises(UserError, match="context_parallel was 2 and is 1"):
        module.train(changed)


@pytest.fixture(scope="module")
def long(runs):
    runs.make(MORE, in_bf16=["hunyuan"])
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("model", "engine"), each(MORE))
def test_on_every_engine(model, engine, long):
    long.assert_as_alone(model, engine)


@pytest.mark.slow
def test_in_bf16_with_weights_in_fp32(long):
    """Where norms answer in the precision of their weights: queries and keys in another than values."""
    ours, alone = ([row["loss"] for row in long.rows(f"hunyuan-{name}", "step")] for name in ("bf16", "alone-bf16"))
    assert len(ours) == STEPS and ours == pytest.approx(alone, rel=5e-3)


@pytest.fixture(scope="module")
def twos(runs):
    runs.make({"wan": TWOS}, processes=4)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", TWOS)
def test_two_pairs_share_two_clips(engine, twos):
    twos.assert_as_alone("wan", engine, processes=4)


# ---- the networks alone: every weight's gradient


SPLITS = {  # name -> (family, what its network differs in)
    "text": (hunyuan.T2V, {}),
    "first frame's tokens": (hunyuan.I2V, {"image_condition_type": "token_replace"}),
    "first frame's channels": (hunyuan.I2V_CONCAT, {"image_condition_type": "latent_concat", "in_channels": 33}),
}


BY_TOKEN = "times by token"


def learnt(name, mesh=None):
    """(answer, gradients by weight) of a tiny network on two clips of three latent frames, eight tokens each."""
    torch.manual_seed(0)
    if name == BY_TOKEN:
        return learnt_by_token(mesh)
    family, changes = SPLITS[name]
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (2, 4, 2)}
    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "text_embed_dim": 12, "pooled_projection_dim": 8}
    channels = {"in_channels": 16, "out_channels": 16, "guidance_embeds": False}
    net = HunyuanVideoTransformer3DModel(**{**sizes, **heads, **channels, **changes})
    cond = {"text": torch.randn(2, 7, 12), "text_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    cond |= {"pooled": torch.randn(2, 8), "ref": torch.randn(2, 16, 1, 4, 8)}
    x, wanted = torch.randn(2, 2, 16, 3, 4, 8)
    if mesh is not None:
        family.split(net, mesh)
    shown = {part: value for part, value in cond.items() if part != "ref" or family.needs[family.modes[0]]}
    answer = family.denoise(net, x, torch.tensor([500.0, 20.0]), shown)
    (answer * wanted).sum().backward()
    return answer.detach(), {name: weight.grad for name, weight in net.named_parameters()}


def learnt_by_token(mesh):
    """The same of Wan2.2-Fun-5B-Control: the first frame of the first clip is known, tokens of a reference lead."""
    net = filled(network("2.2_5b_control", heads=4, layers=1), 0)
    shape = 2, 48, 3, 4, 8
    known = torch.zeros(2, 1, *shape[2:])
    known[0, :, 0] = 1
    cond = {"text": torch.randn(2, TEXT_LENGTH, 24), "known": known, "control": torch.randn(shape)}
    cond |= {"inpaint": torch.randn(2, 52, *shape[2:]), "full_ref": torch.randn(2, 48, 1, 4, 8)}
    x, wanted = torch.randn(2, *shape)
    if mesh is not None:
        wan.CONTROL_5B.split(net, mesh)
    answer = wan.CONTROL_5B.denoise(net, x, torch.tensor([500.0, 20.0]), cond)
    (answer * wanted).sum().backward()
    return answer.detach(), {name: weight.grad for name, weight in net.named_parameters()}


def learn_together(rank, count, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (1, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
    torch.save({name: learnt(name, mesh) for name in (*SPLITS, BY_TOKEN)}, folder / f"{rank}.pt")


@pytest.mark.parametrize("count", [2, 4])
def test_every_gradient_is_that_of_one_process(count, tmp_path):
    """The first frame's tokens are a part of the first process's, or with four all of them and some of the next's."""
    port = free_port()
    forks = [FORKS.Process(target=learn_together, args=(rank, count, port, tmp_path)) for rank in range(count)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(60)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for name in (*SPLITS, BY_TOKEN):
        answer, gradients = learnt(name)
        for theirs, _ in (each[name] for each in found):
            torch.testing.assert_close(theirs, answer)
        small = 1e-6 * max(float(gradient.abs().max()) for gradient in gradients.values())
        for weight, gradient in gradients.items():
            parts = [each[name][1][weight] for each in found]
            together = sum(part for part in parts if part is not None)
            torch.testing.assert_close(together, gradient, rtol=1e-4, atol=small)


# ---- refused


def test_sides_hold_tokens_that_can_be_shared():
    assert {n: even_side(n) for n in (1, 2, 3, 4, 6, 8, 9, 12, 16, 32)} == {
        **{1: 1, 2: 2, 3: 3, 4: 2, 6: 6, 8: 4, 9: 3, 12: 6, 16: 4},
        32: 8,
    }


def test_sizes_that_cannot_be_shared_are_refused(data, tmp_path):
    asked = recipe(tiny_checkpoint(tmp_path, "inp"), data, tmp_path, context_parallel=4, fix_sample_size=[48, 64])
    with pytest.raises(UserError, match=r"fix_sample_size is 48 64, but .* takes multiples of 32"):
        choose_family(asked)


def test_families_without_a_plan_are_refused(any_checkpoint, data, tmp_path):
    model = any_checkpoint.lay_out(tmp_path)
    family = families.find(model)
    asked = recipe(model, data, tmp_path, context_parallel=2, **any_checkpoint.asked)
    if family.split is not None:
        assert choose_family(asked)[0].geometry.multiple == 2 * family.geometry.multiple
        return
    assert not family.name.startswith("wan")
    with pytest.raises(UserError, match=rf"context_parallel is 2, but {family.name} has no plan"):
        choose_family(asked)


def test_text_filled_up_for_three_says_the_same(tmp_path):
    parts = hunyuan.T2V.load(SHOWN["hunyuan_video"].write(tmp_path), encoders=False)
    draw = torch.Generator().manual_seed(0)
    config = parts.net.config
    x, text = torch.randn(2, 16, 2, 4, 4, generator=draw), torch.randn(2, 7, config.text_embed_dim, generator=draw)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    cond = {"pooled": torch.randn(2, config.pooled_projection_dim, generator=draw), "guidance": torch.full((2,), 6e3)}
    more_text, more_mask = hunyuan.even_text(text, mask, 3)
    assert more_mask.shape == (2, 9) and more_mask.sum() == mask.sum()
    with torch.no_grad():
        said, more = (
            hunyuan.denoise(parts.net, x, torch.tensor([500.0, 20.0]), {**cond, "text": a, "text_mask": b})
            for a, b in ((text, mask), (more_text, more_mask))
        )
    torch.testing.assert_close(more, said)


def test_heads_that_cannot_be_shared_are_refused():
    mesh = {"ulysses": SimpleNamespace(size=lambda: 4)}
    with pytest.raises(UserError, match=r"is 4, but the network has 6 attention heads; use one of 1, 2, 3, 6"):
        wan.BASE.split(network("inp", width=72, heads=6), mesh)


def test_fewer_processes_than_share_a_clip_are_refused(data, tmp_path):
    (tmp_path / "toy").mkdir()
    asked = recipe(SHOWN["toy"].write(tmp_path / "toy"), data, tmp_path / "run", context_parallel=2)
    with pytest.raises(UserError, match=r"context_parallel is 2, of which the number of processes, 1, is no multiple"):
        module.train(asked)
