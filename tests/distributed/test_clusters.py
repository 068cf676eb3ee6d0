"""What docs/clusters.md has for several machines is run: two launches of one process each, which meet here."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from reeltune.config.parse import dump, settings
from tests.distributed.processes import end, ends, environment, free_port, start
from tests.runs.small_run import recipe
from tests.unit.test_compat import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
SRUN = """#!/bin/sh
for machine in 0 1; do SLURM_NODEID=$machine "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || exit 1; done
"""


COMMANDS = [
    (page.name, found)
    for page in (ROOT / "README.md", ROOT / "docs/clusters.md", ROOT / "docs/context_parallel.md")
    for text in re.findall(r"```(?:sh|bash|yaml)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for found in re.findall(
        r"(?:torchrun|accelerate launch) [^`']+?(?=\n *[a-z]+:|'|\n[^ ]|\Z)", text.replace("\\\n", " ")
    )
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_what_launchers_and_reeltune_are_told_is_known_to_them(page, command):
    words = shlex.split(re.sub(r"\$\w+", "1", command))
    parsers = {"torchrun": torchrun_parser, "accelerate": launch_command_parser}
    told, unknown = parsers[words[0]]().parse_known_args(words[1 + (words[0] == "accelerate") :])
    assert told.module and told.training_script == "reeltune" and not unknown
    action, recipe, *flags = told.training_script_args
    assert action == "train" and recipe.endswith(".yaml")
    assert {flag.removeprefix("--") for flag in flags if flag.startswith("--")} <= set(settings())


def test_there_are_commands_for_all():
    assert [name for name, _ in COMMANDS].count("clusters.md") == 5
    assert {"README.md", "clusters.md", "context_parallel.md"} == {name for name, _ in COMMANDS}


def block(kind: str, word: str) -> str:
    """The block of that language that has the word; with one process a machine and a port of this test's own."""
    (found,) = [text for text in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) if word in text]
    assert "--nproc_per_node 8" in found and "--master_port 29500" in found
    return found.replace("--nproc_per_node 8", "--nproc_per_node 1").replace("29500", str(free_port()))


@pytest.fixture
def place(data, tmp_path):
    """The folder that all machines share."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/toy.json").write_text("{}")
    made = recipe(tmp_path / "model", data, tmp_path / "x", max_train_steps=2, engine="fsdp")
    (tmp_path / "runs/eight").mkdir(parents=True)
    (tmp_path / "runs/eight/recipe.yaml").write_text(dump(made))
    return tmp_path


def variables(**more: str) -> dict[str, str]:
    path = os.pathsep.join([*more.pop("first", "").split(), str(Path(sys.executable).parent), os.environ["PATH"]])
    return environment(PATH=path, **more)


def assert_one_run(folder: Path):
    rows = [json.loads(line) for line in (folder / "runs/sixteen/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(row["step"], row["samples"]) for row in steps] == [(1, 4), (2, 4)]  # two processes of two
    assert (folder / "runs/sixteen/checkpoint-2/shares").is_dir()


@pytest.mark.slow
def test_plain_ssh(place):
    command = block("bash", "$MACHINE")
    machines = [variables(HEAD="127.0.0.1", MACHINE=number) for number in "01"]
    for code, told in ends([start(["bash", "-c", command], cwd=place, env=each) for each in machines]):
        assert code == 0, told
    assert_one_run(place)


@pytest.mark.slow
def test_slurm(place):
    """Under a srun that starts a task for each of two machines, as Slurm's does."""
    stubs = place / "bin"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\necho other\n"}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    (place / "train.sbatch").write_text(block("bash", "#SBATCH"))
    given = variables(first=str(stubs), SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]")
    code, told = end(start(["bash", "train.sbatch"], cwd=place, env=given))
    assert code == 0, told
    assert_one_run(place)


@pytest.mark.slow
def test_kubernetes(place):
    service, job = yaml.safe_load_all(block("yaml", "kind: Job"))
    name = service["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"] and pod["subdomain"] == name
    (train,) = pod["containers"]
    exported = {entry["name"]: entry["value"] for entry in train["env"]}
    assert exported["HEAD"] == f"{job['metadata']['name']}-0.{name}"
    assert int(exported["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    exported["HEAD"] = "127.0.0.1"
    numbers = range(job["spec"]["completions"])
    pods = [variables(**exported, JOB_COMPLETION_INDEX=str(number)) for number in numbers]
    command = [*train["command"], *train["args"]]
    for code, told in ends([start(command, cwd=place, env=each) for each in pods]):
        assert code == 0, told
    assert_one_run(place)
