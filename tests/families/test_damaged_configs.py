"""Configs, tokenizers and folders that are not what they should be: one message each, and nothing of theirs runs."""

import ast
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import configs, schedule, tokenizers, weights
from reeltune.families.wan_fun import family as wan
from tests.families.test_damaged_weights import WEIGHTS, refused
from tests.families.tiny_wan import tokenizer_in

# ---- configs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "is no table of settings"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("<html>", "is a saved web page"),
        ('{"num_layers": "many"}', "num_layers is 'many'; expected a whole number"),
        ('{"num_layers": 1000000000}', "num_layers is 1000000000"),
        ('{"num_heads": -4}', "-4 attention heads"),
        ('{"num_heads": [2]}', "num_heads is [2]"),
        ('{"num_heads": 2.0}', "num_heads is 2.0"),
        ('{"dim": true}', "dim is True"),
        ('{"eps": "x"}', "eps is 'x'; expected a number"),
        ('{"eps": Infinity}', "eps is inf; expected a number"),
        ('{"num_heads": 16, "text_len": null}', "text_len is None"),
        ('{"_class_name": ["WanModel"]}', "_class_name is ['WanModel']"),
    ],
)
def test_a_config_of_the_wrong_types(content, words, copy):
    (copy / "config.json").write_text(content)
    refused(lambda: families.find(copy).load(copy, encoders=False), words)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("scheduler_kwargs: [1]", "scheduler_kwargs is [1]; expected a table"),
        ("scheduler_kwargs: {shift: x}", "shift is 'x'; expected a number"),
        ("scheduler_kwargs: {shift: -1.0}", "shift is -1; expected more than 0"),
        ("scheduler_kwargs: {shift: .nan}", "shift is nan"),
        ("scheduler_kwargs: {num_train_timesteps: 0}", "num_train_timesteps is 0; expected 1 to"),
        ("scheduler_kwargs: {num_train_timesteps: 1.5}", "num_train_timesteps is 1.5"),
        ("scheduler_kwargs: {use_dynamic_shifting: [1]}", "use_dynamic_shifting is [1]; expected true or false"),
        ("vae_kwargs: text", "vae_kwargs is 'text'; expected a table"),
        ("vae_kwargs: {vae_subpath: [a]}", "vae_subpath is ['a']; expected a place inside the checkpoint"),
        ("vae_kwargs: {vae_subpath: ../x.pth}", "vae_subpath is '../x.pth'; expected a place inside"),
        ("vae_kwargs: {vae_subpath: /etc/passwd}", "vae_subpath is '/etc/passwd'; expected a place inside"),
        ("a: &a [x]\nb: [*a, *a]", "*a stands for another value"),
    ],
)
def test_a_models_yaml_of_the_wrong_types(section, words, copy):
    (copy / "model.yaml").write_text(section)
    refused(lambda: families.find(copy, config_path=copy / "model.yaml"), words)


class Net(torch.nn.Module):
    def __init__(self, width: int = 4, num_layers: int = 2, scale: float = 0.5, kinds: tuple[str, ...] = ("a",)):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(num_layers))
        assert width % 2 == 0, "odd"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"width": "4"}, "width is '4'; expected a whole number up to"),
        ({"width": 2**40}, f"width is {2**40}"),
        ({"width": 0}, "width is 0; expected more than 0"),
        ({"width": None}, "width is None"),
        ({"scale": -0.5}, "scale is -0.5; expected more than 0"),
        ({"kinds": "a"}, "kinds is 'a'; expected a list of up to 64, each text"),
        ({"kinds": []}, "kinds is []"),
        ({"kinds": ["a"] * 65}, "kinds is ["),
    ],
)
def test_arguments_are_held_to_the_classs_types(config, words):
    refused(lambda: configs.check(Net, config, "here"), words)
    configs.check(Net, {"width": 6, "num_layers": 1, "scale": 1, "kinds": ["a", "b"], "more": "ignored"}, "here")


def test_what_norms_add_is_small():
    class Normed:
        def __init__(self, norm_eps: float = 1e-5):
            pass

    refused(lambda: configs.check(Normed, {"norm_eps": 1e9}, "here"), "norm_eps is 1000000000.0; expected at most 1")
    configs.check(Normed, {"norm_eps": 1e-6}, "here")


def test_a_network_that_cannot_be_built():
    assert configs.build(Net, {"width": 6}, "here").layers[0].weight.is_meta
    refused(
        lambda: configs.build(Net, {"width": 5}, "here"), "Net cannot be made of its config.json (AssertionError: odd)"
    )


def test_no_more_layers_than_the_weights_number():
    names = ["layers.0.weight", "layers.1.weight"]
    configs.check_layers({"num_layers": 2, "text_config": {"num_hidden_layers": 2}}, names, "here")
    refused(lambda: configs.check_layers({"num_layers": 3}, names, "here"), "num_layers is 3, but the weights have 2")
    inner = {"text_config": {"num_hidden_layers": 10**9}}
    refused(lambda: configs.check_layers(inner, names, "here"), "num_hidden_layers is 1000000000")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "code from a hub, which is not run"),
        ({"_attn_implementation": "someone/kernel:fn"}, "code from a hub, which is not run"),
        ({"quantization_config": {"load_in_8bit": True}}, "its weights are quantised"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, but the weights have"),
        ({"d_model": "wide"}, "is no config of"),
        ({"d_kv": 10**12}, "which is absurd"),
        ({"d_ff": 10**7}, "config.json makes a network of"),
        ({"dtype": "float99"}, "float99"),
        ({"dense_act_fn": "nothing"}, "cannot be made of its config.json"),
    ],
)
def test_an_encoders_config(changes, words, tmp_path):
    from transformers import T5Config, T5EncoderModel

    small = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(**small)).save_pretrained(tmp_path)
    weights.load_encoder(T5EncoderModel, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(lambda: weights.load_encoder(T5EncoderModel, tmp_path), words)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"_class_name": "DDIMScheduler", "beta_start": "x"}, "beta_start is 'x'; expected a number"),
        ({"_class_name": "DDIMScheduler", "beta_start": 0.5, "beta_end": 0.1}, "expected 0 < start <= end < 1"),
        ({"_class_name": "DDIMScheduler", "prediction_type": ["epsilon"]}, "prediction_type is ['epsilon']"),
        ({"_class_name": schedule.FLOW, "num_train_timesteps": 10**7}, "num_train_timesteps is 10000000"),
        ({"_class_name": schedule.FLOW, "shift": 10**9}, "shift is 1e+09"),
    ],
)
def test_a_scheduler_of_the_wrong_types(said, words, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(said))
    refused(lambda: schedule.read(tmp_path), words)


# ---- tokenizers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}, "names code of its own"),
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": None}, "names code of its own"),
        ({"tokenizer_class": 5}, "tokenizer_class is 5; expected a name"),
        ({"tokenizer_class": ["T5Tokenizer"]}, "tokenizer_class is ['T5Tokenizer']"),
        ({"model_max_length": "x"}, "model_max_length is 'x'; expected a number"),
        ({"model_max_length": -1}, "model_max_length is -1"),
        ({"extra_ids": 10**9}, "extra_ids is 1000000000; expected at most 10,000"),
        ({"added_tokens_decoder": [1]}, "is no tokenizer"),
        ({"added_tokens_decoder": {"x": {}}}, "is no tokenizer"),
    ],
)
def test_a_tokenizer_of_the_wrong_types_runs_nothing(changes, words, tmp_path, monkeypatch):
    folder = tokenizer_in(tmp_path / "tokenizer")
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('CODE_RAN').touch()\n")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a question was asked"))
    refused(lambda: tokenizers.load_tokenizer(folder), words)
    assert not (folder / "CODE_RAN").exists()


@pytest.mark.parametrize("content", [b"{}", b'{"model": 5}', b'{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_fast_tokenizer_of_the_wrong_kind(content, tmp_path):
    folder = tokenizer_in(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_bytes(content)
    refused(lambda: tokenizers.load_tokenizer(folder), "is no tokenizer")


def test_a_pointer_in_a_tokenizer_is_named(tmp_path):
    folder = tokenizer_in(tmp_path / "tokenizer")
    (folder / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(lambda: tokenizers.load_tokenizer(folder), "spiece.model", "is a Git LFS pointer")


class Templated:
    """A tokenizer as far as templates go."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, turns, **how):
        return [turn[0]["content"][0]["text"] for turn in turns]


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9**(9**(9**9)) }}",
        "{{ 'x' * 10000000000 }}",
    ],
)
def test_a_chat_template_that_never_ends(template, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizers, "TEMPLATE_S", 1.5)
    began_s = computed_s()
    with pytest.raises(UserError, match="its chat_template does not come to an end"):
        tokenizers.check_chat_template(Templated(template), tmp_path)
    assert computed_s() - began_s < 4


def computed_s() -> float:
    """Of processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_a_chat_template_that_is_none(tmp_path):
    refused(lambda: tokenizers.check_chat_template(Templated(None), tmp_path), "has no chat_template")
    plain = "{% for message in messages %}{{ message.content[0].text | upper }}{% endfor %}"
    tokenizers.check_chat_template(Templated(plain), tmp_path)


def test_one_helper_calls_from_pretrained():
    """Nothing else in the source does, so that nothing is fetched and no code beside the weights is run."""
    source = Path(families.__file__).parents[1]
    calls = [
        (file.relative_to(source).as_posix(), node)
        for file in source.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "load_from_hub", "trust_remote_code")
    ]
    assert [file for file, _ in calls] == ["families/configs.py"]
    kept = {}

    class Recorded:
        @classmethod
        def from_pretrained(cls, folder, **settings):
            kept.update(settings)

    configs.from_files(Recorded, Path("folder"), dtype="auto")
    assert kept == {"local_files_only": True, "trust_remote_code": False, "dtype": "auto"}


# ---- what a path is


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control",
            "`hf download alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control",
        ),
        ("/no/such/folder", "is not a folder; give that of a download"),
    ],
)
def test_a_path_that_is_no_folder(path, words):
    refused(lambda: families.find(path), words)


def test_a_link_and_a_file_are_no_folder(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_text("")
    refused(lambda: families.find(tmp_path / "link"), "is a link to gone, which is not there")
    refused(lambda: families.find(tmp_path / "file"), "but a file; give the folder")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"snapshots/abc/config.json": b"{}", "refs/main": b"abc"}, "this is the hub's cache; give "),
        (
            {"transformer/diffusion_pytorch_model.fp16.safetensors": b"x"},
            "has the variant diffusion_pytorch_model.fp16",
        ),
        ({"diffusion_pytorch_model.bin": b"x"}, "has diffusion_pytorch_model.bin"),
        ({"wan-q4.gguf": b"GGUF\3\0\0\0"}, "wan-q4.gguf is a GGUF file"),
        ({"inner/config.json": b"{}"}, "inner is meant"),
        ({f"part_{i}": b"x" for i in range(30)}, "and 18 more, which is no checkpoint"),
        ({"high_noise_model/config.json": b"{}"}, "high_noise_model, of a Wan2.2 model of two networks, "),
        ({"transformer_2/config.json": b"{}"}, "transformer_2, of a Wan2.2 model of two networks, "),
    ],
)
def test_why_a_folder_is_no_checkpoint(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    refused(lambda: families.find(tmp_path), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("img_emb.emb_pos", "a Wan network of Wan2.1-FLF2V, which is not supported yet"),
        ("vace_patch_embedding.weight", "a Wan network of Wan2.1-VACE"),
    ],
)
def test_wan_models_that_are_not_supported_yet(name, words, copy):
    save_file(load_file(copy / WEIGHTS) | {name: torch.zeros(1)}, copy / WEIGHTS)
    refused(lambda: families.find(copy), words)
    assert wan.SUPPORTED in str(refused(lambda: families.find(copy), "Wan"))
