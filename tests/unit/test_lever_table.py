"""The table of memory levers: what it refuses, offers, advises and writes; a new row is seen in all of these."""

from pathlib import Path

import pytest
import torch

from reeltune.config.parse import build, flat, settings
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.estimate.remedies import changes, numbers, speedups, values_of
from reeltune.estimate.sharding import ENGINES
from reeltune.memory import choices, levers
from reeltune.memory.lever import ALL, SHARDED, Exclusion, Lever
from reeltune.training.out_of_memory import GREW, PHASES, explained, remedies
from scripts.memory_page import page, table
from tests.unit.test_estimate_parts import estimate

NETWORK = {"blocks": 4, "still_blocks": 0, "tiles": True}
PAGE = Path(__file__).parents[2] / "docs/memory.md"
NEW = Lever(
    "allow_tf32",
    True,
    "half of everything",
    "colour",
    phases=frozenset({"step"}),
    excludes=(Exclusion("mixed_precision", "; they never meet; use bf16", refused=("no",)),),
)


def test_a_new_row_is_seen_in_refusals_remedies_the_message_and_the_page(monkeypatch):
    monkeypatch.setattr(levers, "LEVERS", (*levers.LEVERS, NEW))
    with pytest.raises(UserError) as told:
        build({"allow_tf32": True, "mixed_precision": "no"})
    assert told.value.problems == ["allow_tf32 is true and mixed_precision is no; they never meet; use bf16"]
    last = list(changes(values_of(Recipe(), "one", 1, **NETWORK)))[-1]
    assert (last.settings, last.words, last.price) == ({"allow_tf32": True}, "allow_tf32: true", "colour")
    assert last.phases == {"step"}
    assert list(remedies("step", Recipe()))[-1] == "allow_tf32: true"
    assert "allow_tf32: true" not in remedies("forward", Recipe())  # it spares nothing there
    assert "allow_tf32: true" not in remedies("step", build({"mixed_precision": "no"}))  # it would be refused
    assert table().splitlines()[-1] == "| `allow_tf32: true` | half of everything | colour | `mixed_precision` no |"


def test_the_page_has_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "make docs"
    assert text.count(table()) == 1
    assert len(table().splitlines()) == 2 + len(levers.LEVERS)


def test_rows_name_settings_engines_and_phases_that_there_are():
    names = settings().keys()
    for lever in levers.LEVERS:
        assert lever.setting in names or lever.setting == "gpus"
        assert {*lever.unless, *lever.replaces, *lever.beside, *(one.setting for one in lever.excludes)} <= names
        assert lever.phases <= ALL
        assert lever.price.format_map({}) == lever.price and lever.spares
    assert set(SHARDED) == {name for name, engine in ENGINES.items() if engine.own_copies}
    assert PHASES.keys() <= GREW.keys() and frozenset().union(*PHASES.values()) <= ALL


BIG = {"train_batch_size": 3, "mixed_precision": "bf16", "gradient_checkpointing_share": 0.5}


PRODIGY = {"use_prodigy": True, "learning_rate": 1}


@pytest.mark.parametrize("tree", [{}, {**BIG, "gradient_checkpointing": True}, {"use_8bit_adam": True}, PRODIGY])
@pytest.mark.parametrize("gpus", [1, 2])
def test_what_is_offered_can_be_written_and_has_its_price(tree, gpus):
    recipe = build(tree)
    values = values_of(recipe, "one" if gpus == 1 else "ddp", gpus, blocks=5, still_blocks=5, tiles=True)
    offered = list(changes(values))
    assert len({tuple(change.settings.items()) for change in offered}) == len(offered) > (5 if tree is PRODIGY else 10)
    for change in offered:
        written = {name: value for name, value in change.settings.items() if name != "gpus"}
        assert flat(build({**flat(recipe), **written})) != flat(recipe), change.words
        assert "{" not in change.price.format_map(numbers(estimate(), estimate(), change.settings))


def words(tree, engine="one", gpus=1, **network):
    return [change.words for change in changes(values_of(build(tree), engine, gpus, **{**NETWORK, **network}))]


def test_what_one_device_is_offered():
    tree = {"output_dir": "run", "video_sample_n_frames": 49, "preview_count": 0}
    same = ["low_vram: true", "cache_folder: run/cache, cache_variants: 4"]
    same += [f"gradient_checkpointing: {value}" for value in ("products_kept", "attention_kept", "true")]
    more = ["offload_activations: true", "step_in_backward: true", "vae_tiling: true"]
    lean = ["trained_weights: bf16_stochastic", "use_8bit_adam: true", "use_came: true", "use_adafactor: true"]
    adapters = ["rank: 32", "rank: 32, base_weights: int8", "rank: 32, base_weights: int8, blocks_to_swap: 4"]
    lean += adapters
    shorter = ["video_sample_n_frames: 25", *(f"--gpus {count}, engine: fsdp" for count in (2, 4, 8))]
    assert words(tree) == ["encode_ahead: false", *same, *more, *lean, *shorter]
    assert words({**tree, "low_vram": True}) == [*same[1:], *more, *lean, *shorter]
    assert "blocks_to_swap: 7" in words(tree, still_blocks=7)
    assert "vae_tiling: true" not in words(tree, tiles=False)
    assert words({**tree, "vae_mini_batch": 2})[8:10] == ["vae_mini_batch: 1", "vae_tiling: true"]
    assert "step_in_backward: true" not in words({**tree, "gradient_accumulation_steps": 2})
    products = words({"gradient_checkpointing": "products_kept"})
    assert [line for line in products if "checkpointing:" in line] == same[-2:]
    kept = words({"gradient_checkpointing": "attention_kept"})
    assert "gradient_checkpointing: true" in kept and not any("_kept" in line for line in kept)
    assert "step_in_backward: true" not in kept
    assert not any("_kept" in line for line in words({"gradient_checkpointing": True}))
    assert not any("_kept" in line for line in words({"attention": "math"}))
    assert words({"train_batch_size": 3})[0] == "train_batch_size: 1, gradient_accumulation_steps: 3"
    assert [line for line in words({"rank": 8}) if "base" in line] == ["base_weights: int8", "base_weights: nf4"]
    assert not any(line.startswith("base") for line in words({"rank": 8, "base_weights": "int8"}))
    assert "use_came: false, use_8bit_adam: true" in words({"use_came": True})
    assert "use_8bit_adam: false, use_adafactor: true" in words({"use_8bit_adam": True})
    assert not {"low_vram: true", "encode_ahead: false"} & set(words({"cache_folder": "x", "cache_variants": 1}))
    assert not any(line.startswith("video_sample_n_frames") for line in words({"video_sample_n_frames": 9}))


def test_adapters_are_offered_in_place_of_the_whole_network():
    assert words({}, blocks=0)[-6:-4] == ["rank: 32", "rank: 32, base_weights: int8"]
    assert not any("rank" in line for line in words({"trainable_modules": ["ffn"]}))
    trained = words({"rank": 8}, still_blocks=4)
    assert {"base_weights: int8", "base_weights: nf4", "blocks_to_swap: 4"} <= set(trained)
    assert not any("rank" in line for line in trained)


def test_what_several_devices_are_offered():
    ddp = words({}, "ddp", 2)
    assert {"engine: zero2", "engine: fsdp", "context_parallel: 2", "offload_activations: true"} <= set(ddp)
    assert not {"step_in_backward: true", "offload: true"} & set(ddp)
    assert [line for line in ddp if "--gpus" in line] == ["--gpus 4, engine: fsdp", "--gpus 8, engine: fsdp"]
    fsdp = words({"engine": "fsdp", "keep_gathered": True}, "fsdp", 2)
    assert {"offload: true", "keep_gathered: false"} <= set(fsdp)
    gone = {"engine: fsdp", "engine: zero2", "offload_activations: true", "trained_weights: bf16_stochastic"}
    assert not gone & set(fsdp)
    assert "use_came: true" in words({"engine": "zero2"}, "zero2", 2)


def test_what_more_devices_cannot_have_is_turned_off_with_them():
    lean = {"use_adafactor": True, "trained_weights": "bf16_stochastic", "blocks_to_swap": 3, "step_in_backward": True}
    off = "use_adafactor: false, trained_weights: fp32, step_in_backward: false, blocks_to_swap: 0"
    assert f"--gpus 8, engine: fsdp, {off}" in words(lean)
    assert "--gpus 8, engine: fsdp" in words({"rank": 8, "base_weights": "nf4"})
    came = words({"use_came": True}, "ddp", 2)
    assert "engine: fsdp, use_came: false" in came
    assert "engine: zero2" in came  # which has it


def test_phases_that_are_left_to_a_cache():
    def phases(tree):
        (found,) = (one.phases for one in changes(values_of(build(tree), "one", 1, **NETWORK)) if "cache" in one.words)
        return found

    assert phases({}) == ALL
    assert phases({"low_vram": True}) == {"encode", "preview"}


IN_THE_PASS = [
    "encode_ahead: false",
    "low_vram: true",
    "cache_folder, which `reeltune cache` fills before",
    "gradient_checkpointing: products_kept",
    "gradient_checkpointing: attention_kept",
    "gradient_checkpointing: true",
    "offload_activations: true",
    "step_in_backward: true, with one process",
    "trained_weights: bf16_stochastic",
    "use_8bit_adam: true",
    "use_came: true",
    "use_adafactor: true",
    "train adapters (rank: 32)",
    "smaller clips by video_sample_n_frames or the sample sizes",
    "more devices",
]
SHARDED_IN_THE_PASS = [*IN_THE_PASS[:6], "offload: true", *IN_THE_PASS[-3:]]


STEPPED = {"step_in_backward": True, "train_batch_size": 2}


@pytest.mark.parametrize(
    ("doing", "tree", "lines"),
    [
        ("forward", {}, IN_THE_PASS),
        ("forward", {"engine": "fsdp"}, SHARDED_IN_THE_PASS),
        (
            "step",
            {"use_adafactor": True, "low_vram": True, "use_ema": True},
            [
                "step_in_backward: true, with one process",
                "use_ema: false",
                "trained_weights: bf16_stochastic",
                *IN_THE_PASS[-3::2],
            ],
        ),
        ("step in backward", STEPPED, [*IN_THE_PASS[:3], *IN_THE_PASS[5:7], *IN_THE_PASS[8:]]),
        (
            "encode",
            {"low_vram": True, "engine": "fsdp", "train_batch_size": 2, "vae_mini_batch": 2},
            [
                "train_batch_size: 1, gradient_accumulation_steps: 2",
                IN_THE_PASS[2],
                "offload: true",
                "vae_mini_batch: 1",
                "vae_tiling: true",
                *IN_THE_PASS[-3:],
            ],
        ),
        (
            "validate",
            {"low_vram": True, "engine": "fsdp"},
            [IN_THE_PASS[2], "preview_count: 0", "offload: true", "vae_tiling: true", *IN_THE_PASS[-3:]],
        ),
        ("start", {}, [*IN_THE_PASS[1:3], *IN_THE_PASS[8:13], "more devices"]),
    ],
)
def test_what_a_full_device_is_told_to_change(doing, tree, lines):
    assert list(remedies(doing, build(tree))) == lines


def test_a_step_within_the_backward_pass_is_called_so_and_no_accumulation_advised():
    told = str(explained(torch.OutOfMemoryError("full"), "step", 3, None, {"weights": 10**9}, build(STEPPED)))
    assert "the device is full in the backward pass, with the optimizer's step in it, of step 3 (full)" in told
    assert "activations, gradients and optimizer state grew" in told
    assert "gradient_accumulation_steps" not in told and "train_batch_size" not in told
    plain = str(explained(torch.OutOfMemoryError("full"), "step", 3, None, {}, Recipe()))
    assert "full in the optimizer's step of step 3" in plain


@pytest.mark.parametrize(
    ("said", "words"), [("Unable to allocate 9. GiB", "Unable to allocate 9"), ("a\nb", "a"), ("", "MemoryError")]
)
def test_memory_of_the_machine_is_told_from_a_devices(said, words):
    told = str(explained(MemoryError(said), "data", 0, None, {}, build({"train_batch_size": 2})))
    assert f"the memory of this machine is full in reading data of step 0 ({words})" in told
    assert "train_batch_size: 1" in told and "optimizer" not in told


def test_nothing_is_offered_that_goes_with_no_lever_in_use():
    both = {"train_batch_size": 2}
    assert any("gradient_accumulation_steps" in line for line in words(both))
    assert not any("gradient_accumulation_steps" in line for line in words({**both, "step_in_backward": True}))


def faster(tree, **network):
    values = values_of(build(tree), "one", 1, **{**NETWORK, **network})
    return [[change.words for change in ways] for ways in speedups(values)]


def test_what_a_run_could_do_without_for_speed():
    """Only what costs time and changes no result, the dearest first; nothing that would be refused."""
    checkpointing = [f"gradient_checkpointing: {value}" for value in ("false", "products_kept", "attention_kept")]
    assert faster({}) == faster({"use_8bit_adam": True, "vae_tiling": True, "rank": 8}) == []
    assert faster({"low_vram": True, "gradient_checkpointing": True}) == [checkpointing, ["low_vram: false"]]
    assert faster({"gradient_checkpointing": "attention_kept"}) == [checkpointing[:2]]
    assert faster({"gradient_checkpointing": "products_kept"}) == [checkpointing[:1]]
    assert faster({"gradient_checkpointing": True, "attention": "math"}) == [checkpointing[:1]]
    assert faster({"step_in_backward": True, "gradient_checkpointing": True}) == [
        ["step_in_backward: false"],
        checkpointing[:1],
    ]
    assert faster({"rank": 8, "blocks_to_swap": 2}, blocks=4)[0] == ["blocks_to_swap: 0"]
    assert len(list(choices.faster(flat(build({"gradient_checkpointing": True, "low_vram": True}))))) == 2
    assert faster({"low_vram": True, "cache_folder": "x", "cache_variants": 1}) == []  # encoders do not come and go
