"""Every private name of a library that src uses: why, and what would take its place. Any other one fails here."""

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from scripts.import_graph import PACKAGE, module_of, tree_of

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "deepspeed")
FILES = sorted(PACKAGE.rglob("*.py"))
PYTHON = {"_exit", "_replace", "_asdict", "_fields"}  # of os and of named tuples, documented


class Use(NamedTuple):
    at: str  # module:attribute that has it, or module where it stands in the source, for what is set at run time
    why: str
    instead: str


FAKE = "plan runs a training step on tensors that have sizes and no values", "a public way to fake tensors"
FAKE_BELOW = (
    "whether fake tensors' own mode is below another one",
    "nothing: plan would take longer",
)
TREE = "leaves of an optimizer's state, whatever its nesting", "torch.utils.pytree, once every supported torch has it"
SCHEMA = "which operators write to what they are given, whatever library they are of", "a public schema of an operator"
OPERATOR = "the operator's own name, as a dispatch mode is handed it", "nothing: torch writes these to no one's account"
COMPILER = "an option of torch.compile"
FOREACH = "many small tensors are one operation, as in torch's own optimizers", "a public name for the same"
KERNEL = (
    "FlashAttention 4 is an operator that compiles and is kept like torch's own, as torch takes it by these names",
    "torch.nn.attention.activate_flash_attention_impl, once it follows the package's releases, and for a thread alone",
)
PRIVATE = {
    "torch._subclasses.fake_tensor.FakeTensor": Use("torch._subclasses.fake_tensor:FakeTensor", *FAKE),
    "torch._subclasses.fake_tensor.FakeTensorMode": Use("torch._subclasses.fake_tensor:FakeTensorMode", *FAKE),
    "torch._C._get_dispatch_mode": Use("torch._C:_get_dispatch_mode", *FAKE_BELOW),
    "torch._C._TorchDispatchModeKey": Use("torch._C:_TorchDispatchModeKey", *FAKE_BELOW),
    "torch._inductor.compile_fx.compile_fx": Use(
        "torch._inductor.compile_fx:compile_fx",
        "compilations are counted, and made by settings under which a resume ends in the same bits",
        "torch.compile's own count, beside its options",
    ),
    "torch._dynamo.config": Use("torch._dynamo.config:recompile_limit", "how often a block may be compiled", COMPILER),
    "torch._functorch.config": Use(
        "torch._functorch.config:donated_buffer", "a backward pass may run twice, and is then not told so", COMPILER
    ),
    "torch._dynamo.exc.TorchDynamoException": Use(
        "torch._dynamo.exc:TorchDynamoException", "what cannot be compiled is told in words", "a public class of errors"
    ),
    "torch._dynamo.exc.FailOnRecompileLimitHit": Use(
        "torch._dynamo.exc:FailOnRecompileLimitHit",
        "more compilations than sizes are told in words",
        "a public class of errors",
    ),
    "_foreach_copy_": Use("torch:_foreach_copy_", *FOREACH),
    "_foreach_mul_": Use("torch:_foreach_mul_", *FOREACH),
    "_foreach_norm": Use("torch:_foreach_norm", *FOREACH),
    "torch.utils._pytree.tree_leaves": Use("torch.utils._pytree:tree_leaves", *TREE),
    "torch.utils._pytree.tree_map": Use("torch.utils._pytree:tree_map", *TREE),
    "torch.utils._python_dispatch.TorchDispatchMode": Use(
        "torch.utils._python_dispatch:TorchDispatchMode",
        "plan sees every tensor that an operator makes; named in torch's own notes on extending it",
        "the same class, once it has a public address",
    ),
    "torch.testing._internal.distributed.fake_pg.FakeStore": Use(
        "torch.testing._internal.distributed.fake_pg:FakeStore",
        "plan takes a process's part of a clip without other processes",
        "a public fake process group",
    ),
    "_overloadpacket": Use("torch._ops", *SCHEMA),
    "_schema": Use("torch._ops", *SCHEMA),
    "_local_scalar_dense": Use("torch.ops.aten:_local_scalar_dense", *OPERATOR),
    "_to_copy": Use("torch.ops.aten:_to_copy", *OPERATOR),
    "_scaled_dot_product_flash_attention_for_cpu": Use(
        "torch.ops.aten:_scaled_dot_product_flash_attention_for_cpu", *OPERATOR
    ),
    "_scaled_dot_product_flash_attention": Use("torch.ops.aten:_scaled_dot_product_flash_attention", *OPERATOR),
    "_scaled_dot_product_flash_attention_backward": Use(
        "torch.ops.aten:_scaled_dot_product_flash_attention_backward", *OPERATOR
    ),
    "_scaled_dot_product_cudnn_attention": Use("torch.ops.aten:_scaled_dot_product_cudnn_attention", *OPERATOR),
    "_scaled_dot_product_efficient_attention": Use("torch.ops.aten:_scaled_dot_product_efficient_attention", *OPERATOR),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Use(
        "torch.ops.aten:_scaled_dot_product_flash_attention_for_cpu_backward", *OPERATOR
    ),
    "_get_default_store": Use(
        "torch.distributed.distributed_c10d:_get_default_store",
        "the watchdog speaks over the store at which the processes met, whatever launched them",
        "a store of our own, at an address that every launcher would have to give",
    ),
    "_world": Use(
        "torch.distributed.distributed_c10d:_world",
        "all process groups, also those that a library made, to count their exchanges",
        "a public list of process groups",
    ),
    "_get_sequence_number_for_group": Use(
        "torch.distributed:ProcessGroup._get_sequence_number_for_group",
        "of processes that wait for each other, the late one has begun fewer exchanges",
        "torch's flight recorder, once it counts exchanges of gloo too",
    ),
    "diffusers.models._modeling_parallel.ContextParallelInput": Use(
        "diffusers.models._modeling_parallel:ContextParallelInput",
        "says which inputs of a module are sharded over the processes of a clip",
        "the same class, once diffusers exports it beside ContextParallelConfig",
    ),
    "diffusers.models._modeling_parallel.ContextParallelOutput": Use(
        "diffusers.models._modeling_parallel:ContextParallelOutput",
        "says which outputs of a module are gathered",
        "the same class, once diffusers exports it beside ContextParallelConfig",
    ),
    "_flash_attn_fwd": Use("torch.nn.attention._fa4", *KERNEL),
    "_flash_attn_bwd": Use("torch.nn.attention._fa4", *KERNEL),
    "_cp_plan": Use(
        "diffusers:WanTransformer3DModel._cp_plan",
        "what diffusers shards and gathers in its Wan network",
        "a copy of it, or net.enable_parallelism",
    ),
    "_padding": Use(
        "diffusers.models.autoencoders.autoencoder_kl_wan",
        "the zeros around a causal convolution, which the convolution is to pad with itself",
        "diffusers' own layer, which copies what it pads",
    ),
    "_parallel_config": Use(
        "diffusers.models.attention_dispatch",
        "an attention processor is told that its tokens are sharded",
        "net.enable_parallelism, once it works where there is no GPU",
    ),
    "_from_config": Use(
        "transformers:PreTrainedModel._from_config",
        "an encoder in its own dtype without its weights, for plan",
        "the class called with its config, once that takes a dtype",
    ),
    "_reset_state": Use(
        "accelerate.state:AcceleratorState._reset_state",
        "a second run in one process would inherit the first one's precision",
        "an Accelerator without state shared in its process",
    ),
    "deepspeed.ops.__compatible_ops__": Use(
        "deepspeed.ops",
        "DeepSpeed would compile its own all-reduce for CPUs, and nothing else tells it not to",
        "a setting of DeepSpeed",
    ),
    "_hp_mapping": Use(
        "deepspeed.runtime.zero.stage_1_and_2",
        "where the fp32 part of a weight lies that this process keeps (ZeRO-2); what is public copies it whole",
        "deepspeed.utils, once it hands out a view of the local part",
    ),
}
# Names of DeepSpeed's optimizers and parameters that its documentation has not: where each process's parts lie.
UNDOCUMENTED = {
    "deepspeed.runtime.zero.stage3": (
        *("grad_position", "fp32_partitioned_groups_flat", "fp16_groups", "get_param_id", "clip_grad", "ds_tensor"),
        "ds_numel",
    ),
    "deepspeed.runtime.zero.stage_1_and_2": ("single_partition_of_fp32_groups", "bit16_groups", "clip_grad"),
    "deepspeed.utils.tensor_fragment": ("param_group_index", "hp_fragment_address", "lp_fragment_address"),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and (not name.startswith("__") or name == "__compatible_ops__")


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in LIBRARIES)


def attributes(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(name, whether it is of self or cls); getattr and its like by a written name count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield name.value, ast.unparse(node.args[0]) == "self"


@cache
def own_names(file: Path) -> set[str]:
    """What it defines or gives to self."""
    names: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_in(file: Path) -> set[str]:
    tree = tree_of(file)
    ours = set().union(*map(own_names, FILES))
    private = {name for name in imported(tree) if any(map(is_private, name.split(".")))}
    for name, of_self in attributes(tree):
        known = ours if of_self else own_names(file)
        if is_private(name) and name not in known | PYTHON:
            private.add(name)
    return private


MADE = ("_abc", "_backward_cls")  # by metaclasses: of abstract classes, and of torch.autograd.Function


def overridden(file: Path) -> set[str]:
    """Private methods of a library's class that a class of the file has its own of."""
    module = importlib.import_module(f"reeltune.{module_of(file)}".rstrip("."))
    classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    return {
        name
        for one in classes
        for base in one.__mro__[1:]
        if base.__module__.partition(".")[0] in LIBRARIES
        for name in vars(one).keys() & vars(base).keys()
        if is_private(name) and not name.startswith(MADE)
    }


def test_what_is_private_is_listed_and_what_is_listed_is_used():
    assert set().union(*map(private_in, FILES)) == PRIVATE.keys()


def test_nothing_private_is_overridden():
    found = {module_of(file): overridden(file) for file in FILES if module_of(file) != "__main__"}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_there_in_the_installed_version(name):
    at, why, instead = PRIVATE[name]
    assert why and instead
    module, _, path = at.partition(":")
    if module.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    if not path:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", source_of(module))
        return
    thing = sys.modules["torch"].ops.aten if module == "torch.ops.aten" else importlib.import_module(module)
    for part in path.split("."):
        thing = getattr(thing, part)


@pytest.mark.parametrize("module", UNDOCUMENTED)
def test_what_deepspeed_has_undocumented_is_there_and_used(module):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    used = {name for name, _ in attributes(tree_of(PACKAGE / "distributed" / "zero.py"))}
    for name in UNDOCUMENTED[module]:
        assert name in used and re.search(rf"\b{name}\b", source_of(module))


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    ["from torch import _C", "import torch._dynamo", "net._apply(f)", "getattr(net, '_apply')", "net._apply = f"],
)
def test_another_private_name_is_seen(line, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(f"def of(net, f):\n    {line}\n")
    assert len(private_in(file) - PRIVATE.keys()) == 1


def test_the_libraries_have_upper_bounds():
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["zero"]
    bounds = {one.name: one.specifier for one in map(Requirement, lines) if one.name in LIBRARIES}
    assert bounds.keys() == set(LIBRARIES)
    for line in (PACKAGE.parents[1] / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name in LIBRARIES:
            assert {one.operator for one in bounds[name]} == {">=", "<"} and version in bounds[name]
