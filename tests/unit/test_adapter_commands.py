"""`reeltune import` and `export --adapter`: what they say, what they leave, what they refuse; the page's tables."""

import json
from pathlib import Path

import pytest
import torch

from reeltune import cli
from reeltune.adapters import writing
from reeltune.adapters.adapter import Adapter
from reeltune.adapters.dialects import read_adapter
from reeltune.adapters.files import stored_in
from reeltune.adapters.loaders import BY_TOOL, Applied, applied
from reeltune.adapters.networks import NETWORKS
from reeltune.adapters.proof import prove
from reeltune.core.errors import UserError
from reeltune.export import command
from reeltune.export.adapter import export_adapter, tell
from scripts.adapters_page import made, named, page
from tests.unit.made_adapters import written_to


def test_a_file_says_what_it_is(tmp_path):
    about = {"base_model": "/models/Wan2.1-Fun-V1.1-1.3B-Control", "rank": 2}
    adapter = Adapter(made("wan_fun", rank=2, alpha=1.0).layers, about=about)
    source = written_to(tmp_path, named(adapter, "wan_fun", "diffusion_model."), {"base_model": about["base_model"]})
    lines = list(export_adapter(source, tmp_path / "cat.safetensors", "musubi", trigger_words="a zkw cat"))
    assert lines[0].endswith("rank 2, alpha 1 (24 layers)") and "Wan, width 24" in lines[0]
    assert next(line for line in lines if line.startswith("musubi")).split()[4:7] == ["1.000000", "to", "1.000000"]
    told = stored_in(tmp_path / "cat.safetensors", outline=True).metadata
    assert told["ss_network_module"] == "networks.lora_wan"
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "2"
    assert told["ss_sd_model_name"] == "Wan2.1-Fun-V1.1-1.3B-Control"
    assert told["modelspec.title"] == told["ss_output_name"] == "cat"
    assert told["modelspec.trigger_phrase"] == "a zkw cat" and told["modelspec.architecture"] == "wan2.1/lora"
    assert json.loads(told["reeltune.trained"])["base_model"] == about["base_model"]
    assert "self_attn.q" in told["reeltune.targets"]


def test_import_tells_the_strength_in_each_tool_and_mends_it(tmp_path, capsys):
    adapter = made("wan_fun", rank=4, alpha=2.0)
    source = written_to(tmp_path, named(adapter, "wan_fun", "diffusion_model.", alpha=False))
    assert "alpha: none in the file, so every tool takes the rank for it" in list(tell(source))
    words = {line.split()[0]: line for line in tell(source, alpha=2.0)}
    assert words["VideoX-Fun"] == "VideoX-Fun       strength 2.000"
    assert words["musubi-tuner"].endswith("loads none of it, and says so in a log at most")
    out = str(tmp_path / "mended.safetensors")
    assert cli.main(["import", str(source), "--alpha", "2", "--out", out, "--for", "comfyui"]) == 0
    assert cli.main(["import", out]) == 0
    told = capsys.readouterr().out
    assert "ComfyUI          strength 1.000" in told
    assert "alpha: none in the file, so the rank is taken for it, which is right" in told
    tensors = stored_in(tmp_path / "mended.safetensors", outline=False).tensors
    proof = prove(adapter.layers, adapter.changes, applied(BY_TOOL["VideoX-Fun"], tensors, NETWORKS["wan_fun"]))
    assert proof.lowest_ratio == proof.highest_ratio == 1 and not proof.missing and not proof.strange


def test_nothing_is_left_where_the_rules_are_not_kept(tmp_path, monkeypatch):
    source = written_to(tmp_path, named(made("wan_fun"), "wan_fun", "diffusion_model."))
    scaled = writing._scaled
    monkeypatch.setattr(writing, "_scaled", lambda pair: scaled(scaled(pair)) if pair.rank == 0 else pair)
    out = tmp_path / "out.safetensors"
    with pytest.raises(RuntimeError, match=r"is not what was trained, by the rules of reeltune: applied / trained 2"):
        list(export_adapter(source, out, "comfyui"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize(("stored", "written"), [(FLOAT8, "as_stored"), (FLOAT8, "bf16"), (torch.bfloat16, "fp32")])
@pytest.mark.parametrize("network", ["wan_fun", "hunyuan_video"])
def test_the_scale_is_rounded_once_to_the_type_that_is_written(stored, written, network, tmp_path):
    """By each layer's own change, in fp64: no further off than rounding of what is written explains."""
    tensors = named(
        made(network, rank=2, alpha=1.4), network, "transformer." if network != "wan_fun" else "diffusion_model."
    )
    source = written_to(tmp_path, {name: one.to(stored) if one.ndim else one for name, one in tensors.items()})
    out = tmp_path / "out.safetensors"
    list(export_adapter(source, out, "comfyui", dtype=written))
    types = {one.dtype for one in stored_in(out, outline=False).tensors.values() if one.ndim}
    assert types == {{"as_stored": stored, "bf16": torch.bfloat16, "fp32": torch.float32}[written]}
    before, after = (read_adapter(file)[0].layers for file in (source, out))
    if written == "fp32":
        proof = prove(before, {}, Applied(after, {}))
        assert proof.error < 1e-6


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_numbers_that_the_type_does_not_hold_are_told(scale, tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    scaled = {name: one * scale if "lora_B" in name else one for name, one in tensors.items()}
    source, out = written_to(tmp_path, scaled), tmp_path / "out.safetensors"
    words = "so small that its type rounds them away" if scale < 1 else "that its type does not hold"
    with pytest.raises(UserError, match=rf"\(and 23 more\) has numbers {words}; give --dtype fp32 or bf16"):
        list(export_adapter(source, out, "comfyui", dtype="fp16"))
    assert not out.exists()
    list(export_adapter(source, out, "comfyui", dtype="bf16"))


def test_a_base_that_the_file_names_and_that_is_no_model_is_told(tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    source = written_to(tmp_path, tensors, {"base_model": str(tmp_path)})
    with pytest.raises(UserError) as told:
        list(export_adapter(source, tmp_path / "out.safetensors", "comfyui"))
    assert told.value.problems[0].startswith(f"its base_model, as its metadata says, is {str(tmp_path)!r}: ")
    assert told.value.problems[-1] == "--pretrained_model_name_or_path says where the model is"


def test_commands_refuse_what_does_not_go_together(tmp_path, capsys):
    file = str(written_to(tmp_path, named(made("cogvideox_fun", only="attn1"), "cogvideox_fun", "transformer.")))
    out = str(tmp_path / "out.safetensors")
    for words, argv in {
        "--adapter needs --for and a tool": ["export", file, out, "--adapter"],
        "--for go with --adapter alone": ["export", file, out, "--for", "comfyui"],
        "--max_shard_size and --diffusers are of whole models": [
            "export",
            file,
            out,
            "--adapter",
            "--for",
            "comfyui",
            "--diffusers",
            "--max_shard_size",
            "1GB",
        ],
        "--out and --for go together": ["import", file, "--out", out],
        "is to be a file that ends in .safetensors": ["export", file, str(tmp_path), "--adapter", "--for", "comfyui"],
        "is there already": ["export", file, file, "--adapter", "--for", "comfyui"],
        "is missing; give a checkpoint-N folder": ["export", out, out, "--adapter", "--for", "comfyui"],
        "--pretrained_model_name_or_path says of which": ["export", file, out, "--adapter", "--for", "diffusers"],
        "has no moving average": ["export", file, out, "--adapter", "--for", "diffusers", "--ema"],
    }.items():
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err
    assert tuple(writing.DIALECTS) == command.DIALECTS


def test_the_pages_tables_are_those_of_this_version():
    text = (Path(__file__).parents[2] / "docs/adapters.md").read_text(encoding="utf-8")
    assert page(text) == text
    written_rows = [line for line in text.splitlines() if line.startswith("| `--for ") and "1.000" in line]
    assert len(written_rows) == sum(len(one.forms) for one in writing.DIALECTS.values())
