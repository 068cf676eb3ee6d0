"""What a run promises, in every family and mode: exact resume, previews, held-out loss, ledger, report, checkpoint."""

import csv
import json
import math
import signal
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pytest
import torch

from reeltune import families
from reeltune.cache.fill import fill
from reeltune.config.recipe import Recipe
from reeltune.core.rng import dice
from reeltune.core.types import Batch, Crop, MaskLaw, Shape
from reeltune.data.masks import draw_mask
from reeltune.data.media import measure, read_frames
from reeltune.diffusion.loss import settle
from reeltune.export.main import export
from reeltune.families import configs, weights
from reeltune.families.spec import Family, Parts
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.sampling.sample import Setup
from reeltune.training.loop import train
from tests.families.every_family import Pair
from tests.runs.caching import cached
from tests.runs.same_run import StopAfter, assert_same_end, rows
from tests.runs.small_run import data_set, recipe

pytestmark = [pytest.mark.quick_by_family("toy", "wan_fun", "easyanimate"), pytest.mark.each_once]
SHAPE = Shape(5, 32, 64)
STEPS, TEXT_DROP = 4, 0.5
PREVIEWS = {"preview_count": 1, "preview_steps": 2, "validation_steps": 2}
RATES = {  # condition -> share of samples it is dropped in; inpaint: of those of which everything is to be made
    "toy": {"control": 0.1},
    "wan_fun": {"control": 0.1, "ref": 0.1, "full_ref": 0.1, "image": 0.1, "inpaint": 0.9, "first_frame": 0.5},
    "easyanimate": {"control": 0.2, "ref": 0.2, "inpaint": 0.9},
    "hunyuan_video": {},
    "cogvideox_fun": {"inpaint": 0.9},
}
MASKS = {  # family and mode -> how likely each kind is
    ("wan_fun", "inpaint"): MaskLaw(),
    ("wan_fun", "i2v"): MaskLaw({"after_first": 1.0}, {"all": 1.0}),
    ("wan_fun", "ti2v"): MaskLaw({"after_first": 1.0}, {"all": 1.0}),
    ("wan_fun", "control_ref"): MaskLaw(),
    ("wan_fun", "control_ref_camera"): MaskLaw(),
    ("easyanimate", "inpaint"): MaskLaw(picture={"block": 0.2, "all": 0.8}, spots_on_all_frames=True),
    ("cogvideox_fun", "inpaint"): MaskLaw(),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=8)


@dataclass(frozen=True)
class Runs:
    pair: Pair
    family: Family
    model: Path
    whole: Path  # unbroken, with previews and held-out losses on the way
    halves: Path  # stopped after two steps, which read the cache, and resumed without one; it makes no previews
    recipe: Recipe  # of the unbroken one, but with clips read in as many ways as there are epochs

    def told(self, kind: str) -> list[dict]:
        lines = map(json.loads, (self.whole / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    @property
    def entries(self) -> list[dict]:
        return json.loads(Path(self.recipe.data.train_data_meta).read_text())


def never(*_):
    raise AssertionError("a frozen network was read")


@pytest.fixture(scope="module")
def runs(pair, data, reports, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "model").mkdir()
    model = pair.lay_out(folder / "model")
    family = families.find(model)
    settings = {
        **pair.asked,
        "max_train_steps": STEPS,
        "checkpointing_steps": 100,
        "text_drop_ratio": TEXT_DROP,
        "fix_sample_size": SHAPE[1:],
        "held_out_share": 0.25,
    }
    if "full_ref" in family.drop and pair.mode == "control_ref":
        settings |= {"control_ref_image": "random", "add_full_ref_image_in_self_attention": True}
    plain = recipe(model, data, folder / "whole", **settings, **PREVIEWS)
    settings["cache_variants"] = 2
    with reports(curves=False):
        assert train(recipe(model, data, folder / "whole", **settings, **PREVIEWS)) == 0
    halves = model, data, folder / "halves"
    first = cached(recipe(*halves, **settings), folder / "cache")
    assert fill(first) == 0
    with pytest.MonkeyPatch.context() as patch, StopAfter(2):
        patch.setattr(Parts, "_read", never)
        assert train(first) == 128 + signal.SIGTERM
    assert train(recipe(*halves, resume_from_checkpoint="latest", **settings)) == 0
    return Runs(pair, family, model, folder / "whole", folder / "halves", plain)


def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one_that_was_looked_at(runs):
    """And what is read from a cache is what is made live: steps, and the held-out loss before them."""
    assert_same_end(runs.halves, runs.whole, STEPS, kinds=("step",))
    assert (runs.halves / "checkpoint-2/progress.json").is_file()
    assert not (runs.halves / "previews").exists()
    ends = [row for row in rows(runs.whole, ("validation",)) if row["step"] in (0, STEPS)]
    assert rows(runs.halves, ("validation",)) == ends


def test_it_learns(runs):
    steps = runs.told("step")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert len({row["loss"] for row in steps}) == STEPS


def test_held_out_losses_are_paired(runs):
    at = runs.told("validation")
    assert [row["step"] for row in at] == [0, 2, STEPS]
    assert at[0]["difference"] == 0 and at[0]["loss"] == at[0]["loss_start"]
    for row in at:
        assert row["start_step"] == 0 and row["loss_start"] == at[0]["loss"] and len(row["per_band"]) == 2
        numbers = [row["loss"], *row["band95"], *(band["loss"] for band in row["per_band"])]
        assert all(map(math.isfinite, numbers)) and row["n"] == 2
        assert row["difference"] == pytest.approx(row["loss"] - row["loss_start"], abs=1e-9)
        assert sum(band["loss"] for band in row["per_band"]) / 2 == pytest.approx(row["loss"])
    assert at[-1]["difference"] != 0


def test_previews_are_clips_with_their_settings_beside(runs):
    folder = runs.whole / "previews"
    controlled = "control" in runs.family.needs.get(runs.pair.mode, ())
    names = ["step-0", "step-2", "step-4", "truth", *(["control"] if controlled else [])]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names:
        clip = folder / name / "0.mp4"
        seen = measure(clip, "video")
        assert (seen.frames, seen.height, seen.width, seen.fps) == (*SHAPE, 8.0)
        assert read_frames(clip, range(SHAPE.frames), Crop(*SHAPE[1:], 0, 0), SHAPE).shape == (5, 3, 32, 64)
    for step in (0, 2, STEPS):
        told = json.loads((folder / f"step-{step}/0.json").read_text())
        assert Shape(told["frames"], told["height"], told["width"]) == SHAPE
        assert told["prompt"] == runs.entries[told["entry"]]["text"]
        assert (told["seed"], told["steps"], told["guidance_scale"]) == (42, 2, 6.0)


def test_the_ledger_adds_up_to_the_metadata(runs):
    ledger = json.loads((runs.whole / "ledger.json").read_text())
    parts = [ledger[name] for name in ("used", "held_out", "not_reached", "left_out")]
    assert sum(parts) == ledger["entries"] == len(runs.entries)
    assert ledger["held_out"] == 2 and ledger["samples"] == 2 * STEPS and ledger["failed_reads"] == 0
    stills = sum(entry["type"] == "image" for entry in runs.entries)
    assert ledger["left_out"] == (stills if runs.family.least_frames > 1 else 0) == len(ledger["problems"])
    with (runs.whole / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    paths = [str(Path(runs.recipe.data.train_data_dir) / entry["file_path"]) for entry in runs.entries]
    assert [line["path"] for line in lines] == paths
    assert sum(int(line["used"]) + int(line["repeated"]) for line in lines) == ledger["samples"]
    assert all((line["status"] == "used") == (int(line["used"]) + int(line["repeated"]) > 0) for line in lines)


def test_the_report_names_the_run_and_shows_its_previews(runs):
    page = (runs.whole / "report.html").read_text(encoding="utf-8")
    assert escape(runs.family.name) in page and escape(runs.pair.mode) in page
    control = (runs.whole / "previews/control").is_dir()
    shown = (3 + control) + 2 * (1 + control)  # the preview before and after, truth; two samples of the first batch
    assert page.count("data:video/mp4;base64,") == shown
    losses = [f"{row['loss']:.4f}" for row in runs.told("validation")]
    assert losses[0] in page and losses[-1] in page


def test_a_checkpoint_is_the_released_form_and_is_read_again(runs):
    family, folder = runs.family, runs.whole / f"checkpoint-{STEPS}"
    saved = weights.read(folder / "transformer")
    file = weights.saved_transformer(runs.model)
    if weights.has_weights(file):  # the toy has none
        released = weights.peek(file)
        assert {name: tensor.shape for name, tensor in saved.items()} == {name: w.shape for name, w in released.items()}
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # trained_weights
        assert configs.read_config(folder / "transformer") == configs.read_config(file)
    again = family.load(runs.model, encoders=False, transformer_path=folder)
    named = family.to_released(again.net.state_dict(), again.config)
    assert named.keys() == saved.keys() and all(torch.equal(named[name], saved[name]) for name in saved)
    start = family.load(runs.model, encoders=False).net.state_dict()
    moved = [name for name, weight in again.net.state_dict().items() if not torch.equal(weight, start[name])]
    assert len(moved) > len(start) / 2


# ---- what is dropped, and how often


@pytest.fixture(scope="module")
def inputs(runs):
    family, mode, _ = choose_family(runs.recipe)
    return gather(runs.recipe, family, mode, show_progress=False)


def remember(vae: torch.nn.Module) -> None:
    """Equal clips are encoded once: what is dropped is decided beside the VAE."""
    encode, known = vae.encode, {}

    def once(pixels_BCFHW: torch.Tensor):
        key = pixels_BCFHW.shape, pixels_BCFHW.contiguous().view(torch.uint8).numpy().tobytes()
        if key not in known:
            known[key] = encode(pixels_BCFHW)
        return known[key]

    vae.encode = once


@pytest.fixture(scope="module")
def setup(runs):
    family, mode, objective = choose_family(runs.recipe)
    parts = family.load(runs.model)
    if "vae" in parts.frozen:
        remember(parts.frozen["vae"])
    chosen = runs.recipe.model.add_full_ref_image_in_self_attention
    return Setup(family, mode, parts, objective, options={"add_full_ref_image_in_self_attention": chosen})


def test_the_coins_are_the_familys(runs, inputs, monkeypatch):
    """A name's coin is a uniform number of the draw's own seed, dropped below the rate: exact in distribution."""
    family, reader = runs.family, inputs.reader
    rates = RATES[family.name.partition("/")[0]]
    assert family.drop == {name: rates[name] for name in family.drop}
    assert reader.drop == family.drop | {"text": TEXT_DROP}
    assert set(inputs.held_out_reader.drop.values()) <= {0.0}
    monkeypatch.setattr("reeltune.data.loader.read_frames", lambda *_: torch.zeros(1).numpy())
    reader.needs, needs = frozenset(), reader.needs
    kept = []
    for epoch in range(50):
        for draw in (draw for k in range(len(reader.plan(epoch))) for draw in reader.plan(epoch)[k]):
            kept.append(reader.open(draw).keep)
            coins = {name: dice(draw.seed, "keep", name).random() for name in reader.drop}
            assert kept[-1] == {name: coin >= reader.drop[name] for name, coin in coins.items()}
    reader.needs = needs
    for name, rate in reader.drop.items():
        share = sum(not keep[name] for keep in kept) / len(kept)
        assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / len(kept))


def test_masks_come_from_the_draws_own_seeds(runs, inputs):
    needed, reader = runs.family.needs[runs.pair.mode], inputs.reader
    batches = [reader[0, k, 0, 1] for k in range(len(reader.plan(0)))]
    if "mask" not in needed:
        assert all(batch.mask_BFHW is None for batch in batches)
        return
    law = MASKS[runs.family.name.partition("/")[0], runs.pair.mode]
    assert reader.mask_law == inputs.held_out_reader.mask_law == law
    for batch in batches:
        masks = [draw_mask(draw.seed, draw.shape, law) for draw in batch.draws]
        assert all((mask == found.numpy()).all() for mask, found in zip(masks, batch.mask_BFHW, strict=True))


def settled(setup: Setup, batch: Batch, dropped: str | None = None):
    """(conditions, null values) of the batch with everything kept, or all but one."""
    names = ("text", *setup.family.drop)
    batch.keep = {name: torch.full((len(batch.draws),), name != dropped) for name in names}
    encoded = setup.encode(batch)
    seeds = batch.seeds
    return settle(encoded, seeds, setup.parts.null)[1], setup.parts.null | encoded.null


def test_what_is_dropped_is_blank_and_nothing_else_is(runs, inputs, setup):
    family, batch = runs.family, inputs.reader[0, 0, 0, 1]
    present = set(settled(setup, batch)[0])
    rated = set(RATES[family.name.partition("/")[0]])
    assert present & rated <= set(family.drop)
    wholes = {}
    for name in ("text", *family.drop):
        about = name if name in ("full_ref", "inpaint") else "others"
        batch.ref_frame_B = torch.full_like(batch.ref_frame_B, 2 if name == "full_ref" else 0)
        if batch.mask_BFHW is not None:
            batch.mask_BFHW = torch.full_like(batch.mask_BFHW, name == "inpaint")
        if about not in wholes:
            wholes[about], _ = settled(setup, batch)
        whole = wholes[about]
        lacking, null = settled(setup, batch, name)
        gone = family.caption if name == "text" else (name,)
        for cond in whole:
            if cond not in gone:
                assert torch.equal(lacking[cond], whole[cond]), (name, cond)
                continue
            blank = null[cond].to(whole[cond]) if cond in null else torch.zeros_like(whole[cond])
            assert torch.equal(lacking[cond], blank.expand_as(whole[cond])), (name, cond)
            assert not torch.equal(lacking[cond], whole[cond]) or not whole[cond].any(), (name, cond)
    if "inpaint" in family.drop:  # the coin counts only where everything is to be made
        batch.mask_BFHW[:, 0, 0, 0] = False
        assert torch.equal(settled(setup, batch, "inpaint")[0]["inpaint"], settled(setup, batch)[0]["inpaint"])


def test_a_network_wrapped_for_several_processes_answers_alike(inputs, setup):
    """DistributedDataParallel passes on the call, and none of the network's attributes."""

    class Wrapped(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.module = net

        def forward(self, *given, **named):
            return self.module(*given, **named)

    batch = inputs.reader[0, 0, 0, 1]
    encoded, net = setup.encode(batch), setup.parts.net
    x0, cond = settle(encoded, batch.seeds, setup.parts.null)
    level_B = torch.full((len(x0),), 0.5)
    with torch.no_grad():
        answers = [setup.denoise(one, x0, setup.objective.timestep(level_B), cond) for one in (net, Wrapped(net))]
    assert torch.equal(*answers)


def test_the_caption_makes_what_is_dropped_with_it(runs, inputs, setup):
    batch = inputs.reader[0, 0, 0, 1]
    one, _ = settled(setup, batch)
    batch.text = [f"{text} and another beside it" for text in batch.text]
    other, _ = settled(setup, batch)
    assert {cond for cond in one if not torch.equal(one[cond], other[cond])} == set(runs.family.caption)


@pytest.mark.parametrize("diffusers", [False, True], ids=["released", "diffusers"])
def test_its_weights_are_exported_and_answer(diffusers, runs, tmp_path):
    if diffusers and runs.pair.checkpoint == "toy":
        pytest.skip("the toy has no form of diffusers'")
    *_, proof, tried = export(runs.whole / f"checkpoint-{STEPS}", tmp_path / "out", diffusers=diffusers)
    trained = weights.read(runs.whole / f"checkpoint-{STEPS}" / "transformer")
    assert proof.startswith(f"{len(trained)} tensors, bf16")
    assert tried.startswith(f"a forward pass of {runs.family.name} on a clip of ") and tried.endswith(": finite")
    if not diffusers:
        written = weights.read(tmp_path / "out")
        assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in trained.items())
