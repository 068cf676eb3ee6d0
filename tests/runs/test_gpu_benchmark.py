"""`python -m benchmarks gpu`, rehearsed on the CPU at tiny sizes: the code that a GPU runs, but for the device."""

import gc
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import StringIO

import pytest
import torch

from benchmarks import parity_wan
from benchmarks.golden import Row
from benchmarks.gpu import command, exact, forecast, goldens, kernels, networks, page, processes, saving, step, steps
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import FULL, TINY, Network
from reeltune import cli
from reeltune.data import measuring
from reeltune.demo.checkpoint import write_checkpoint
from reeltune.demo.clips import write_data_set
from reeltune.reporting import report
from tests.distributed import processes as several
from tests.distributed.processes import FORKS
from tests.families.full_size import released
from tests.runs.small_run import measure_here

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(what a rehearsal wrote, what it printed)."""
    folder, words = tmp_path_factory.mktemp("rehearsal"), ["ceilings", "steps", "plan", "encoding", "saving"]
    gc.freeze()  # a rehearsal asks a dozen times for garbage, and each would look through all that tests have imported
    with redirect_stdout(StringIO()) as printed:
        assert command.main(["--out", str(folder), "--ways", "2", "--only", *words]) == 0
    assert not (folder / "gpu.json").exists()
    return json.loads((folder / "gpu_rehearsal.json").read_text()), printed.getvalue()


def rows(found, part):
    return {row["row"]: row for row in found["parts"][part]["rows"]}


@pytest.mark.slow
def test_a_rehearsal_is_no_figure_of_a_gpu(rehearsal):
    found, told = rehearsal
    assert not found["failures"]
    assert found["about"]["figures"] == TINY.note and "gpu" not in found["about"]
    assert told.startswith(f"figures: {TINY.note}") and told.strip().endswith(TINY.note)
    measured = rows(found, "steps")
    assert list(measured) == [way.name for way in steps.WAYS[:2]]
    for row in measured.values():
        assert row["attention"] == "auto, flash"
        assert row["attention_share"] > 0 and row["products_share"] > 0 and row["compiled_share"] == 0
        assert row["tokens_s"] * row["step_s"] == pytest.approx(2 * 2 * 3)
        assert row["mfu"] == row["peak_gb"] == "unknown"
    network = TINY.networks["1.3b"]
    done = measured[steps.WAYS[0].name]
    assert done["tflops"] * done["step_s"] * 1e12 == pytest.approx(step.flops(network, TINY.clip, TINY.encoders))
    encoded = rows(found, "encoding")
    assert "step with encode_ahead" in encoded
    for clips in (1, 2):
        told = encoded[f"VAE, clips together: {clips}"]
        assert told["a_clip_s"] * clips == told["seconds"]
        assert told["frames_s"] * told["a_clip_s"] == pytest.approx(TINY.clip.frames)
    copied = rows(found, "saving")["whole network, second copy"]["gb"] * 1e9
    sizes = {name: w.numel() for name, w in networks.transformer(network, TINY.encoders).named_parameters()}
    learned = sum(size for name, size in sizes.items() if not name.startswith("ref_conv"))  # which this mode leaves out
    assert copied == 2 * sum(sizes.values()) + (4 + 4) * learned + 4 * (len(sizes) - 2)  # and counts of steps


@pytest.mark.slow
def test_plan_is_held_against_it(rehearsal):
    foretold = rows(rehearsal[0], "plan")
    assert list(foretold) == [way.name for way in steps.WAYS[:2]]
    assert all(row["plan_gb"] > 0 and row["memory_ratio"] == "unknown" for row in foretold.values())


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    report = Report(tmp_path / "gpu.json", {}, budget_s=10)
    with report.part("one", 0.5) as part:
        with part.attempt("broken"):
            raise ValueError("no such thing")
        part.row("whole", x=1.0)
    with report.part("two", 0.5):
        raise OSError("gone")
    with report.part("three", 0.0) as part:
        part.row("whole", x=2.0)
        on_disk = json.loads((tmp_path / "gpu.json").read_text())  # after each row
    assert [row["row"] for row in on_disk["parts"]["three"]["rows"]] == ["whole"]
    assert report.failures == ["two", "one: broken"]
    assert "no such thing" in report.parts["one"]["rows"][0]["error"]
    assert "OSError: gone" in on_disk["parts"]["two"]["error"]
    assert "| broken |  | ValueError: no such thing |" in page.table(report.parts["one"]["rows"], ("x", "failed"))


def test_a_part_has_what_earlier_ones_left(tmp_path):
    now = [0.0]
    report = Report(tmp_path / "gpu.json", {}, budget_s=100, clock=lambda: now[0])
    with report.part("one", 0.5) as part:
        assert part.left_s() == 50
        now[0] = 20
    with report.part("two", 0.25) as part:
        assert part.left_s() == 55


def test_the_parts_that_are_asked_for_have_the_whole_budget(tmp_path, monkeypatch):
    budgets = {}

    def part(report, name, share):
        budgets[name] = share
        return nullcontext()

    monkeypatch.setattr(Report, "part", part)
    for module in (goldens, saving):
        monkeypatch.setattr(module, "measure", lambda *_: None)
    assert command.main(["--out", str(tmp_path), "--only", "parity", "saving"]) == 0
    both = command.PARTS["parity"] + command.PARTS["saving"]
    assert budgets.pop("prepare") == 0.0
    assert budgets == {name: command.PARTS[name] / both for name in ("parity", "saving")}
    assert sum(command.PARTS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x4x1_cga1x1x1", "attention"),
        ("nvjet_sm90_tst_256x152_64x4_1x2_h_bz_coopA_bias_TNT", "products"),
        ("triton_red_fused__to_copy_gelu_gelu_backward_sum_view_7", "compiled"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "others"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, kind):
    """As an H100 had them (2026-11-27, torch 2.11)."""
    assert kernels._kind(kernel) == kind


def test_ways_that_take_a_larger_card_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "card_gb", lambda _: 85.0)
    monkeypatch.setattr(steps, "WAYS", [way for way in steps.WAYS if way.least_gb])
    report = Report(tmp_path / "gpu.json", {}, budget_s=60)
    with report.part("steps", 1.0) as part:
        steps.measure(part, TINY, CPU, {})
    assert [row["why"] for row in part.found["not_run"]] == ["it takes a card of 120 GB"]
    assert not part.rows


@pytest.mark.slow
def test_ways_for_which_no_time_is_left_are_named(tmp_path):
    report = Report(tmp_path / "gpu.json", {}, budget_s=0)
    with report.part("steps", 1.0) as part:
        steps.measure(part, TINY, CPU, {}, 4)
    assert [row["row"] for row in part.found["not_run"]] == [way.name for way in steps.WAYS[:4]]
    assert not part.rows


def test_memory_is_flagged_beyond_five_percent():
    told = {"peak_gb": 1.0, "flops": 100}
    flags = [forecast._memory(told, {"peak_gb": real})["within_5_percent"] for real in (0.94, 0.96, 1.05, 1.06)]
    assert flags == ["NO", "yes", "yes", "NO"]
    peaks_gb = dict.fromkeys(forecast.PHASES, 1.0)
    by_phase = forecast._by_phase({"peaks_gb": peaks_gb}, {"peaks_gb": {**peaks_gb, "step": 0.5}})
    assert by_phase == {"forward": "1 / 1", "backward": "1 / 1", "step": "1 / 0.5"}
    found = forecast._time(told, {"step_s": 2.0, "changes": {}}, 200.0, 1.5)
    assert found["hfu"] == 0.25 and found["plan_holds"] == "yes"
    assert forecast._time(told, {"step_s": 5.0, "changes": {}}, 200.0, 1.5)["plan_holds"] == "NO"
    faster = {"step_s": 1.0, "changes": {"compile": "blocks"}}  # 50 % of the peak
    assert forecast._time(told, faster, 200.0, 1.5)["plan_holds"] == "yes"
    assert forecast._time(told, {**faster, "changes": {}}, 200.0, 1.5)["plan_holds"] == "NO"


@pytest.mark.golden("released_keys/Wan2.1-Fun-V1.1-14B-Control.json.gz", "released_keys/Wan2.1_VAE.json.gz")
def test_the_networks_are_of_released_sizes(goldens):
    whole = networks.transformer(replace(FULL.networks["14b_cut"], layers=40), FULL.encoders)
    made = {
        "Wan2.1-Fun-V1.1-14B-Control": whole,
        "Wan2.1_VAE": networks.vae(FULL.encoders),
        "umt5-xxl-enc": networks.text(FULL.encoders),
    }
    for name, net in made.items():
        count = sum(math.prod(shape) for shape in released(goldens, name).values())
        assert sum(weight.numel() for weight in net.parameters()) == count, name


def test_flops_of_a_block_are_three_times_those_by_hand():
    def flops(layers):
        return step.flops(Network(2, 64, layers, head_width=24), TINY.clip, TINY.encoders)

    N, D = 2 * 2 * 3, 48  # tokens, width
    others = 512 + 257  # tokens of caption and picture, whose keys and values are made, and looked at
    products = 6 * N * D**2 + 2 * others * D**2 + 2 * N * (N + others) * D + 2 * N * D * 64
    assert flops(3) - flops(2) == 3 * 2 * products


@pytest.mark.golden("wan_fun/golden/scheduler.safetensors", "wan_fun/golden/transformer/*.safetensors")
def test_parity_is_told_by_its_worst_row(goldens):
    from benchmarks.gpu.goldens import rows_of, worst_of

    found = rows_of(parity_wan, goldens / "wan_fun/golden/transformer/control_v1.1.safetensors", CPU)
    worst = worst_of([*found, Row("f", "far", 1e-4, 1e-9, 5e-5, "absolute")])
    assert worst.tensor == "far" and not worst.ok
    assert worst_of(found).ok
    assert worst_of([Row("f", "apart", 1e-9, 0.0, 0.0, "absolute"), *found]).tensor == "apart"  # is to be exact


def test_settings_of_tf32_are_put_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with goldens.exact_products():
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


class Forked:
    """In the place of a launch (subprocess.Popen), which reads the libraries anew."""

    def __init__(self, command, *, stdout, **_):
        assert command[:3] == [sys.executable, "-m", "reeltune"]
        self.fork = FORKS.Process(target=begin, args=(command[3:], stdout.name))
        self.fork.start()
        self.pid = self.fork.pid

    def poll(self):
        return self.fork.exitcode

    def wait(self, timeout=None):
        self.fork.join(timeout)
        if self.fork.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.fork.exitcode

    def kill(self):
        self.fork.kill()


def begin(words, log):
    torch.set_num_threads(1)
    measuring._run = measure_here
    report.write = lambda out: out / "report.html"
    os.setsid()  # so that a kill takes its reading processes with it
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raise SystemExit(cli.main(words))


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_others(tmp_path, monkeypatch):
    """With deterministic kernels; a CPU has the same without."""
    monkeypatch.setattr(exact.subprocess, "Popen", Forked)
    meta, _ = write_data_set(tmp_path / "data", clips=4, stills=0, held_out=1)
    runs = exact.Runs(write_checkpoint(tmp_path / "model"), meta, tmp_path, "bf16", True)
    found = runs.compared(timeout_s=600)
    assert found["killed_after_step"] < exact.STEPS
    assert found["repeat_equal"] == found["resume_equal"] == "yes"
    lines = (runs.place / "second" / "metrics.jsonl").read_text()
    (runs.place / "second" / "metrics.jsonl").write_text(lines.replace('"loss": 0', '"loss": 1', 1))
    assert runs._told("first", "second") == "NO, from step 1"


@pytest.mark.slow
def test_one_process_trains_as_without_a_wrapper(tmp_path):
    """DDP's launched as on a GPU; FSDP's forked from a process that has read the libraries."""
    found = processes.run([*processes.TORCHRUN, "-m", processes.MODULE, "ddp"], CPU, timeout_s=600)
    assert found["backend"] == "gloo"
    run = several.train([partial(one_process, "fsdp")], 1, tmp_path)
    assert processes.judged(run.told[0].read_text(), CPU)["backend"] == "gloo"


def one_process(wrapper):
    import_module(processes.MODULE).main(wrapper)
    return 0


@pytest.mark.parametrize(
    "wrong", [{"backend": "mpi"}, {"sum": 1.0}, {"losses": [1.0, 1.1]}, {"losses": [1.0, math.nan]}], ids=str
)
def test_a_process_that_trains_otherwise_is_told_of(wrong):
    told = {"backend": "gloo", "sum": 2**20, "losses": [1.0, 1.01], "plain": [1.0, 1.0], "step_s": 1.0}
    assert processes.judged(f"a warning\n{json.dumps(told)}", CPU)["losses_apart"] == pytest.approx(0.01)
    with pytest.raises(RuntimeError, match="did not train as without a wrapper"):
        processes.judged(json.dumps({**told, **wrong}), CPU)
