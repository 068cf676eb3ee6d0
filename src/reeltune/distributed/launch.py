"""How the processes of a run were started, and what their launcher asked for.  (no torch)"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import json_value

EngineName = Literal["ddp", "zero2", "zero3", "fsdp"]
START = (
    "start N processes on one machine with `torchrun --nproc_per_node N -m reeltune train ...`, or with "
    "`accelerate launch --multi_gpu --num_processes N scripts/... ...`; docs/clusters.md has several machines"
)


def place(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(process, processes) by RANK and WORLD_SIZE; one alone without them. Raises UserError for no such numbers."""
    rank, world = environ.get("RANK", "0"), environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        told = " and ".join(f"{name} is {environ.get(name, 'not set')}" for name in ("RANK", "WORLD_SIZE"))
        raise UserError(
            "launch", f"{told}, which is no place among processes; unset both if a launcher has left them, or {START}"
        )
    return int(rank), int(world)


def refuse_left_over(environ: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for a part of what launchers set: there is nobody to meet."""
    place(environ)
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in environ]
    local = environ.get("LOCAL_RANK")
    if local is not None and (missing or not local.isdecimal()):
        raise UserError(
            "launch",
            f"LOCAL_RANK is {local}, as launchers set it, but {' and '.join(missing) or 'it'} "
            f"{'is not set' if missing else 'is no number'}; unset LOCAL_RANK if it is left over, or {START}",
        )


@dataclass(frozen=True)
class Parallelism:
    """How several processes are to share the work."""

    engine: EngineName = "ddp"
    blocks: tuple[str, ...] = ()  # fsdp: class names to shard by; none: the family's own
    keep_gathered: bool = False  # fsdp: weights stay gathered between forward and backward pass
    offload: bool = False  # what is sharded lives in the CPU's memory
    deepspeed: Mapping[str, Any] | None = None  # zero: settings of DeepSpeed beside ours
    context: int = 1  # processes that share each clip's tokens
    notices: tuple[str, ...] = ()


def chosen(
    engine: EngineName | None, *, keep_gathered: bool, offload: bool, environ: MutableMapping[str, str] = os.environ
) -> Parallelism:
    """The recipe's choice, or its launcher's. What accelerate would act on is taken out of `environ`.

    Raises UserError for a launch that would train in one process or in several that know nothing of each other,
    and where recipe and launcher contradict each other.
    """
    refuse("launch", list(_lone(environ)))
    asked = _launcher(environ)
    if asked is None:
        if engine is not None and not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & environ.keys():
            raise UserError(
                "launch", f"engine is {engine}, but this process was started without a launcher and is alone; {START}"
            )
        return Parallelism(engine or "ddp", keep_gathered=keep_gathered, offload=offload)
    if engine not in (None, asked.engine):
        raise UserError(
            "launch", f"the recipe's engine is {engine} and accelerate launch was told {asked.engine}; leave one out"
        )
    return replace(asked, keep_gathered=asked.keep_gathered or keep_gathered, offload=asked.offload or offload)


def _lone(environ: Mapping[str, str]):
    """Launches after which processes would be alone, or launchers."""
    tasks = environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in environ else "1"
    if "LOCAL_RANK" in environ:
        met = environ.get("GROUP_WORLD_SIZE")  # torchrun's number of launchers that found each other
        if met == "1" and _beside(environ, tasks):
            yield (
                f"srun started {tasks} launchers that know nothing of each other: each would train a run of its own; "
                "give each torchrun --nnodes and --rdzv_endpoint, as in docs/clusters.md"
            )
        return
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        yield f"accelerate launch was told of several processes but starts one unless it is told how; {START}"
    counts = {name: environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")}
    for name, count in {"SLURM_NTASKS": tasks, **counts}.items():
        if count.isdigit() and int(count) > 1:
            yield f"{name} is {count}, but this process was started without a rank, and would train alone; {START}"
            return


def _beside(environ: Mapping[str, str], tasks: str) -> bool:
    """Whether srun has started others beside this one. The script of sbatch, in which a launcher may stand alone, is
    task 0 of as many as the job asked for, in a step without tasks of its own.
    """
    in_step = environ.get("SLURM_STEP_NUM_TASKS")
    if in_step is not None:
        return in_step != "1"
    return tasks != "1" and environ.get("SLURM_PROCID") != "0"


def _launcher(environ: MutableMapping[str, str]) -> Parallelism | None:
    if environ.pop("ACCELERATE_USE_FSDP", "false") == "true":
        return _fsdp(environ)
    if environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return _deepspeed(environ)
    return None


SHARDING = {  # accelerate's names and numbers -> (engine, keep_gathered)
    **dict.fromkeys(("FULL_SHARD", "1"), ("fsdp", False)),
    **dict.fromkeys(("SHARD_GRAD_OP", "2"), ("fsdp", True)),
    **dict.fromkeys(("NO_SHARD", "3"), ("ddp", False)),
}


def _fsdp(environ: Mapping[str, str]) -> Parallelism:
    """The flags of accelerate launch --use_fsdp, of version 1 or 2."""
    notices = []
    if environ.get("FSDP_VERSION", "1") == "1":
        notices.append("FSDP runs as version 2: version 1 loses the optimizer's state on resume")
        strategy = environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
        if strategy not in SHARDING:
            known = ", ".join(name for name in SHARDING if not name.isdigit())
            raise UserError("launch", f"fsdp_sharding_strategy is {strategy}; supported are {known}")
        engine, keep_gathered = SHARDING[strategy]
    else:
        engine, keep_gathered = "fsdp", environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "false"
    if environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT") != "SHARDED_STATE_DICT":
        notices.append("checkpoints are sharded; reeltune export makes one file of them")
    if environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        notices.append("fsdp_activation_checkpointing changes nothing here: gradient_checkpointing asks for it")
    names = environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Parallelism(
        engine,
        blocks=tuple(name.strip() for name in names if name.strip()),
        keep_gathered=keep_gathered,
        offload=environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true",
        notices=tuple(notices),
    )


def _deepspeed(environ: Mapping[str, str]) -> Parallelism:
    """The flags of accelerate launch --use_deepspeed. Raises UserError for a file or a stage that cannot be used."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    settings = {} if file is None else _read(Path(file))
    zero = settings.setdefault("zero_optimization", {})
    asked = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "auto")
    stage = str(zero.pop("stage", "auto"))
    if stage == "auto":
        stage = "2" if asked == "auto" else asked
    elif asked not in ("auto", stage):
        raise UserError("launch", f"zero_stage is {asked} and {file} has stage {stage}; leave one out")
    if stage not in ("2", "3"):
        raise UserError("launch", f"ZeRO stage {stage} is not supported; use 2 or 3, or no DeepSpeed at all")
    offload = zero.pop("offload_optimizer", {}).get("device", "auto")
    if offload == "auto":
        offload = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    if offload not in ("none", "cpu"):
        raise UserError("launch", f"the optimizer's offload device is {offload}; supported are cpu and none")
    return Parallelism(engine="zero2" if stage == "2" else "zero3", offload=offload == "cpu", deepspeed=settings)


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json_value(file.read_bytes())
    except (OSError, ValueError) as broken:
        raise UserError("launch", f"deepspeed_config_file {file} cannot be read ({broken})") from broken
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError("launch", f"deepspeed_config_file {file} is no table of settings")
    return settings
