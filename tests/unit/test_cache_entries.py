"""Entries of the cache: exact in their bits, bounded in their files, known by all that they are made of."""

import os
from dataclasses import replace

import pytest
import torch

from reeltune.cache import store
from reeltune.cache.keys import Keys
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Record, Shape


def test_a_checksum_is_of_names_types_shapes_and_bytes():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.zeros(0)}
    others = [
        {**tensors, "a": torch.arange(6.0).view(3, 2)},
        {**tensors, "a": torch.arange(6.0).view(2, 3).double()},
        {**tensors, "b": torch.tensor(False)},
        {("d" if name == "c" else name): tensor for name, tensor in tensors.items()},
    ]
    assert store.checksum(dict(reversed(tensors.items()))) == store.checksum(tensors)
    assert len({store.checksum(one) for one in [tensors, *others]}) == 5


def test_packing_is_exact():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(64, generator=generator)
    for given, stored in (
        (full, torch.float32),
        (full.bfloat16().float(), torch.bfloat16),
        (full.half().float(), torch.float16),
        (torch.tensor([-torch.inf, 0.0, -0.0]), torch.bfloat16),
        (torch.tensor([torch.nan]).view(torch.int32).add(1).view(torch.float32), torch.float32),
        (torch.tensor([1e-45, 3e38]), torch.float32),
        (torch.arange(5), torch.int64),
        (torch.tensor([True, False]), torch.bool),
    ):
        packed = store.pack(given)
        assert packed.dtype == stored and packed.data_ptr() != given.data_ptr()
        back = store.unpack(packed)
        assert back.dtype == given.dtype
        assert back.numpy().tobytes() == given.numpy().tobytes()


def test_shards_are_bounded(tmp_path):
    writer = store.Writer(tmp_path, {"how": 1}, shard_bytes=1000)
    entries = {f"{i:02}": {"x0.mean": torch.full((1, 60), 1 / 3 + i)} for i in range(10)}  # 240 bytes each
    for key, tensors in entries.items():
        writer.add(key, "train", tensors)
    writer.close()
    shards = store.read_manifest(tmp_path).shards.values()
    assert [len(shard.entries) for shard in shards] == [4, 4, 2]
    assert [shard.bytes for shard in shards] == [(tmp_path / "shards" / shard.name).stat().st_size for shard in shards]
    held = store.Store(tmp_path)
    assert all(torch.equal(held.read(key, "train")["x0.mean"], entries[key]["x0.mean"]) for key in entries)


def test_folders_in_the_place_of_its_files_are_told(tmp_path):
    writer = store.Writer(tmp_path, {"how": 1})
    writer.add("0", "train", {"x": torch.zeros(1)})
    writer.close()
    (shard,) = (tmp_path / "shards").iterdir()
    shard.unlink()
    shard.mkdir()
    assert store.set_aside_damaged(tmp_path) == [] and not store.Store(tmp_path).entries  # as one that is gone
    (part,) = store.parts(tmp_path)
    part.unlink()
    part.mkdir()
    with pytest.raises(UserError, match=r"cannot be read .*Is a directory.*; remove it, and reeltune cache"):
        store.read_manifest(tmp_path)


def test_an_entry_is_known_by_all_that_it_is_made_of(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, (9, 9))
    paths = {name: str(tmp_path / f"{name}.mp4") for name in "abc"}
    record = Record(0, paths["a"], "a", "video", 9, 8.0, 64, 64, control_path=paths["b"])
    draw = Draw(0, Shape(5, 32, 32), Crop(32, 32, 0, 0), (0, 1, 2, 3, 4), ref_frame=0, seed=1, variant_seed=2)
    of_masks, plain = (Keys({"how": 1}, str(tmp_path), seeds, text_of_clip=False) for seeds in (True, False))

    def clip(keys=of_masks, of=record, split="train", **changes):
        return keys.clip(of, replace(draw, **changes), split)

    others = [
        clip(of=replace(record, path=paths["c"])),
        clip(of=replace(record, control_path=paths["c"])),
        clip(of=replace(record, control_path=None, camera_path=paths["b"])),
        clip(shape=Shape(5, 32, 48)),
        clip(crop=Crop(32, 32, 0, 1)),
        clip(frames=(1, 2, 3, 4, 5)),
        clip(ref_frame=1),
        clip(variant_seed=3),
        clip(split="held_out"),
        clip(replace(of_masks, facts={"how": 2})),
        clip(plain),
    ]
    alike = [
        clip(),
        clip(seed=7, stratum=(1, 2), repeat=True),  # what is drawn at every use
        clip(of=replace(record, text="b", entry=5)),
    ]
    assert len({*others, clip()}) == len(others) + 1 and set(alike) == {clip()}
    assert clip(plain) == clip(plain, variant_seed=3)
    before = clip(), clip(of=replace(record, control_path=None))
    os.utime(tmp_path / "b.mp4", (10, 10))
    assert clip() != before[0] and clip(of=replace(record, control_path=None)) == before[1]
    texts = [plain.text(replace(record, text=text), key) for text, key in (("a", "k"), ("a", "l"), ("b", "k"))]
    assert texts[0] == texts[1] != texts[2]
    seeing = replace(plain, text_of_clip=True)
    assert seeing.text(record, "k") != seeing.text(record, "l")
