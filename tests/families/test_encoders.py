"""Encoders that transformers reads: names under other tools' prefixes, and tokenizers of another release."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import tensor_files, weights
from reeltune.families.weights import load_encoder
from tests.families.tiny_wan import tiny_checkpoint

SMALL = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NETS = {
    "t5": (T5EncoderModel, T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)),
    "llama": (LlamaModel, LlamaConfig(**SMALL, num_key_value_heads=2)),
    "clip": (CLIPTextModel, CLIPTextConfig(**SMALL)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_a_known_prefix_is_left_out(name, prefix, tmp_path, monkeypatch):
    cls, config = NETS[name]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path)
    plain = load_encoder(cls, tmp_path).state_dict()
    (file,) = tmp_path.glob("*.safetensors")
    save_file({prefix + key: value for key, value in load_file(file).items()}, file, {"format": "pt"})
    told = []
    monkeypatch.setattr(weights, "tell_prefix", lambda taken, where: told.append(taken))
    found = load_encoder(cls, tmp_path).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert told == ([] if prefix in ("", f"{cls.base_model_prefix}.") else [prefix])


def test_any_other_prefix_is_refused(tmp_path):
    cls, config = NETS["t5"]
    cls(config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({f"other.{key}": value for key, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="missing: "):
        load_encoder(cls, tmp_path)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("change", ["none", "missing", "unexpected", "misshapen"])
def test_headers_alone_tell_the_same(name, change, tmp_path):
    """What `check` and `plan` refuse of an encoder is what training does."""
    cls, config = NETS[name]
    cls(config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    last = [key for key, tensor in state.items() if tensor.ndim == 2][-1]
    if change == "unexpected":
        state["odd.weight"] = torch.zeros(3)
    elif change != "none":
        matrix = state.pop(last)
        state |= {last: matrix[:1].clone()} if change == "misshapen" else {}
    save_file(state, file, {"format": "pt"})
    answers = []
    for fake in (None, FakeTensorMode()):
        try:
            net = load_encoder(cls, tmp_path, torch.bfloat16, fake)
            answers.append({key: (tensor.shape, tensor.dtype) for key, tensor in net.state_dict().items()})
        except UserError as error:
            answers.append(str(error))
    told = {"none": "", "unexpected": "unexpected: odd.weight"}.get(change, f"{change}: {last}")
    assert answers[0] == answers[1] and (told in answers[0] if told else isinstance(answers[0], dict))


def test_one_odd_name_is_no_prefix():
    assert tensor_files.prefix_of(["module.model.a", "module.model.b"]) == "module.model."
    assert tensor_files.prefix_of(["module.model.a", "module.b"]) == "module."
    assert tensor_files.prefix_of(["module.a", "b"]) == tensor_files.prefix_of([]) == ""


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(tmp_path / "wan", "control_t2v")


def test_a_tokenizer_of_another_release_is_refused(model):
    family = families.find(model)
    tokenizer = family.frozen_files["tokenizer"]
    family.load(model)
    state = torch.load(family.frozen_files["text"], weights_only=True)
    (name,) = [key for key in state if "embedding" in key and state[key].ndim == 2 and "pos" not in key]
    rows = len(state[name])
    size = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(size) <= rows
    state[name] = state[name][: len(size) - 1].clone()
    torch.save(state, family.frozen_files["text"])
    told = f"its ids go up to {len(size) - 1}, and the table of embeddings of its encoder has {len(size) - 1} rows"
    with pytest.raises(UserError, match=told) as error:
        families.find(model).load(model)
    assert error.value.where == str(tokenizer)
