"""Launches that would train in one process, or in several that know nothing of each other, are refused."""

import json
import sys

import pytest

from reeltune.config.parse import build, dump
from reeltune.core.errors import UserError
from reeltune.distributed.launch import Parallelism, chosen, place, refuse_left_over
from reeltune.estimate.check import check
from reeltune.estimate.machines import Machines
from reeltune.estimate.main import forecast
from reeltune.training.parallelism import parallelism_of
from tests.distributed.processes import end, start
from tests.families.every_family import SHOWN
from tests.runs.small_run import recipe

SIMPLE = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no"}  # accelerate launch of one process
SEVERAL = SIMPLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # the same, told of more: it starts one
RANK = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
BATCH = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # a script of sbatch, which no srun started
ONE_TASK = SRUN | {"SLURM_NTASKS": "1"}
RIGHT = r"torchrun --nproc_per_node N -m reeltune train"


def parallelism(environ, engine=None):
    return chosen(engine, keep_gathered=False, offload=False, environ=dict(environ))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (SEVERAL, r"told of several processes but starts one"),
        (SRUN, r"SLURM_NTASKS is 2, but this process was started without a rank"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"OMPI_COMM_WORLD_SIZE is 4"),
        ({"PMI_SIZE": "4"}, r"PMI_SIZE is 4"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, r"WORLD_SIZE is 2"),
    ],
)
def test_a_process_that_would_train_alone(environ, said):
    with pytest.raises(UserError, match=said) as error:
        parallelism(environ)
    assert error.match(RIGHT)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_an_engine_without_a_launcher(engine):
    with pytest.raises(UserError, match=rf"engine is {engine}, but this process .* alone; .*{RIGHT}"):
        parallelism({}, engine)
    for environ in (SIMPLE, RANK | {"WORLD_SIZE": "1"}):  # one process, but asked for
        assert parallelism(environ, engine).engine == engine


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"LOCAL_RANK": "0"}, r"LOCAL_RANK is 0, .* but RANK and WORLD_SIZE and MASTER_ADDR is not set; unset"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, r"LOCAL_RANK is 0, .* but MASTER_ADDR is not set; unset"),
        ({**RANK, "MASTER_ADDR": "a", "LOCAL_RANK": "x"}, r"LOCAL_RANK is x, .* but it is no number"),
        ({"RANK": "1"}, r"RANK is 1 and WORLD_SIZE is not set, which is no place"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, r"RANK is a and WORLD_SIZE is 2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "-1"}, r"RANK is not set and WORLD_SIZE is -1"),
    ],
)
def test_what_a_launcher_left_behind(environ, said):
    with pytest.raises(UserError, match=said) as error:
        refuse_left_over(environ)
    assert len(error.value.problems) == 1 and error.match(RIGHT)


def test_a_place_among_processes():
    told = ({}, RANK, {"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "3"})
    assert [place(environ) for environ in told] == [(0, 1), (0, 8), (0, 1), (2, 3)]
    refuse_left_over(RANK | {"MASTER_ADDR": "127.0.0.1"})


def test_launchers_that_do_not_meet():
    for environ in (SRUN, BATCH | {"SLURM_STEP_NUM_TASKS": "2"}):  # the second and the first of two
        with pytest.raises(UserError, match=r"srun started 2 launchers .* --nnodes and --rdzv_endpoint"):
            parallelism(RANK | environ)
    assert parallelism(RANK | SRUN | {"GROUP_WORLD_SIZE": "2"}) == Parallelism()


@pytest.mark.parametrize("environ", [{}, SIMPLE, RANK, RANK | BATCH, {"SLURM_NTASKS": "4"}, ONE_TASK])
def test_launches_that_are_as_meant(environ):
    """The last but one is a shell of salloc, in which nothing was started side by side."""
    assert parallelism(environ) == Parallelism()


def fsdp(**more):
    return RANK | {"ACCELERATE_USE_FSDP": "true"} | more


def zero(**more):
    names = {name: f"ACCELERATE_DEEPSPEED_{name.upper()}" for name in more}
    return RANK | {"ACCELERATE_USE_DEEPSPEED": "true"} | {names[name]: value for name, value in more.items()}


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (fsdp(FSDP_SHARDING_STRATEGY="FULL_SHARD"), ("fsdp", False, False)),
        (fsdp(FSDP_SHARDING_STRATEGY="2", FSDP_OFFLOAD_PARAMS="true"), ("fsdp", True, True)),
        (fsdp(FSDP_SHARDING_STRATEGY="NO_SHARD"), ("ddp", False, False)),
        (fsdp(FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="false"), ("fsdp", True, False)),
        (zero(), ("zero2", False, False)),
        (zero(zero_stage="3", offload_optimizer_device="cpu"), ("zero3", False, True)),
    ],
)
def test_what_accelerate_is_told_picks_the_engine(environ, told):
    found = parallelism(environ)
    assert (found.engine, found.keep_gathered, found.offload) == told


def test_accelerate_does_not_act_on_it_beside_us():
    for environ in (fsdp(), zero()):
        chosen(None, keep_gathered=False, offload=False, environ=environ)
        assert environ == RANK


def test_blocks_to_wrap_are_those_given():
    given = "HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock"
    blocks = parallelism(fsdp(FSDP_TRANSFORMER_CLS_TO_WRAP=given)).blocks
    assert blocks == ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")


@pytest.mark.parametrize(
    ("environ", "engine", "said"),
    [
        (fsdp(FSDP_SHARDING_STRATEGY="HYBRID_SHARD"), None, "HYBRID_SHARD; supported are FULL_SHARD, SHARD_GRAD_OP"),
        (zero(zero_stage="1"), None, "ZeRO stage 1 is not supported; use 2 or 3"),
        (zero(offload_optimizer_device="nvme"), None, "device is nvme; supported are cpu and none"),
        (zero(config_file="/nowhere/zero.json"), None, "/nowhere/zero.json cannot be read"),
        (zero(), "fsdp", "engine is fsdp and accelerate launch was told zero2; leave one out"),
    ],
)
def test_what_cannot_be_done_is_refused(environ, engine, said):
    with pytest.raises(UserError, match=said):
        parallelism(environ, engine)


@pytest.mark.parametrize("names", [["offload"], ["keep_gathered"], ["offload", "keep_gathered"]])
def test_what_no_engine_is_there_for_is_refused_by_each_command_alike(names):
    recipe = build(dict.fromkeys(names, True))
    acts = {
        "train": lambda: parallelism_of(recipe),
        "check": lambda: list(check(recipe)),
        "plan": lambda: forecast(recipe, Machines()),
        "plan for two": lambda: forecast(recipe, Machines(gpus=2)),
    }
    told = {}
    for command, act in acts.items():
        with pytest.raises(UserError) as error:
            act()
        told[command] = sorted(error.value.problems)
    assert [line.partition(";")[0] for line in told["train"]] == [
        f"{name} is true and engine is ddp" for name in sorted(names)
    ]
    assert all(lines == told["train"] for lines in told.values())


def test_two_stages_are_refused(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(UserError, match=r"zero_stage is 3 and .*zero.json has stage 2; leave one out"):
        parallelism(zero(zero_stage="3", config_file=str(file)))
    assert parallelism(zero(zero_stage="2", config_file=str(file))).engine == "zero2"


@pytest.mark.slow
def test_accelerate_launch_without_multi_gpu_is_refused_with_the_right_command(tmp_path):
    (tmp_path / "model").mkdir()
    asked = recipe(SHOWN["toy"].write(tmp_path / "model"), tmp_path, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(dump(asked))
    command = "accelerate.commands.accelerate_cli launch --num_processes 2 -m reeltune train"
    code, told = end(start([sys.executable, "-m", *command.split(), str(tmp_path / "recipe.yaml")]))
    assert code != 0
    assert "accelerate launch was told of several processes but starts one" in told
    assert "torchrun --nproc_per_node N -m reeltune train" in told
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_says_beside_its_launcher_holds():
    environ = RANK | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    def asked(**recipe):
        found = chosen("fsdp", environ=dict(environ), **{"keep_gathered": False, "offload": False, **recipe})
        return found.keep_gathered, found.offload

    assert asked() == (False, False)
    assert asked(offload=True) == (False, True)
    assert asked(keep_gathered=True) == (True, False)
    environ |= {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert asked() == (True, True)
