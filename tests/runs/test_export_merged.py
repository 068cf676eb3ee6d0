"""Adapters merged into whole weights: every number, both forms, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from reeltune import cli
from reeltune.adapters import saved
from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.core.errors import UserError
from reeltune.export.main import export
from reeltune.export.merge import change, export_merged
from reeltune.families import configs, tensor_files, weights
from tests.runs.test_sample_adapters import in_shares

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "as_stored": torch.float32}


@pytest.fixture(scope="module")
def checkpoint(adapter_run):
    return adapter_run / "checkpoint-4"


@pytest.fixture(scope="module")
def model(adapter_run):
    return adapter_run.parent / "model"


@pytest.fixture(scope="module")
def base(model):
    return weights.read(model)


def with_change(base, folder, strength=1.0):
    """Released name -> base + strength * change, in fp64."""
    stored, out = saved.read(folder), {name: weight.double() for name, weight in base.items()}
    for name, weight in stored.items():
        if name.endswith("lora_A.weight"):
            B_OR = stored[name.replace("lora_A", "lora_B")].double()
            out[name.replace("lora_A.", "")] += strength * 6.0 / 2 * B_OR @ weight.double()
        elif "lora_B" not in name:
            out[name] += strength * (weight.double() - out[name])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_base_and_change_in_released_names(dtype, checkpoint, model, base, tmp_path):
    _, *files, proof, tried = export_merged(checkpoint, tmp_path / "out", dtype=dtype, max_shard_size="200KB")
    wanted, written = with_change(base, checkpoint / "adapter"), weights.read(tmp_path / "out")
    assert len(files) > 1 and len(tensor_files.files_of(tmp_path / "out")) == len(files)
    assert written.keys() == base.keys() and {one.dtype for one in written.values()} == {DTYPES[dtype]}
    changed = {name for name in base if not torch.equal(wanted[name], base[name].double())}
    assert len(changed) == 8 and "8 of them changed by adapters" in proof  # q twice and ffn.0 in 2 blocks, and head
    eps = torch.finfo(DTYPES[dtype]).eps
    for name, weight in written.items():
        if name not in changed:
            assert torch.equal(weight, base[name].to(weight.dtype))
        assert ((weight.double() - wanted[name]).abs() <= eps * wanted[name].abs() + 1e-6).all(), name
    assert tried == "a forward pass of wan_fun/control_v1.1 on a clip of 5x64x64: finite"
    told = float(proof.partition("at most ")[2].split()[0])
    most = max(float((written[name].double() - wanted[name]).abs().max()) for name in changed)
    assert abs(told - most) <= 0.05 * most + 1e-7
    assert configs.read_config(tmp_path / "out") == configs.read_config(model)


def test_files_at_a_strength_into_a_model_in_diffusers_names(checkpoint, model, base, tmp_path):
    from diffusers import WanTransformer3DModel

    texts = [f"{checkpoint / 'adapter' / saved.FILE}:0.25", f"{checkpoint}:0.5"]
    list(export_merged(model, tmp_path / "out", adapters=texts, dtype="fp32", diffusers=True))
    wanted = with_change(base, checkpoint / "adapter", 0.75)
    net, report = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    mine, theirs = wanted["blocks.1.self_attn.q.weight"], net.state_dict()["blocks.1.attn1.to_q.weight"]
    assert (theirs - mine).abs().max() < 1e-6 < 1e-3 < (base["blocks.1.self_attn.q.weight"] - mine).abs().max()


@pytest.mark.slow
def test_whoever_wrote_the_checkpoint_and_its_average(checkpoint, base, tmp_path):
    shares = in_shares(checkpoint, tmp_path / "run/checkpoint-4")
    shutil.copyfile(checkpoint.parent / "recipe.yaml", tmp_path / "run/recipe.yaml")
    for source, name in ((checkpoint, "one"), (shares, "several")):
        list(export_merged(source, tmp_path / name, dtype="fp32"))
    list(export_merged(checkpoint, tmp_path / "average", dtype="fp32", ema=True))
    one, several, average = (weights.read(tmp_path / name) for name in ("one", "several", "average"))
    assert all(torch.equal(one[name], several[name]) for name in base)
    wanted = with_change(base, checkpoint / "adapter_ema")
    assert max(float((average[name] - wanted[name]).abs().max()) for name in base) < 1e-6
    assert not torch.equal(average["head.head.weight"], one["head.head.weight"])


def test_a_whole_checkpoint_takes_adapters_too(checkpoint, adapter_run, base, tmp_path):
    full = tmp_path / "run/checkpoint-9"
    (full / "transformer").mkdir(parents=True)
    (full / "progress.json").write_text('{"step": 9, "epoch": 0, "cursor": 9}')
    shutil.copyfile(adapter_run / "recipe.yaml", tmp_path / "run/recipe.yaml")
    doubled = {name: 2 * weight for name, weight in base.items()}
    weights.write(doubled, full / "transformer/diffusion_pytorch_model.safetensors")
    shutil.copyfile(adapter_run.parent / "model/config.json", full / "transformer/config.json")
    list(export_merged(full, tmp_path / "out", adapters=[str(checkpoint)], dtype="fp32"))
    written, wanted = weights.read(tmp_path / "out"), with_change(doubled, checkpoint / "adapter")
    assert max(float((written[name] - wanted[name]).abs().max()) for name in base) < 1e-6
    with pytest.raises(UserError, match="keeps the whole network; give --adapters to merge into it"):
        list(export_merged(full, tmp_path / "none"))


def test_a_merge_that_is_wrong_is_told_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def spoil(name, weight, adapters):
        return weight.float() + 0.01

    monkeypatch.setattr("reeltune.export.merge.merged", spoil)
    with pytest.raises(RuntimeError, match=r"does not hold base \+ change: blocks\.0\.cross_attn\.q\.weight"):
        list(export_merged(checkpoint, tmp_path / "out", dtype="fp32"))
    assert list(tmp_path.iterdir()) == []


def test_the_proof_is_dora_too():
    def numbers(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    base, magnitude_O = numbers(6, 4, seed=0), numbers(6, seed=1).abs()
    dora = LowRank(numbers(2, 4, seed=2), numbers(6, 2, seed=3), 3.0, magnitude_O=magnitude_O)
    adapter = Adapter({"a": dora}, changes={"b": numbers(4, seed=4)})
    assert (base + change(adapter, "a.weight", base.double()) - dora.changed(base)).abs().max() < 1e-6
    assert torch.equal(change(adapter, "b", torch.ones(4).double()), adapter.changes["b"].double())


def test_what_is_refused(checkpoint, model, base, tmp_path):
    out = tmp_path / "out"
    cases = [
        ({"source": model}, "give --adapters to merge into this model"),
        ({"source": model, "adapters": [str(checkpoint)], "ema": True}, "--ema is of a run's adapter"),
        ({"source": model, "adapters": [str(checkpoint)], "pretrained_model_name_or_path": "x"}, "leave one out"),
        ({"source": tmp_path / "gone"}, "gone is no folder"),
        ({"source": checkpoint, "pretrained_model_name_or_path": "/gone"}, "the base is not at '/gone'"),
        ({"source": checkpoint, "adapters": [f"{tmp_path}/no.safetensors:1"]}, r"no\.safetensors: is missing"),
    ]
    for settings, words in cases:
        with pytest.raises(UserError, match=words):
            list(export_merged(settings.pop("source"), out, **settings))
    with pytest.raises(UserError, match="checkpoint-4 keeps an adapter; --merge makes whole weights"):
        list(export(checkpoint, out))
    coarse = tmp_path / "coarse"
    shutil.copytree(model, coarse)
    name = "blocks.0.self_attn.q.weight"
    save_file(base | {name: base[name].to(torch.float8_e4m3fn)}, coarse / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="kept as float8_e4m3fn, which has no room for a change"):
        list(export_merged(coarse, out, adapters=[str(checkpoint)]))
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--merge", "--adapter"], "leave one of the two out"),
        (["--adapters", "a"], "--adapters goes with --merge alone"),
        (["--merge", "--for", "comfyui"], "--for go with --adapter alone"),
    ],
)
def test_flags_that_have_no_use(flags, words, capsys):
    assert cli.main(["export", "checkpoint-4", "out", *flags]) == 2
    assert words in capsys.readouterr().err
