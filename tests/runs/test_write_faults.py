"""Whatever writes: killed at any of its changes, or with a full disk from any on, it leaves the old or the new.

Done again it ends as if nothing had been.

REELTUNE_FAULTS=1 strikes a whole run at each of its changes, and not only at every nineteenth.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from reeltune.adapters import saved
from reeltune.cache import store
from reeltune.checkpoint import folder as checkpoint
from reeltune.config.parse import build, read
from reeltune.config.recipe import Recipe
from reeltune.core.types import Progress, Record
from reeltune.data import measuring
from reeltune.data.media import measure
from reeltune.data.records import Records
from reeltune.data.scan import scan
from reeltune.distributed.sharded_io import whole
from reeltune.export.main import export
from reeltune.families import weights
from reeltune.reporting import report
from reeltune.reporting.first_batch import write_first_batch
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import Log
from reeltune.reporting.metrics import read_metrics
from reeltune.run.folder import describe
from reeltune.sampling.sample import write_pixels
from reeltune.training import loop
from tests.runs.faults import Operation, sweep
from tests.runs.same_run import rows, shares
from tests.runs.small_run import recipe

EVERY = int(os.environ.get("REELTUNE_FAULTS", "19"))


def each_old_or_new(before, found, after):
    return found.keys() <= before.keys() | after.keys() and all(
        found.get(name) in (before.get(name), after.get(name)) for name in before.keys() | after.keys()
    )


# ---- checkpoints


def ledger() -> Ledger:
    train = Records.of(Record(i, name, "a cat", "video", 9, 8.0, 64, 64) for i, name in enumerate("ab"))
    return Ledger(2, train)


def write_more(folder):
    ledger().save(folder / "ledger.npz")


def tensors(step):
    return {"a": torch.full((300,), float(step)), "b": torch.arange(5.0) + step}


def save(out, step=4, keep=1):
    def write_networks(folder):
        weights.write_component(folder / "transformer", tensors(step), {"dim": 3})
        checkpoint.write_state(folder, tensors(step))

    checkpoint.save(
        out,
        Progress(step, 0, step, 2),
        write_networks=write_networks,
        write_more=write_more,
        keep=keep,
    )


def save_adapter(out, step=4):
    A_RI, B_OR = torch.full((2, 150), float(step)), torch.arange(10.0).view(5, 2) + step
    pair = {"layer.lora_A.weight": A_RI, "layer.lora_B.weight": B_OR}

    def write_networks(folder):
        checkpoint.write_state(folder, tensors(step))
        for name in ("adapter", "adapter_ema"):
            saved.write(folder / name, pair, {"layer": 2.0}, {"rank": 2})

    checkpoint.save(
        out,
        Progress(step, 0, step, 2),
        write_networks=write_networks,
        write_more=write_more,
        keep=1,
    )


def latest_adapter(out):
    """The same of adapters, as a run, an export and clips read them."""
    checkpoint.sweep(out)
    for last in checkpoint.complete(out):
        checkpoint.verify(last)
    assert last == checkpoint.find(out, "latest") and checkpoint.is_adapter(last)
    found = []
    for name in ("adapter", "adapter_ema"):
        pair = saved.load(last / name).layers["layer"]
        found += [float(pair.A_RI.sum()), float(pair.B_OR.sum()), pair.alpha]
    return last.name, found, float(checkpoint.load(last)["a"].sum())


def save_shares(out, step=4):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pieces = [whole(f"weights/{name}", tensor) for name, tensor in tensors(step).items()]

    def more(folder):
        outline = {"shapes": {"a": [300], "b": [5]}, "scalars": {}}
        (folder / "shares/outline.json").write_text(json.dumps(outline))
        write_more(folder)

    try:
        group = dist.new_group(backend="gloo")
        checkpoint.save_shares(out, Progress(step, 0, step, 2), {None: pieces}, group, write_more=more, keep=1)
    finally:
        dist.destroy_process_group()


def latest(out):
    """What a run would go on from. All that count as checkpoints are sound."""
    checkpoint.sweep(out)
    for path in checkpoint.complete(out):
        checkpoint.verify(path)
    last = checkpoint.find(out, "latest")
    assert last is not None
    with np.load(last / "ledger.npz") as counts:
        assert counts["used"].tolist() == [0, 0]
    held = [shares(last)] if checkpoint.is_shared(last) else [load_file(*last.glob("*/*.safetensors"))]
    held += [] if checkpoint.is_shared(last) else [checkpoint.load(last)]
    sums = [[float(part.sum()) for part in table.values() if isinstance(part, torch.Tensor)] for table in held]
    return last.name, checkpoint.progress_of(last), sums


def with_leftover(out):
    """Beside a whole checkpoint what is left of the one that comes next."""
    save(out, 2)
    (out / "checkpoint-4").mkdir()
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")


def three(out):
    for step in (2, 4, 6):
        save(out, step, keep=None)


def in_line_and_aside(out):
    assert sorted(path.name for path in out.glob("*/checkpoint-*") if path.is_dir()) == sorted(
        {"checkpoint-4", "checkpoint-6"} - {path.name for path in checkpoint.complete(out)}
    )
    return {path.name: True for path in checkpoint.complete(out)}


# ---- the cache, the index, exports

KEYS = "abc"


def cached(folder, shard_bytes=1):
    held = store.Store(folder)
    writer = store.Writer(folder, {"how": 1}, shard_bytes=shard_bytes)
    for key in KEYS:
        if key not in held.entries:
            writer.add(key, "train", {"x0": torch.full((40,), float(ord(key)))})
    if "unreadable" not in held.failed:
        writer.fail("unreadable", "cannot be read")
    writer.close()


def entries(folder):
    held = store.Store(folder)
    whole = {key: held.read(key, split)["x0"].tolist() for key, (_, split) in held.entries.items()}
    return whole | held.failed


def only_one(folder):
    store.prune(folder, {"a"}, {"how": 1})


def data(folder):
    folder.mkdir(exist_ok=True)
    for name in "ab":
        Image.new("RGB", (16, 16), "red" if name == "a" else "blue").save(folder / f"{name}.png")
    listed = [{"file_path": f"{name}.png", "text": name, "type": "image"} for name in ("a", "b", "absent")]
    (folder / "list.json").write_text(json.dumps(listed))


def scanned(folder):
    return scan(folder / "list.json", folder, needs=frozenset(), max_bad_share=1.0, index_dir=folder / "index")


def index(folder):
    """What it holds, as another scan takes it."""
    held = measuring._load_index(folder / "index", "ends")
    found = [_scan_of(path) for path in (folder / "index").glob("scan-*.npz")]
    return {"files": sorted(held)} | {"scan": found}


def _scan_of(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name].tolist() for name in arrays.files if name != "stamps"}


def exported(folder):
    if not (folder / "out").exists():
        list(export(folder / "checkpoint-2", folder / "out", dtype="as_stored", max_shard_size="1KB"))


def loaded(folder):
    out = folder / "out"
    if not out.exists():
        return None
    assert json.loads((out / "config.json").read_text()) == {"dim": 3}
    return {name: float(tensor.sum()) for name, tensor in weights.read(out).items()}


# ---- a run's own files


def texts(folder):
    """Of all that is to be read; a page or a table that was cut would differ."""
    paths = (path for path in folder.rglob("*") if path.suffix in (".json", ".csv", ".html"))
    return {path.name: path.read_text() for path in paths}


def account(folder):
    ledger().write(folder)
    report.write(folder)


def described(folder):
    found = {}
    if (folder / "recipe.yaml").exists():
        found["recipe"] = build(read(folder / "recipe.yaml"))
    if (folder / "run.json").exists():
        found["run"] = json.loads((folder / "run.json").read_text())["family"]
    return found


def logged(folder, resume_step=2):
    with Log(folder, main=True, resume_step=resume_step, logging_steps=100) as log:
        for step in (3, 4):
            log.step({"step": step, "loss": float(-step)})


def four_steps(folder):
    lines = [json.dumps({"kind": "step", "step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n{cut")


def losses(folder):
    return read_metrics(folder / "metrics.jsonl").steps["loss"]


def pictures(folder):
    """Frames of clips, sizes of pictures, texts."""
    found = {}
    for path in folder.rglob("[0-9]*"):
        if path.suffix == ".mp4":
            found[path.name] = measure(str(path), "video", "full").frames
        elif path.suffix == ".png":
            found[path.name] = Image.open(path).convert("RGB").size
        elif path.suffix in (".txt", ".json"):
            found[path.name] = path.read_text()
    return found


PIXELS = torch.arange(2 * 5 * 3 * 16 * 16).reshape(2, 5, 3, 16, 16).to(torch.uint8)


def first_batch(folder):
    draw = SimpleNamespace(ref_frame=1, frames=(0, 1, 2, 3, 4), shape=(5, 16, 16))
    batch = SimpleNamespace(draws=[draw], text=["a cat"], pixels_BFCHW=PIXELS, control_BFCHW=PIXELS, keep={})
    write_first_batch(batch, folder / "first_batch", reference=True)


OPERATIONS = {
    "checkpoint": Operation(save, latest, lambda out: save(out, 2)),
    "checkpoint over what is left of one": Operation(save, latest, with_leftover),
    "checkpoint of an adapter": Operation(save_adapter, latest_adapter, lambda out: save_adapter(out, 2)),
    "checkpoint of several processes": Operation(save_shares, latest, lambda out: save(out, 2)),
    "later checkpoints set aside": Operation(
        lambda out: checkpoint.set_later_aside(out, 2), in_line_and_aside, three, each_old_or_new
    ),
    "cache": Operation(cached, entries, allows=each_old_or_new),
    "cache, pruned": Operation(only_one, entries, lambda folder: cached(folder, 2**20), each_old_or_new),
    "index of the data": Operation(scanned, index, data, each_old_or_new),
    "export": Operation(exported, loaded, lambda folder: save(folder, 2)),
    "ledger and report": Operation(account, texts, allows=each_old_or_new),
    "recipe.yaml and run.json": Operation(
        lambda folder: describe(folder, Recipe(), {"family": "x"}), described, allows=each_old_or_new
    ),
    "metrics.jsonl": Operation(
        logged, losses, four_steps, lambda before, found, after: found in (before, *(after[:n] for n in (2, 3, 4)))
    ),
    "clip": Operation(lambda folder: write_pixels(folder / "0.mp4", PIXELS, 8.0), pictures),
    "first batch": Operation(first_batch, pictures, allows=each_old_or_new),
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch, measured_here):
    """Nothing is truly flushed to the disk, and no process is started."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


QUICK = ("checkpoint", "metrics.jsonl")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPERATIONS]
)
def test_old_or_new(name, tmp_path):
    assert sweep(OPERATIONS[name], tmp_path) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"rank": 4, "target_name": ["text"], "train_mode": None}], ids=["whole", "adapter"]
)
def test_a_run(more, toy, data, tmp_path, monkeypatch):
    """Of two steps with a checkpoint after each: it goes on from whatever it left, and ends in the same bits."""
    monkeypatch.setattr(report, "write", lambda out: out / "report.html")
    torch.set_num_threads(1)

    def run(out: Path):
        changes = {"max_train_steps": 2, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        loop.train(recipe(toy, data, out, **changes, **more, save_in_background=False))

    def found(out: Path):
        last = checkpoint.find(out, "latest")
        if last is None:
            return {}
        checkpoint.verify(last)
        (file,) = last.glob("*/*.safetensors")
        held = load_file(file)
        account = (out / "ledger.csv").read_text() if (out / "ledger.csv").exists() else None
        return {
            "step": last.name,
            "bits": {name: tensor.tolist() for name, tensor in held.items()},
            "rows": rows(out)[-3:],
            "account": account,
        }

    def between(before, found, after):
        return not found or found["step"] == "checkpoint-1" or found["bits"] == after["bits"]

    assert sweep(Operation(run, found, allows=between), tmp_path, EVERY) >= 4
