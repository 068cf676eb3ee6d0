"""Files that were sound, or broken in a known way, and are then broken at random: one UserError, never another error,
within two seconds of this process's time.

REELTUNE_FUZZ=N tries N inputs of each kind instead of the few of every run; each is a function of its number alone.
"""

import io
import json
import os
import shutil
import time
from functools import partial
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reeltune import families
from reeltune.cache.store import read_manifest
from reeltune.checkpoint import digests
from reeltune.checkpoint.folder import progress_of
from reeltune.checkpoint.state import Shared
from reeltune.config.parse import build, dump, read, settings
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Record
from reeltune.data import measuring
from reeltune.data.camera import CameraError, rays, read_poses, resample
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import read_keypoints, write_keypoints
from reeltune.data.lists import rows
from reeltune.data.measuring import File, Finding, measure_files, stamps
from reeltune.data.media import Measure
from reeltune.data.metadata import Folder, check_row
from reeltune.data.records import Records
from reeltune.demo.main import FAMILIES
from reeltune.diffusion.objective import Flow
from reeltune.distributed import sharded_io
from reeltune.families import tensor_files, tokenizers
from reeltune.reporting import report
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.metrics import read_metrics
from reeltune.run.folder import refuse_other_model
from reeltune.sampling.validate import HeldOut
from tests.families.test_damaged_weights import HEADERS, one
from tests.unit.fuzzing import HOSTILE, KNOWN_JSON, LIMIT_S, TRIES, broken, changed, inputs_of, spoilt, tried
from tests.unit.metrics_rows import METRICS
from tests.unit.people import rewritten, walk
from tests.unit.test_damaged_runs import PROGRESS
from tests.unit.test_reading import BROKEN_YAML


def test_metadata(tmp_path, cases):
    sound = [
        [{"file_path": "a.mp4", "text": "a cat", "type": "video", "width": 8, "height": 8}],
        [{"file_path": "a.png", "text": "", "type": "image", "control_file_path": "b.png"}, {"file_path": "b"}],
        *map(json.loads, inputs_of(cases, "meta/*.json")),
    ]
    folder = Folder(tmp_path, allow_outside_paths=False)
    refused = 0
    for number in range(TRIES):
        random = Random(f"metadata {number}")
        data, ending = broken(sound, KNOWN_JSON, random), random.choice([".json", ".jsonl", ".csv"])

        def act(data=data, ending=ending):
            for row in rows(tmp_path / f"list{ending}", data):
                check_row(row, folder, frozenset({"control"}))

        refused += tried(act, (number, data[:300]))
    assert refused > TRIES / 4


def test_recipes(tmp_path):
    file, whole = tmp_path / "recipe.yaml", dump(Recipe()).encode()
    known = [content if isinstance(content, bytes) else content.encode() for content, _ in BROKEN_YAML.values()]
    refused = 0
    for number in range(TRIES // 3):
        random = Random(f"recipe {number}")
        if random.random() < 0.5:
            file.write_bytes(spoilt(random.choice([whole, *known]), random))
        else:
            names = random.choices([*settings(), "no_setting"], k=3)
            file.write_text(json.dumps({name: random.choice(HOSTILE) for name in names}))
        refused += tried(lambda: build(read(file)), (number, file.read_bytes()[:300]))
    assert refused > TRIES / 12


def test_progress(tmp_path):
    folder = tmp_path / "checkpoint-4"
    for other in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / other).mkdir()
        step = int(other[-1])
        (tmp_path / other / "progress.json").write_text(json.dumps({"step": step, "epoch": 0, "cursor": 1, "group": 1}))
    sound = [{"step": 4, "epoch": 1, "cursor": 2, "group": 8}, *(table for table, _ in PROGRESS.values())]
    refused = 0
    for number in range(TRIES):
        random = Random(f"progress {number}")
        (folder / "progress.json").write_bytes(broken(sound, KNOWN_JSON, random))
        refused += tried(lambda: progress_of(folder), number)
    assert refused > TRIES / 2


def test_manifests_and_metrics(tmp_path):
    manifest, metrics = tmp_path / "manifest/00001.jsonl", tmp_path / "metrics.jsonl"
    manifest.parent.mkdir()
    shard = {"shard": "00001-00001.safetensors", "bytes": 8, "blake2b": "00", "entries": {"k": "train"}}
    sound = [{"format": 1, "facts": {"family": "toy"}}, shard, {"failed": {"k": "cannot be read"}}]
    for number in range(TRIES):
        random = Random(f"manifest {number}")
        manifest.write_bytes(b"".join(broken(sound, KNOWN_JSON, random) + b"\n" for _ in range(3)))
        tried(lambda: read_manifest(tmp_path), number)
        metrics.write_bytes(b"".join(broken(METRICS, KNOWN_JSON, random) + b"\n" for _ in range(3)))
        tried(lambda: read_metrics(metrics), number)
    for name in ("../../x", "a/b", "a\\b", "..", 5):
        manifest.write_text(json.dumps({**shard, "shard": name}) + "\n")
        with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
            read_manifest(tmp_path)


LEDGER = {
    "entries": 2,
    "used": 1,
    "held_out": 0,
    "not_reached": 0,
    "left_out": 1,
    "samples": 3,
    "samples_repeated": 0,
    "most_used": 3,
}


@pytest.mark.slow
def test_what_a_report_reads(tmp_path):
    preview = tmp_path / "previews/step-0/0.json"
    preview.parent.mkdir(parents=True)
    whole = {
        "metrics.jsonl": METRICS,
        "run.json": {"family": "toy", "versions": {"torch": "2"}, "machine": {"system": "x", "cores": 2}},
        "ledger.json": LEDGER | {"problems": [{"entry": 0, "path": "a", "reason": "b", "remedy": "c"}]},
        "previews/step-0/0.json": {"prompt": "a cat", "seed": 1, "control": None},
        "recipe.yaml": {"seed": 1},
    }

    def put(name, value):
        lines = value if isinstance(value, list) and name == "metrics.jsonl" else [value]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    for name, value in whole.items():
        put(name, value)
    report.write(tmp_path)
    for number in range(TRIES // 15):
        random = Random(f"report {number}")
        name = random.choice(list(whole))
        put(name, changed(whole[name], random))
        if random.random() < 0.3:
            (tmp_path / name).write_bytes(spoilt((tmp_path / name).read_bytes(), random))
        tried(lambda: report.write(tmp_path), (number, name, (tmp_path / name).read_bytes()[:300]))
        put(name, whole[name])


def ledger() -> Ledger:
    return Ledger(2, Records.of(Record(i, name, "x", "video", 9, 8.0, 64, 64) for i, name in enumerate("ab")))


def test_a_runs_own_files(tmp_path):
    """Each is read as the run reads it that goes on."""
    checkpoint = tmp_path / "checkpoint-4"
    parts = {f"weights/{name}": torch.ones(2, 3) for name in "ab"}
    sharded_io.write(checkpoint / "shares", (sharded_io.whole(*part) for part in parts.items()), None)
    (checkpoint / "shares/outline.json").write_text(
        '{"shapes": {"a": [2, 3], "b": [6]}, "scalars": {"a": {"step": 4}}}'
    )
    digests.write(checkpoint, digests.digest(checkpoint, digests.files_of(checkpoint)))
    ledger().save(checkpoint / "ledger.npz")
    (tmp_path / "run.json").write_text('{"family": "toy", "mode": "control"}')
    held_out = HeldOut(SimpleNamespace(objective=Flow(), other=None), [], ["a", "b"], lambda draw: None, 2, tmp_path)
    held_out._start(0, np.zeros((2, 2)))

    def read_shares():
        shared = Shared(checkpoint)
        return [*shared.weights().values(), shared.scalars("a"), shared.keys("a")]

    reads = {
        "checkpoint-4/shares/outline.json": read_shares,
        "checkpoint-4/shares/.metadata": read_shares,
        "checkpoint-4/digests.json": lambda: digests.damages(checkpoint),
        "checkpoint-4/ledger.npz": lambda: ledger().load(checkpoint / "ledger.npz"),
        "run.json": lambda: refuse_other_model(checkpoint, {"family": "toy", "mode": "control"}, adapters=False),
        "validation/start.json": lambda: held_out._start(4, np.zeros((2, 2))),
    }
    for name, act in reads.items():
        whole, refused = (tmp_path / name).read_bytes(), 0
        for number in range(TRIES // 3):
            random = Random(f"{name} {number}")
            sound = name.endswith(".json") and [json.loads(whole)]
            (tmp_path / name).write_bytes(broken(sound, KNOWN_JSON, random) if sound else spoilt(whole, random))
            refused += tried(act, (number, name, (tmp_path / name).read_bytes()[:300]))
        (tmp_path / name).write_bytes(whole)
        assert refused > TRIES / 30, name
        act()


def test_what_was_measured_is_measured_again_if_it_is_not_believed(tmp_path):
    files = [File(str(tmp_path / "a.txt"), "camera")]
    (tmp_path / "a.txt").write_text("x")
    options = dict(decode_check="ends", index_dir=tmp_path, workers=1, seconds_per_file=9.0, progress=None)
    found = Finding(Measure("video", 9, 8.0, 64, 64, ("a note",)))
    sound = {f"camera:{files[0].path}": [stamps([files[0].path]).tolist()[0], measuring._packed(found)]}
    anew = Finding(None, "measured anew")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_run", lambda *_: iter([(0, anew)]))
        for number in range(TRIES):
            random = Random(f"index {number}")
            data = broken([sound], KNOWN_JSON, random)
            measuring._index_path(tmp_path, "ends").write_bytes(data)
            tried(lambda: measure_files(files, stamps([files[0].path]), **options), (number, data[:300]))


def test_camera_paths(tmp_path, cases):
    file = tmp_path / "poses.txt"
    pose = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
    known = [f"header\n{pose}\n{pose}\n".encode(), *inputs_of(cases, "camera/*.txt")]
    numbers = [b"nan", b"inf", b"-1e308", b"1e308", b"0", b"x", b" ", b"\n", "\u0661".encode(), b"1_0"]

    def act():
        try:
            rays(resample(read_poses(file), 9, range(9)), 8, 8)
        except CameraError as error:
            raise UserError("camera", str(error)) from error

    refused = 0
    for number in range(TRIES):
        random = Random(f"camera {number}")
        words = random.choice(known).split(b" ")
        for _ in range(random.randint(0, 3)):
            words[random.randrange(len(words))] = random.choice(numbers)
        data = b" ".join(words)
        file.write_bytes(spoilt(data, random) if random.random() < 0.5 else data)
        refused += tried(act, (number, file.read_bytes()[:300]))
    assert refused > TRIES / 2


def test_headers(tmp_path):
    file = tmp_path / "model.safetensors"
    table = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    known = [content for content, _ in HEADERS.values()]
    refused = 0
    for number in range(TRIES):
        random = Random(f"header {number}")
        text = broken([table], [], random)
        data = len(text).to_bytes(8, "little") + text + bytes(8)
        file.write_bytes(random.choice([data, spoilt(one(), random), spoilt(random.choice(known), random)]))
        for device in ("meta", "cpu"):
            refused += tried(lambda device=device: tensor_files.tensors_in(file, device), (number, text[:300]))
    assert refused > TRIES


def test_indexes_and_pickles(tmp_path):
    index, weights = tmp_path / "model.safetensors.index.json", tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, weights)
    whole = weights.read_bytes()
    torch.save({"a": torch.zeros(3)}, weights, _use_new_zipfile_serialization=False)
    older = weights.read_bytes()
    for number in range(TRIES):
        random = Random(f"index {number}")
        index.write_bytes(broken([{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}], KNOWN_JSON, random))
        tried(lambda: tensor_files.files_of(tmp_path), number)
        weights.write_bytes(spoilt(random.choice([whole, older]), random, 300))  # torch looks long at long names
        tried(lambda: tensor_files.tensors_in(weights, "cpu"), number)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        name: made.write(tmp_path_factory.mktemp(name) / "model") for name, made in FAMILIES.items() if name != "toy"
    }


@pytest.mark.parametrize(
    "name",
    [name if name == "wan_fun" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "toy"],
)
def test_configs(name, models, tmp_path):
    """Any JSON file of a checkpoint: found, and its network, encoders and tokenizers loaded."""
    folder = shutil.copytree(models[name], tmp_path / "model")
    files = sorted(folder.rglob("*.json"))
    family = families.find(folder)
    family.load(folder, network=False)  # what follows is not the first of its kind: libraries are imported
    for number in range(TRIES // 6):
        random = Random(f"{name} {number}")
        file = random.choice(files)
        whole = file.read_bytes()
        file.write_bytes(broken([json.loads(whole)], KNOWN_JSON, random))
        what = (number, str(file), file.read_bytes()[:300])
        tried(partial(load_parts_beside, folder, file), what)
        file.write_bytes(whole)
    assert families.find(folder).name == family.name


def load_parts_beside(folder, file):
    """The network's names, and the tokenizer or frozen network that the file belongs to."""
    if "tokenizer" in str(file.relative_to(folder)) or "umt5" in str(file):
        tokenizers.load_tokenizer(file.parent)
    parts = families.find(folder).load(folder, network=False, encoders=False)
    for name, loader in parts.loaders.items():
        if not file.is_relative_to(folder / "transformer") and name.startswith(("vae", "text")):
            loader()


def test_key_points(tmp_path):
    """Sound or refused, in bounded time; nothing else."""
    file = tmp_path / "clip.npz"
    write_keypoints(file, walk(3, 64, 48, count=2))
    sound, refused = file.read_bytes(), 0
    arrays = dict(np.load(file, allow_pickle=False))
    for number in range(TRIES):
        random = Random(f"keypoints {number}")
        if random.random() < 0.5:
            data = spoilt(sound, random)
        else:
            name = random.choice(list(arrays))
            inside = io.BytesIO()
            np.save(inside, arrays[name])
            file.write_bytes(sound)
            rewritten(file, {f"{name}.npy": spoilt(inside.getvalue(), random)})
            data = file.read_bytes()
        file.write_bytes(data)
        os.utime(file, ns=(number, number))  # what is remembered is known by it
        began = time.process_time()
        try:
            read_keypoints(file).frame(0)
        except MediaError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400, number
        assert time.process_time() - began < LIMIT_S, number
    assert refused > TRIES / 2
