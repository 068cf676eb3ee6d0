"""Files of weights, configs and tokenizers that are broken, hostile or of another kind: one UserError that says so.

What is sound though odd, such as weights under another tool's prefix, is read, with a notice.
"""

import json
import pickle
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import tensor_files, weights
from reeltune.families.wan_fun import layout, sizes
from tests.families.tiny_wan import filled, network

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(act, *words) -> UserError:
    """What `act` raises, in bounded time and after at most a few lines."""
    began = time.process_time()
    with pytest.raises(UserError) as told:
        act()
    assert time.process_time() - began < 20 and len(told.value.problems) < 40
    for word in words:
        assert word in str(told.value)
    return told.value


# ---- headers


def safetensors(table, data=b"", length=None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes) -> bytes:
    return safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}, bytes(8))


HEADERS = {
    "list": (safetensors([1, 2]), "its header is no table"),
    "null": (safetensors(b"null"), "its header is no table"),
    "entry is a number": (safetensors({"a": 1}), "no dtype, shape and place of 'a'"),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [2]}}), "no dtype, shape and place of 'a'"),
    "negative size": (one(shape=[-2]), "'a' has shape [-2]"),
    "huge size": (one(shape=[10**30]), "has shape"),
    "huge beside nothing": (one(shape=[0, 2**39, 2**39, 2**39], data_offsets=[0, 0]), "has shape"),
    "size is text": (one(shape="xx"), "has shape 'xx'"),
    "size is true": (one(shape=[True, 2]), "has shape [True, 2]"),
    "sizes are lists": (one(shape=[[2]]), "has shape [[2]]"),
    "offsets are text": (one(data_offsets=["0", "8"]), "at ['0', '8']"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "no dtype, shape and place"),
    "offsets backwards": (one(data_offsets=[8, 0]), "in -8 bytes"),
    "other bytes": (one(shape=[3]), "'a' has shape [3] in 8 bytes"),
    "unknown dtype": (one(dtype="F4"), "'a' has dtype 'F4'; known are F64, F32"),
    "dtype is a list": (one(dtype=["F32"]), "'a' has dtype ['F32']"),
    "cut short": (one()[:-1], "promises 8 bytes of weights and it has 7"),
    "more than promised": (one() + b"x", "promises 8 bytes of weights and it has 9"),
    "deep": (safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "8 EB of header": (safetensors({}, length=2**63 - 1), "bytes of header, and the file has 10"),
    "7 bytes": (b"\x01\0\0\0\0\0\0", "it ends after less than 8 bytes"),
    "empty": (b"", "is empty, not weights"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "is a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>401 Unauthorized</html>", "is a saved web page"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(4096), "is a GGUF file, quantised for inference"),
    "zeros": (bytes(4096), "its beginning is zeros"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_checked_before_it_is_believed(name, tmp_path):
    content, words = HEADERS[name]
    file = tmp_path / WEIGHTS
    file.write_bytes(content)
    for read in (weights.peek, weights.read):
        error = refused(lambda read=read: read(tmp_path), words)
        assert error.where == str(file) and len(str(error)) < 700


def test_a_header_of_any_length_is_no_archive(tmp_path):
    """The file begins with its header's length, which may look like the mark of an archive or a pickle."""
    for length in (0x8B1F, 0x0280, 0x04034B50 % 2**16):
        table = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
        (tmp_path / WEIGHTS).write_bytes(safetensors(table + b" " * (length - len(table) - 1) + b"}", bytes(8)))
        assert weights.read(tmp_path)["a"].shape == (2,)


def test_small_dtypes_are_outlined(tmp_path):
    state = {"a": torch.zeros(2, 3, dtype=torch.int8), "b": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    save_file(state, tmp_path / WEIGHTS)
    outlines = weights.peek(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in outlines.items()} == {
        n: (t.dtype, t.shape) for n, t in state.items()
    }


# ---- which files


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "../../../etc/passwd", "/etc/passwd", "a\\b", 5, ["a"], None]
)
def test_an_index_names_files_beside_it_alone(name, copy):
    shutil.copy(copy / WEIGHTS, copy.parent / "outside.safetensors")
    (copy / WEIGHTS).unlink()
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: families.find(copy), "index.json", "weight_map must name files beside it")


def test_an_index_of_tensors_that_no_shard_has(tmp_path, notices):
    shards = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, shard in zip("ab", shards, strict=True):
        save_file({name: torch.ones(2)}, tmp_path / shard)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[1], "b": shards[0]}}))  # of which the shards tell better
    assert weights.read(tmp_path).keys() == {"a", "b"}
    (told,) = notices()
    assert f"a (2 in all) lies in {shards[1]}, and it is read from {shards[0]}" in told
    index.write_text(json.dumps({"weight_map": dict(zip("abc", [*shards, shards[0]], strict=True))}))
    assert refused(lambda: weights.read(tmp_path), "names c, which is in no shard").where == str(index)


@pytest.mark.parametrize("table", [{}, {"weight_map": ["a"]}, {"weight_map": {}}, {"weight_map": 5}])
def test_an_index_without_a_map(table, copy):
    (copy / WEIGHTS).unlink()
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(table))
    refused(lambda: families.find(copy), "has no weight_map")


def test_what_is_ours_and_no_whole_weights(tmp_path):
    (tmp_path / "checkpoint-2/adapter").mkdir(parents=True)
    (tmp_path / "checkpoint-2/adapter/adapter_config.json").write_text("{}")
    words = "keeps an adapter and no whole weights; adapter_path goes on with it"
    refused(lambda: weights.read(tmp_path / "checkpoint-2"), words)
    refused(lambda: weights.read(tmp_path / "checkpoint-2/adapter"), words)
    (tmp_path / "checkpoint-10").mkdir()
    refused(lambda: weights.read(tmp_path), "is a run's folder; give one of its checkpoints, as ", "checkpoint-10")


STEM = "diffusion_pytorch_model"


def one_file_and_shards(folder, state, of_shards, *, with_index) -> str:
    save_file(state, folder / f"{STEM}.safetensors")
    table = {}
    for i, (name, tensor) in enumerate(of_shards.items()):
        shard = f"{STEM}-{i + 1:05}-of-{len(of_shards):05}.safetensors"
        save_file({name: tensor}, folder / shard)
        table[name] = shard
    if with_index:
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return shard


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"a": torch.arange(4.0).view(2, 2) + 1}, "(a)"),
        ({"a": torch.arange(4.0).view(2, 2).bfloat16()}, "(a)"),
        ({"scale": torch.tensor(3.0)}, "(scale)"),
        ({"c": torch.zeros(1)}, "(c is in one of them alone)"),
    ],
)
def test_one_file_and_shards_of_other_weights(changed, told, with_index, tmp_path):
    """As a download leaves them that found other files than the last; which of the two is meant cannot be told."""
    state = {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor([True]), "scale": torch.tensor(2.0)}
    one_file_and_shards(tmp_path, state, {**state, **changed}, with_index=with_index)
    where = f"holds {STEM}.safetensors and {len({**state, **changed})} shards, {STEM}-00001-of-0000"
    refused(lambda: tensor_files.files_of(tmp_path), where, told, "one of the two is left from before: move it away")


def test_one_file_and_shards_that_are_the_same_or_not_whole(tmp_path, caplog):
    state = {"a": torch.arange(4.0).view(2, 2), "b": torch.zeros(0, 3), "scale": torch.tensor(2.0)}
    last = one_file_and_shards(tmp_path, state, state, with_index=True)
    assert [file.name for file in tensor_files.files_of(tmp_path)] == [f"{STEM}.safetensors"]
    assert not caplog.messages
    (tmp_path / last).unlink()
    assert [file.name for file in tensor_files.files_of(tmp_path)] == [f"{STEM}.safetensors"]
    assert f"{STEM}.safetensors is read; {last}, a shard of what is there too, is not there" in caplog.messages[0]
    save_file(state, tmp_path / "model.safetensors")
    tensor_files.files_of(tmp_path)
    assert f"{STEM}.safetensors is read, and model.safetensors, which is there too, is not" in caplog.messages[1]


def test_files_that_are_compared_are_opened_once_each(tmp_path, monkeypatch):
    state = {name: torch.arange(4.0).view(2, 2) for name in "abc"}
    save_file(state, tmp_path / "one.safetensors")
    save_file(dict(reversed(state.items())), tmp_path / "other.safetensors")
    opened, safe_open = [], tensor_files.safe_open
    monkeypatch.setattr(
        tensor_files, "safe_open", lambda file, *more, **by: opened.append(file.name) or safe_open(file, *more, **by)
    )
    one, other = [tmp_path / "one.safetensors"], [tmp_path / "other.safetensors"]
    assert tensor_files._unlike(one, other) == ""
    assert opened == ["one.safetensors", "other.safetensors"]


def test_missing_shards_are_counted(tmp_path):
    (tmp_path / "model-00001-of-00100.safetensors").write_bytes(one())
    error = refused(lambda: weights.read(tmp_path), "model-00002-of-00100.safetensors is missing", "and 91 more")
    assert len(error.problems) == 9
    (tmp_path / "model-00001-of-00100.safetensors").rename(tmp_path / "model-00001-of-99999999.safetensors")
    refused(lambda: weights.read(tmp_path), "says that it is one of 99999999")


def test_a_download_that_goes_on_is_not_read(tmp_path):
    """aria2 gives a file its size from the start, and fills it in from several places."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(one())
    assert weights.read(tmp_path).keys() == weights.read(file).keys()
    (tmp_path / "model.safetensors.aria2").touch()
    for path in (tmp_path, file):
        refused(lambda path=path: weights.read(path), "has model.safetensors.aria2 beside it: aria2 has not ended")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for i in (1, 2):
        save_file({"a": torch.full((2,), float(i))}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    refused(lambda: weights.read(tmp_path), "a is in another file too")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["diffusion_pytorch_model.fp16.safetensors"],
            "has the variant diffusion_pytorch_model.fp16.safetensors alone",
        ),
        (["model.fp16-00001-of-00002.safetensors"], "has the variant model.fp16-00001"),
        (["diffusion_pytorch_model.bin"], "has diffusion_pytorch_model.bin, but expected"),
        (["config.json"], "no weights here; expected diffusion_pytorch_model.safetensors or model.safetensors"),
    ],
)
def test_why_there_are_no_weights(names, words, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    refused(lambda: weights.read(tmp_path), words)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    refused(lambda: weights.read(tmp_path), "model.safetensors is a link to ../blobs/gone, which is not there")


# ---- pickles


class Shell:
    def __reduce__(self):
        import os

        return os.system, ("touch CODE_RAN",)


def test_a_pickle_says_what_it_would_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    for write in (lambda: torch.save({"a": Shell()}, file), lambda: file.write_bytes(pickle.dumps(Shell()))):
        write()
        error = refused(lambda: weights.read(file), "holds more than tensors, and loading it could run code")
        assert "weights_only" not in str(error) and "trust" not in str(error)  # torch's advice to run it
    assert not (tmp_path / "CODE_RAN").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<html>", "is a saved web page"),
        (one(), "is a safetensors file; expected weights of torch.save; rename it"),
        (b"PK\x03\x04rubbish", "cannot be read"),
        (b"\x80\x02rubbish", "cannot be read"),
        (b"nothing at all", "is no file of torch.save, for it begins with b'nothing at all'"),
    ],
)
def test_what_is_no_pickle_is_said(content, words, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    refused(lambda: weights.read(tmp_path / "weights.pth"), words)


def test_a_pickle_under_the_other_name_is_told(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    refused(lambda: weights.read(tmp_path), "is a file of torch.save", "rename it to end in .pth")


@pytest.mark.parametrize("name", tensor_files.TABLES)
def test_weights_in_a_known_table_are_taken_out(name, tmp_path, notices):
    file = tmp_path / "weights.pth"
    torch.save({name: {"module.a.weight": torch.ones(2)}, "step": 7}, file)
    assert weights.read(file)["a.weight"].tolist() == [1, 1]
    assert [name in notices()[0], "module." in notices()[1]] == [True, True] and len(notices()) == 2


def test_several_tables_are_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "weights.pth")
    refused(lambda: weights.read(tmp_path / "weights.pth"), "holds several tables, model and ema")
    torch.save({"step": 1, "optimizer": {"a": torch.ones(1)}}, tmp_path / "weights.pth")
    refused(lambda: weights.read(tmp_path / "weights.pth"), "is not a plain table of tensors by name")


# ---- names and types of tensors


@pytest.mark.parametrize("prefix", [*tensor_files.PREFIXES, "module.model."])
def test_a_known_prefix_is_left_out_in_every_family(prefix, checkpoint, tmp_path, notices):
    other = filled(network("control_t2v"), 99)
    layout.save_transformer(tmp_path / "plain", other.state_dict(), dict(other.config))
    state = load_file(tmp_path / "plain" / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "trained.safetensors")
    net = (
        families.find(checkpoint)
        .load(checkpoint, encoders=False, transformer_path=tmp_path / "trained.safetensors")
        .net
    )
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert [repr(prefix) in line for line in notices() if "begin with" in line] == [True]


def test_a_prefix_of_some_names_stays(tmp_path):
    save_file({"model.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert weights.read(tmp_path).keys() == {"model.a", "b"}


def test_an_unknown_prefix_is_told_in_a_few_lines(copy):
    state = load_file(copy / WEIGHTS)
    save_file({f"strange.{name}": tensor for name, tensor in state.items()}, copy.parent / "other.safetensors")
    family = families.find(copy)
    error = refused(
        lambda: family.load(copy, transformer_path=copy.parent / "other.safetensors"),
        "most of it does not fit",
        f"and {len(state) - weights.NAMED} more",
    )
    assert len(error.problems) == 1 + 2 * (weights.NAMED + 1)


def test_fp8_weights_are_said_in_one_line(copy, notices):
    state = load_file(copy / WEIGHTS)
    coarse = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in state.items()}
    save_file(coarse, copy / WEIGHTS)
    net = families.find(copy).load(copy, encoders=False).net
    count = sum(t.ndim > 1 for t in state.values())
    said = [line for line in notices() if "are stored in fp8" in line]
    assert len(said) == 1 and f"{count} of {len(state)} tensors" in said[0]
    name = "blocks.0.attn1.to_q.weight"
    assert torch.equal(net.state_dict()[name], coarse["blocks.0.self_attn.q.weight"].float())


def test_quantised_weights_are_refused(copy):
    state = load_file(copy / WEIGHTS)
    state["blocks.0.self_attn.q.weight"] = state["blocks.0.self_attn.q.weight"].to(torch.int8)
    save_file(state, copy / WEIGHTS)
    refused(
        lambda: families.find(copy).load(copy, encoders=False),
        "its weights are quantised; give the release in bf16",
        "blocks.0.self_attn.q.weight is stored as int8",
    )
    state["blocks.0.self_attn.q.weight"] = state["blocks.0.self_attn.q.weight"].to(torch.float8_e4m3fn)
    save_file(state | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}, copy / WEIGHTS)
    refused(lambda: families.find(copy).load(copy, encoders=False), "its weights are quantised", "scale_weight")


def outlines(width) -> dict:
    """What tells the sizes of a Wan network, of any width, without its memory."""
    axes = {
        "patch_embedding.weight": (width, 32, 1, 2, 2),
        "proj_out.weight": (64, width),
        "blocks.0.ffn.net.0.proj.weight": (4 * width, width),
        "condition_embedder.text_embedder.linear_1.weight": (width, 8),
        "condition_embedder.time_embedder.linear_1.weight": (width, 8),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in axes.items()}


@pytest.mark.parametrize("width", sizes.RELEASED_HEADS)
def test_heads_that_no_release_has_are_refused(width):
    heads = width // sizes.HEAD_DIM
    assert sizes.transformer(outlines(width), {"num_heads": heads}, "here")["attention_head_dim"] == 128
    refused(
        lambda: sizes.transformer(outlines(width), {"num_heads": 2 * heads}, "here"),
        f"num_heads is {2 * heads}",
        str(heads),
    )


def test_heads_of_another_width_are_said(notices):
    sizes.tell_heads(sizes.transformer(outlines(256), {"num_heads": 4}, "here"), "here")
    (notice,) = notices()
    assert notice.startswith("here: config.json gives attention heads of width 64, where released networks have 128;")
    sizes.tell_heads(sizes.transformer(outlines(256), {}, "there"), "there")
    assert len(notices()) == 1


def test_layers_are_counted_not_believed(copy):
    state = load_file(copy / WEIGHTS)
    for name in ("blocks.999999999.self_attn.q.weight", "blocks.x.self_attn.q.weight"):
        save_file(state | {name: torch.zeros(1)}, copy / WEIGHTS)
        refused(lambda: families.find(copy), "layers blocks.0, 1, 2 and so on are not all there, or others are")


@pytest.mark.parametrize("name", ["patch_embedding.weight", "head.head.weight", "text_embedding.0.weight"])
def test_a_tensor_of_other_axes(name, copy):
    save_file(load_file(copy / WEIGHTS) | {name: torch.zeros(3)}, copy / WEIGHTS)
    refused(lambda: families.find(copy), "is not a Wan transformer", "(3,), which should have")
