"""What several processes saved in shares, in one folder again: bit for bit the network that they trained."""

import ctypes
import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import export_peak
from reeltune import compat, families
from reeltune.checkpoint.folder import SHARES, is_shared
from reeltune.checkpoint.state import Shared
from reeltune.core.errors import UserError
from reeltune.distributed import sharded_io
from reeltune.export.main import export
from reeltune.families import configs, tensor_files, weights
from tests.distributed.gathered import leave_gathered
from tests.distributed.processes import environment, train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe
from tests.unit.test_compat import ROOT

STEPS = 2
RATE = 1e-3
ZERO = [] if importlib.util.find_spec("deepspeed") is None else ["zero2", "zero3"]
of_engines = pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of runs, one an engine, each with checkpoint-2 and gathered.safetensors; and the checkpoint trained."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_checkpoint(folder / "model", "control_v1.1")
    data = data_set(folder / "data", clips=4)
    settings = {
        "max_train_steps": STEPS,
        "train_batch_size": 1,
        "checkpointing_steps": 100,
        "use_ema": True,
        "learning_rate": RATE,
    }
    settings |= {"trainable_modules": ["blocks.1", "head"]}  # the rest rests
    engines = ["fsdp", *ZERO]
    changes = {engine: {**settings, "engine": engine, "use_ema": engine == "fsdp"} for engine in engines}
    recipes = [recipe(model, data, folder / engine, **changes[engine]) for engine in engines]
    train(recipes, 2, folder, leave_gathered)
    return folder


def made(runs, engine):
    if engine != "fsdp" and engine not in ZERO:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
    assert is_shared(runs / engine / f"checkpoint-{STEPS}")
    family = families.find(runs / "model")
    live = weights.read(runs / engine / "gathered.safetensors")
    config = configs.read_config(runs / engine / f"checkpoint-{STEPS}" / "transformer")
    return runs / engine / f"checkpoint-{STEPS}", family.to_released(live, config)


def assert_equal(ours, theirs, dtype):
    assert ours.keys() == theirs.keys()
    unlike = [name for name in ours if not torch.equal(ours[name], theirs[name].to(dtype))]
    assert not unlike and {tensor.dtype for tensor in ours.values()} == {dtype}


@of_engines
def test_export_is_the_network_that_was_trained(engine, runs, tmp_path):
    checkpoint, live = made(runs, engine)
    start = weights.read(runs / "model")
    assert any(not torch.equal(live[name], start[name].float()) for name in live)
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        *_, proof, tried = export(checkpoint, tmp_path / dtype, dtype=dtype)
        assert_equal(weights.read(tmp_path / dtype), live, kind)
        assert proof == f"{len(live)} tensors, {dtype}, released names: all read back equal"
        assert tried == "a forward pass of wan_fun/control_v1.1 on a clip of 5x64x64: finite"


@pytest.mark.parametrize("engine", [pytest.param("fsdp", marks=pytest.mark.slow), "zero2", "zero3"])
def test_the_guides_command(engine, runs, capfd):
    """As printed; from a shell once."""
    checkpoint, live = made(runs, engine)
    out = Path(f"{checkpoint}-outputs")
    argv = [str(checkpoint), str(out), "--max_shard_size", "80GB", "--safe_serialization"]
    if engine == "fsdp":
        subprocess.run([sys.executable, "scripts/zero_to_bf16.py", *argv], cwd=ROOT, env=environment(), check=True)
    else:
        assert compat.zero_to_bf16(argv) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert_equal(weights.read(out), live, torch.bfloat16)
    told = capfd.readouterr().out
    assert "all read back equal" in told and told.endswith("finite\n")


def test_shards_with_their_index(runs, tmp_path):
    checkpoint, live = made(runs, "fsdp")
    assert compat.zero_to_bf16([str(checkpoint), str(tmp_path / "out"), "--max_shard_size", "100KB"]) == 0
    index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in live.values())
    assert index["weight_map"].keys() == live.keys() and len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), live[name].bfloat16())
    largest = max(2 * tensor.numel() for tensor in live.values())
    for file in tensor_files.files_of(tmp_path / "out"):
        sizes = [tensor.numel() * 2 for tensor in weights.peek(file).values()]
        assert sum(sizes) <= max(100_000, largest)
    loaded = weights.read(tmp_path / "out")
    assert_equal(loaded, live, torch.bfloat16)


def test_average(runs, tmp_path):
    checkpoint, live = made(runs, "fsdp")
    list(export(checkpoint, tmp_path / "ema", dtype="fp32", ema=True))
    average = weights.read(tmp_path / "ema")
    changed = {name for name in live if not torch.equal(average[name], live[name])}
    assert changed and all(name.startswith(("blocks.1.", "head.")) for name in changed)
    # After two steps 2/11 of the average are the weights after the first, a step of Adam away; none are the start.
    start, most = weights.read(runs / "model"), 1.1 * RATE
    for name in changed:
        assert (average[name] - live[name]).abs().max() <= 2 / 11 * most
        assert (average[name] - start[name].float()).abs().max() > 0.5 * RATE


def test_shares_are_not_taken_for_weights(runs):
    checkpoint, _ = made(runs, "fsdp")
    with pytest.raises(UserError, match=r"shares of several processes; `reeltune export \S+checkpoint-2 FOLDER`"):
        weights.saved_transformer(checkpoint)


def of_squares(checkpoint: Path, *, shared: bool, count: int, side: int) -> Path:
    """A checkpoint of `count` square matrices in fp32, each of one number."""
    state = {f"blocks.{i}.weight": torch.full((side, side), float(i)) for i in range(count)}
    outline = {name: tensor.to("meta") for name, tensor in state.items()}
    weights.write_component(checkpoint / "transformer", outline if shared else state, {})
    if shared:
        sharded_io.write(
            checkpoint / SHARES, [sharded_io.whole(f"weights/{name}", w) for name, w in state.items()], None
        )
        Shared.write_outline(checkpoint, {name: list(tensor.shape) for name, tensor in state.items()}, {})
    (checkpoint / "progress.json").write_text("{}")
    return checkpoint


def give_back(rank):
    """What is let go is given back, as it is for real sizes: M_MMAP_THRESHOLD of malloc.h."""
    assert ctypes.CDLL(None).mallopt(-3, 1_000_000)


def measured(*words):
    export_peak.main(*words)
    return 0


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shares"])
def test_memory_holds_a_shard_and_a_tensor_at_most(shared, tmp_path):
    """A checkpoint of 192 MiB to shards of 32 MB; a tensor has 8 MiB as stored, and is held three times at most."""
    tensor_bytes, shard_bytes = 2**23, 32 * 10**6
    small = of_squares(tmp_path / "checkpoint-1", shared=shared, count=2, side=2)
    large = of_squares(tmp_path / "checkpoint-2", shared=shared, count=24, side=1448)
    words = map(str, [small, large, tmp_path / "out", "32MB"])
    run = train([partial(measured, *words)], 1, tmp_path / "told", give_back)
    told = json.loads(run.told[0].read_text().splitlines()[-1])
    files = tensor_files.files_of(tmp_path / "out")
    assert len(files) == 4 and all(file.stat().st_size < shard_bytes for file in files)
    assert tensor_bytes / 2 < told["peak_bytes"] < 3.5 * tensor_bytes < shard_bytes + tensor_bytes
