"""The guides' commands for several processes, as printed, on tiny checkpoints: two processes over gloo.

What differs from the page: our paths and small sizes; how many processes, which the launcher otherwise reads off the
GPUs; and `--deepspeed_multinode_launcherr`, which accelerate refuses as it is printed.
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands import accelerate_cli
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from reeltune import compat
from reeltune.checkpoint.folder import is_shared
from reeltune.distributed.launch import Parallelism, chosen
from reeltune.families import weights
from reeltune.reporting import report
from tests.distributed.processes import FORKS, environment, free_port, train
from tests.distributed.processes import Run as Forked
from tests.runs.test_guides import SMALL
from tests.unit.test_compat import ROOT, command_of

pytestmark = pytest.mark.golden
ZERO = importlib.util.find_spec("deepspeed") is not None
HUNYUAN = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
HUNYUAN_I2V = ("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock")
WAN = "wan_fun/checkpoints/control"
EASYANIMATE = "multi/EasyAnimateV5"


@dataclass(frozen=True)
class Run:
    guide: str
    place: int  # among the guide's parallel commands
    checkpoint: str  # under the goldens
    meta: str
    engine: str
    blocks: tuple[str, ...] = ()
    like: str = ""  # for a command that the guide cuts short with dots: the launch is its own, the rest that one's


RUNS = {
    "V1.1 ZeRO-2": Run("000_*", 0, f"{WAN}_v1.1", "metadata_control.json", "zero2"),
    "V1.1 ZeRO-3": Run("000_*", 1, f"{WAN}_v1.1", "metadata_control.json", "zero3"),
    "V1.0 ZeRO-2": Run("000_*", 2, f"{WAN}_v1.0", "metadata_control.json", "zero2"),
    "V1.0 ZeRO-3": Run("000_*", 3, f"{WAN}_v1.0", "metadata_control.json", "zero3"),
    "chinese ZeRO-2": Run("001_*", 0, f"{WAN}_v1.0", "metadata_control.json", "zero2", like="V1.0 ZeRO-2"),
    "chinese ZeRO-3, 2.1": Run("001_*", 1, f"{WAN}_v1.0", "metadata_control.json", "zero3", like="V1.0 ZeRO-3"),
    "EasyAnimate V5.1": Run("002_*", 0, f"{EASYANIMATE}.1-Control", "metadata_control.json", "zero2"),
    "EasyAnimate V5": Run("002_*", 1, f"{EASYANIMATE}-Control", "metadata_control.json", "zero2"),
    "HunyuanVideo ZeRO-2": Run("003_*", 0, "multi/HunyuanVideo", "metadata.json", "zero2"),
    "HunyuanVideo FSDP": Run("003_*", 1, "multi/HunyuanVideo", "metadata.json", "fsdp", HUNYUAN),
    "HunyuanVideo-I2V FSDP": Run("003_*", 2, "multi/HunyuanVideo-I2V", "metadata.json", "fsdp", HUNYUAN_I2V),
    "CogVideoX-Fun": Run("004_*", 0, "multi/CogVideoX-Fun-2b-InP", "metadata.json", "zero2"),
}
LAUNCHED = ("V1.1 ZeRO-3", "HunyuanVideo FSDP")  # through each of accelerate's launchers
ALIKE = "V1.1 ZeRO-2"  # to what is run on two machines, in its checkpoint, script and flags
GIVEN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")  # by every launcher, of its own
TELLING = """
import json, os, pathlib, sys
told = {"environ": dict(os.environ), "argv": sys.argv[1:], "cwd": os.getcwd()}
pathlib.Path(__file__).with_name(os.environ["RANK"]).write_text(json.dumps(told))
"""


def printed(seeds: Path, name: str) -> tuple[list[str], str, list[str]]:
    """The words before the script, the script, those after it."""
    run = RUNS[name]
    (guide,) = seeds.glob(run.guide)
    text = guide.read_text(encoding="utf-8")
    found = [line for line in re.findall(r"^accelerate launch(?:.*\\\n)*.*", text, re.MULTILINE)]
    parallel = [line for line in found if "--use_deepspeed" in line or "--use_fsdp" in line]
    names = ("MODEL_NAME", "DATASET_NAME", "DATASET_META_NAME")
    ours = command_of(parallel[run.place].partition("...")[0], dict.fromkeys(names, "x"))
    argv = [*printed(seeds, run.like)[2], *ours.argv] if run.like else ours.argv
    launch = [word.replace("launcherr", "launcher") for word in ours.launch]
    return launch, ours.script, argv


def test_no_parallel_command_of_the_guides_is_left_out(seeds):
    counted = {}
    for guide in sorted(seeds.glob("00*.txt")):
        text = guide.read_text(encoding="utf-8")
        launches = [line for line in text.splitlines() if line.startswith("accelerate launch")]
        counted[guide.name[:4] + "*"] = sum("--use_deepspeed" in line or "--use_fsdp" in line for line in launches)
    ours = {guide: sum(run.guide == guide for run in RUNS.values()) for guide in counted}
    assert ours == counted and sum(counted.values()) == 12


def on_machine(rank: int, port: int, seeds: Path) -> tuple[list[str], dict[str, str]]:
    """The words before the script of a launch on one of two machines, and what the page exports there."""
    (page,) = seeds.glob(RUNS[ALIKE].guide)
    (line,) = re.findall(r"^accelerate launch.*xxx\.py", page.read_text(encoding="utf-8"), re.MULTILINE)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NUM_PROCESS": "2"}
    exported = place | {"RANK": str(rank)}
    return [*command_of(line, exported).launch, "--multi_gpu"], exported


def environ_of(launch: list[str], monkeypatch) -> dict[str, str]:
    """What accelerate launch sets for its processes, but for what every launcher sets of its own."""
    arguments = launch_command_parser().parse_args([*launch[2:], "--num_processes=2", "script.py"])
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
            patch.delenv(name)
        arguments, *_ = _validate_launch_command(arguments)
        arguments.deepspeed_fields_from_accelerate_config = ""
        made = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    left_out = {"PYTHONPATH", *GIVEN}
    return {name: value for name, value in made.items() if os.environ.get(name) != value and name not in left_out}


@pytest.mark.parametrize("name", RUNS)
def test_what_the_launcher_is_told(name, seeds, monkeypatch):
    run = RUNS[name]
    launch, *_ = printed(seeds, name)
    environ = environ_of(launch, monkeypatch) | {"LOCAL_RANK": "0"}
    monkeypatch.chdir(ROOT)
    parallelism = chosen(None, keep_gathered=False, offload=False, environ=environ)
    assert (parallelism.engine, parallelism.blocks, parallelism.keep_gathered, parallelism.offload) == (
        run.engine,
        run.blocks,
        False,
        False,
    )
    said = ("FSDP runs as version 2: version 1 loses the optimizer's state on resume",)
    assert parallelism.notices == (said if run.engine == "fsdp" else Parallelism().notices)
    if run.engine != "fsdp":
        assert parallelism.deepspeed is not None and parallelism.deepspeed["zero_optimization"]["overlap_comm"] is True


@pytest.fixture(scope="module")
def argv_of(goldens, media, seeds, tmp_path_factory):
    """name -> flags with our paths and small sizes; the run's folder."""
    folder = tmp_path_factory.mktemp("runs")

    def get(name: str, out: str = "") -> tuple[list[str], Path]:
        run = RUNS[name]
        checkpoint = goldens / run.checkpoint
        if not checkpoint.is_dir():
            pytest.skip(f"no {checkpoint.name} at {checkpoint.parent}")
        place = folder / re.sub(r"\W+", "_", name + out)
        paths = [
            f"--pretrained_model_name_or_path={checkpoint}",
            f"--train_data_dir={media}",
            f"--train_data_meta={media / run.meta}",
            f"--output_dir={place}",
        ]
        return [*printed(seeds, name)[2], *paths, *shlex.split(SMALL)], place

    return get


@pytest.fixture(scope="module")
def trained(argv_of, seeds, tmp_path_factory):
    """Every command trained in the same two processes, as starting them is what takes long. The first measures the
    clips, for which it starts processes; the others find them measured, as does a second run with these flags."""
    commands, measured = [], None
    printed_ones = [(*printed(seeds, name)[:2], *argv_of(name)) for name in RUNS if ZERO or RUNS[name].engine == "fsdp"]
    machines = on_machine(0, free_port(), seeds)[0], printed(seeds, ALIKE)[1], *argv_of(ALIKE, " on two machines")
    for launch, script, argv, out in [*printed_ones, machines]:
        environ = environ_of(launch, pytest.MonkeyPatch())
        commands.append(partial(command, environ, script, argv, out, measured))
        measured = out
    return train(commands, 2, tmp_path_factory.mktemp("commands")).told[0].read_text()


def command(environ: dict[str, str], script: str, argv: list[str], out: Path, measured: Path | None) -> int:
    """In a process that the launcher would have told so. measured: a run's folder with an index of the same clips; who
    has one draws no curves in its report, which take longest."""
    before = dict(os.environ)
    if measured is not None and before["RANK"] == "0":
        shutil.copytree(measured / "index", out / "index")
        report.curves = lambda metrics: []
    os.environ.update(environ)
    os.chdir(ROOT)
    code = compat.train(script, argv)
    os.environ.clear()
    os.environ.update(before)
    return code


def assert_trained(name: str, out: Path, goldens: Path, world: int = 2):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    batch = 4 if "CogVideoX" in name else 1
    assert {row["samples"] for row in steps} == {world * batch}
    assert json.loads((out / "checkpoint-2/progress.json").read_text())["group"] == world * batch
    ledger = json.loads((out / "ledger.json").read_text())
    assert sum(ledger[name] for name in ("used", "not_reached", "held_out", "left_out")) == ledger["entries"]
    assert (out / "report.html").stat().st_size > 10_000
    assert is_shared(out / "checkpoint-2")
    argv = [str(out / "checkpoint-2"), f"{out}/checkpoint-2-outputs", "--max_shard_size", "80GB"]
    assert compat.zero_to_bf16([*argv, "--safe_serialization"]) == 0
    made = weights.read(out / "checkpoint-2-outputs")
    checkpoint = goldens / RUNS[name].checkpoint
    inside = checkpoint / "transformer"
    released = weights.read(inside if inside.is_dir() else checkpoint)
    assert {name: w.shape for name, w in made.items()} == {name: w.shape for name, w in released.items()}
    assert {w.dtype for w in made.values()} == {torch.bfloat16}
    assert any(not torch.equal(made[name], released[name].bfloat16()) for name in released)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_command(name, trained, argv_of, goldens):
    if RUNS[name].engine != "fsdp" and not ZERO:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
    assert_trained(name, argv_of(name)[1], goldens)


@pytest.mark.slow
def test_fsdp_is_said_once_to_run_as_version_2(trained):
    runs = sum(RUNS[name].engine == "fsdp" for name in RUNS)
    assert trained.count("FSDP runs as version 2") == runs


def accelerate(words: list[str], environ: dict[str, str], told: Path) -> None:
    """Its command, in a fork that has read its libraries. What it launches are new processes."""
    os.setsid()
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.argv = words
    accelerate_cli.main()


def launch_to_the_end(commands: list[tuple[list[str], dict[str, str]]], folder: Path) -> None:
    """All at once. commands: words and environment of each. AssertionError with what they print if one fails."""
    told = [folder / f"launch-{i}.txt" for i in range(len(commands))]
    forks = [FORKS.Process(target=accelerate, args=(*one, path)) for one, path in zip(commands, told, strict=True)]
    for fork in forks:
        fork.start()
    run = Forked(forks, told)
    try:
        assert run.end() == [0] * len(commands), run.print()
    finally:
        for fork in forks:
            with suppress(ProcessLookupError):  # of what it launched nothing is left
                os.killpg(fork.pid, signal.SIGKILL)


def of_two_processes(launch: list[str]) -> list[str]:
    """The launch as printed, for two processes here."""
    return [*launch, "--num_processes=2", f"--main_process_port={free_port()}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_what_launched_processes_are_told(name, argv_of, seeds, tmp_path, monkeypatch):
    """In what `test_command` trains: the launcher's own variables, the script's flags and the folder."""
    if RUNS[name].engine != "fsdp" and not ZERO:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
    launch, *_ = printed(seeds, name)
    argv, _ = argv_of(name)
    script = tmp_path / "script.py"
    script.write_text(TELLING)
    launch_to_the_end([([*of_two_processes(launch), str(script), *argv], environment())], tmp_path)
    expected = environ_of(launch, monkeypatch)
    assert expected
    for rank in ("0", "1"):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert_told(json.loads((tmp_path / rank).read_text()), argv, expected | places)


def assert_told(told: dict, argv: list[str], environ: dict[str, str]):
    assert (told["argv"], told["cwd"]) == (argv, str(ROOT))
    assert {variable: told["environ"].get(variable) for variable in environ} == environ


@pytest.mark.slow
def test_through_accelerate_launch(argv_of, seeds, goldens, tmp_path):
    """With nothing in place of it; of FSDP test_clusters.py has such a run, of accelerate's other launcher the next."""
    if not ZERO:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
    name, _ = LAUNCHED
    launch, script, _ = printed(seeds, name)
    argv, out = argv_of(name, " launched")
    launch_to_the_end([([*of_two_processes(launch), f"scripts/{script}", *argv], environment())], tmp_path)
    assert_trained(name, out, goldens)


@pytest.mark.slow
def test_two_machines(trained, argv_of, seeds, goldens, tmp_path, monkeypatch):
    """Two launches, as on two machines, meet over the loopback, and their processes are told what `trained` was beside
    their places. test_clusters.py has two launches that train."""
    argv, out = argv_of(ALIKE, " on two machines")
    script, port = tmp_path / "script.py", free_port()
    script.write_text(TELLING)
    machines = [on_machine(rank, port, seeds) for rank in (0, 1)]
    launches = [([*launch, str(script), *argv], environment(**exported)) for launch, exported in machines]
    launch_to_the_end(launches, tmp_path)
    for rank, (launch, exported) in enumerate(machines):
        places = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        places |= {name: exported[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        told = json.loads((tmp_path / str(rank)).read_text())
        assert_told(told, argv, environ_of(launch, monkeypatch) | places)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(row["step"], row["samples"]) for row in steps] == [(1, 2), (2, 2)]
    saved = weights.read(out / "checkpoint-2/transformer")
    start_from = goldens / RUNS[ALIKE].checkpoint
    inside = start_from / "transformer"
    assert saved.keys() == weights.peek(inside if inside.is_dir() else start_from).keys()
