"""What docs/clusters.md has for several machines is run: two launches of one process each, which meet here.

One form is run to the end. The others are run until torchrun is called, with the same words as there.
"""

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


TORCHRUN = """#!/bin/sh
printf '%s\\0' "$@" > $CALLS/$$
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


@pytest.fixture
def stubs(place):
    """A folder of commands that come first. Its torchrun only writes down how it is called."""
    (place / "bin").mkdir()
    (place / "calls").mkdir()

    def put(**commands: str) -> str:
        for name, text in {"torchrun": TORCHRUN, **commands}.items():
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)
        return str(place / "bin")

    return put


def called(place: Path) -> list[dict]:
    """What torchrun was told of each machine, in their order, by its own names; the port is each test's own."""
    words = [path.read_text().split("\0")[:-1] for path in (place / "calls").iterdir()]
    found = [vars(torchrun_parser().parse_args(each)) for each in words]
    return sorted(({**each, "master_port": None} for each in found), key=lambda each: each["node_rank"])


PLAIN = {  # of one of the two launches that test_plain_ssh runs to the end
    "nnodes": "2",
    "nproc_per_node": "1",
    "master_addr": "127.0.0.1",
    "module": True,
    "training_script": "reeltune",
    "training_script_args": ["train", "runs/eight/recipe.yaml", "--output_dir", "runs/sixteen"],
}
LATEST = ["--resume_from_checkpoint", "latest"]  # of jobs that may be started again


def assert_called_as_plain(place: Path, more: list[str]):
    default = {**vars(torchrun_parser().parse_args(["script"])), **PLAIN, "master_port": None}
    default["training_script_args"] = PLAIN["training_script_args"] + more
    assert called(place) == [{**default, "node_rank": machine} for machine in (0, 1)]


def assert_one_run(folder: Path):
    rows = [json.loads(line) for line in (folder / "runs/sixteen/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [(row["step"], row["samples"]) for row in steps] == [(1, 4), (2, 4)]  # two processes of two
    assert (folder / "runs/sixteen/checkpoint-2/shares").is_dir()


@pytest.mark.slow
def test_plain_ssh(place):
    """With what the other forms say beside, which changes nothing at a first start."""
    command = " ".join([block("bash", "$MACHINE").strip(), *LATEST])
    machines = [variables(HEAD="127.0.0.1", MACHINE=number) for number in "01"]
    for code, told in ends([start(["bash", "-c", command], cwd=place, env=each) for each in machines]):
        assert code == 0, told
    assert_one_run(place)


def test_plain_ssh_is_what_the_others_are_compared_with(place, stubs):
    command = block("bash", "$MACHINE")
    given = {"first": stubs(), "CALLS": str(place / "calls"), "HEAD": "127.0.0.1"}
    machines = [variables(**given, MACHINE=number) for number in "01"]
    for code, told in ends([start(["bash", "-c", command], cwd=place, env=each) for each in machines]):
        assert code == 0, told
    assert_called_as_plain(place, [])


def test_slurm(place, stubs):
    """Under a srun that starts a task for each of two machines, as Slurm's does."""
    first = stubs(srun=SRUN, scontrol="#!/bin/sh\necho 127.0.0.1\necho other\n")
    (place / "train.sbatch").write_text(block("bash", "#SBATCH"))
    given = variables(first=first, CALLS=str(place / "calls"), SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]")
    code, told = end(start(["bash", "train.sbatch"], cwd=place, env=given))
    assert code == 0, told
    assert_called_as_plain(place, LATEST)


def test_kubernetes(place, stubs):
    service, job = yaml.safe_load_all(block("yaml", "kind: Job"))
    name = service["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"] and pod["subdomain"] == name
    (train,) = pod["containers"]
    exported = {entry["name"]: entry["value"] for entry in train["env"]}
    assert exported["HEAD"] == f"{job['metadata']['name']}-0.{name}"
    assert int(exported["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    exported |= {"HEAD": "127.0.0.1", "first": stubs(), "CALLS": str(place / "calls")}
    numbers = range(job["spec"]["completions"])
    pods = [variables(**exported, JOB_COMPLETION_INDEX=str(number)) for number in numbers]
    command = [*train["command"], *train["args"]]
    for code, told in ends([start(command, cwd=place, env=each) for each in pods]):
        assert code == 0, told
    assert_called_as_plain(place, LATEST)
