"""Files that were sound, or broken in a known way, and are then broken at random: one UserError, never another error,
within two seconds of this process's time.

REELTUNE_FUZZ=N tries N inputs of each kind instead of the few of every run; each is a function of its number alone.
"""

import json
import os
import shutil
import time
from functools import partial
from random import Random

import pytest

from reeltune import families
from reeltune.cache.store import read_manifest
from reeltune.checkpoint.folder import progress_of
from reeltune.config.parse import build, dump, read, settings
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.data.lists import rows
from reeltune.data.metadata import Folder, check_row
from reeltune.demo.main import FAMILIES
from reeltune.families import tensor_files, tokenizers
from reeltune.reporting.report import read_metrics
from tests.families.test_damaged_weights import HEADERS, one
from tests.unit.test_reading import BROKEN_JSON, BROKEN_YAML

TRIES = int(os.environ.get("REELTUNE_FUZZ", "150"))
LIMIT_S = 2
HOSTILE = (  # values in any place of a JSON file
    None, True, -1, 0, 1.5, 10**9, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "\0",
    "\x1b[2J", "\ud800", "=cmd()", "x" * 5000, [], {}, [1], ["a"], {"a": 1}, [[[[[[1]]]]]], [0] * 1000,
)  # fmt: skip
PIECES = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\n", b"\0", b"\xff", b"*a", b"&a ", b"- ", b"? ", b"!!int ",
    b"1e999", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"<html>", b"version https://git-lfs", b"\xef\xbb\xbf",
)  # fmt: skip


def changed(value, random: Random):
    """The same JSON value with one place in it made hostile, removed or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {key: entry for key, entry in value.items() if key != name}
            case 1:
                return {**value, random.choice(["", "x", "a/b", "\x1b", "x" * 3000]): random.choice(HOSTILE)}
            case _:
                return {**value, name: changed(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        return [*value[:place], changed(value[place], random), *value[place + 1 :]]
    return random.choice(HOSTILE)


def spoilt(data: bytes, random: Random) -> bytes:
    """The same file after up to four accidents."""
    for _ in range(random.randint(1, 4)):
        place = random.randint(0, len(data))
        match random.randrange(6):
            case 0:
                data = data[:place]
            case 1:
                data = data[:place] + random.choice(PIECES) + data[place:]
            case 2:
                data = data[:place] + random.choice(PIECES) + data[place + random.randint(1, 9) :]
            case 3:
                data = data[:place] + bytes([random.randrange(256)]) + data[place + 1 :]
            case 4:
                data = data[:place] + data[random.randint(0, len(data)) :]
            case 5:
                data = data + data[place:]
    return data[: 2**20]


def broken(sound, known, random: Random) -> bytes:
    """sound: JSON values. known: files that are broken already."""
    if known and random.random() < 0.1:
        data = random.choice(known)
    else:
        value = random.choice(sound)
        for _ in range(random.randint(1, 3)):
            value = changed(value, random)
        data = json.dumps(value).encode()
    return spoilt(data, random) if random.random() < 0.4 else data


def tried(act, what):
    """act(), whose only error may be UserError. Returns whether it gave one."""
    began = time.process_time()
    try:
        act()
        refused = False
    except UserError as error:
        refused = True
        assert error.problems and str(error).replace("\n", "").isprintable(), what
        assert all(len(line) < 5000 for line in error.problems), what
    assert time.process_time() - began < LIMIT_S, what
    return refused


KNOWN_JSON = [content for content, _ in BROKEN_JSON.values()]


def test_metadata(tmp_path):
    sound = [
        [{"file_path": "a.mp4", "text": "a cat", "type": "video", "width": 8, "height": 8}],
        [{"file_path": "a.png", "text": "", "type": "image", "control_file_path": "b.png"}, {"file_path": "b"}],
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
    sound = [{"step": 4, "epoch": 1, "cursor": 2, "group": 8}]
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
    steps = [{"kind": "step", "step": 1, "loss": 0.5}, {"kind": "save", "step": 1}, {"kind": "notice", "text": "a"}]
    for number in range(TRIES):
        random = Random(f"manifest {number}")
        manifest.write_bytes(b"".join(broken(sound, KNOWN_JSON, random) + b"\n" for _ in range(3)))
        tried(lambda: read_manifest(tmp_path), number)
        metrics.write_bytes(b"".join(broken(steps, KNOWN_JSON, random) + b"\n" for _ in range(3)))
        tried(lambda: read_metrics(metrics), number)
    for name in ("../../x", "a/b", "a\\b", "..", 5):
        manifest.write_text(json.dumps({**shard, "shard": name}) + "\n")
        with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
            read_manifest(tmp_path)


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
    import torch

    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, weights)
    whole = weights.read_bytes()
    torch.save({"a": torch.zeros(3)}, weights, _use_new_zipfile_serialization=False)
    older = weights.read_bytes()
    for number in range(TRIES):
        random = Random(f"index {number}")
        index.write_bytes(broken([{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}], KNOWN_JSON, random))
        tried(lambda: tensor_files.files_of(tmp_path), number)
        weights.write_bytes(spoilt(random.choice([whole, older]), random))
        tried(lambda: tensor_files.tensors_in(weights, "cpu"), number)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        name: made.write(tmp_path_factory.mktemp(name) / "model") for name, made in FAMILIES.items() if name != "toy"
    }


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "toy"])
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
