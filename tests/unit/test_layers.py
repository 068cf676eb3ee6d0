"""Who may import whom, read from the source; and what no file may do."""

import ast
import re
import subprocess
import sys

import pytest

from scripts.import_graph import FLOORS, PACKAGE, arrows, imports_of, main, module_of, own_imports, tree_of, upward

FILES = sorted(PACKAGE.rglob("*.py"))

NEVER = (  # (these, must not import those), beside what floors say
    *((low, "config") for low in ("diffusion", "data", "memory", "optim", "adapters", "families", "distributed")),
    ("diffusion", "data"),
    ("data", "diffusion"),
    ("families", "data"),
    *((f"reporting.{file}", "config") for file in ("log", "ledger", "charts", "first_batch")),
)
LIBRARIES = {  # library -> who may import it
    "accelerate": ("distributed.engine",),
    "deepspeed": ("distributed.zero",),
    "peft": ("adapters",),
    "diffusers": ("families", "diffusion.denoise", "optim.optimizers", "demo"),
    "transformers": ("families", "demo", "control"),
}


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def family_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "families" and len(parts) > 2 else None


# ---- what no file may do: each yields what is wrong in a file


def imports_upward(file):
    module = module_of(file)
    for name in own_imports(file):
        said, arrow = f"{module} imports {name}", (module.partition(".")[0], name.partition(".")[0])
        if not module or (arrow[0] != arrow[1] and upward(arrow)):
            yield f"{said}, which is not below it"
        for low, high in NEVER:
            if within(module, low) and within(name, high):
                yield said
        if len({family_of(module), family_of(name)} - {None}) > 1:
            yield f"{said}, another family"
        by_name = ("families", "demo")  # all else finds a family by the checkpoint's own files
        if family_of(name) is not None and not any(within(module, user) for user in by_name):
            yield said


def imports_a_library_of_others(file):
    for name in imports_of(file):
        for library, users in LIBRARIES.items():
            if within(name, library) and not any(within(module_of(file), user) for user in users):
                yield f"{module_of(file)} imports {name}"


DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial", "normal"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
GLOBAL = {"random": {"Random"}, "np.random": {"RandomState"}, "torch.random": set()}  # generator -> what is private

DROPOUT = "training.dropout"  # PEFT's draws from torch's own generator, which is seeded and put back around it


def draws_from_a_global_generator(file):
    if module_of(file) == DROPOUT:
        return
    for call in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute):
            continue
        owner, name = ast.unparse(call.func.value), call.func.attr
        seeds = name in ("manual_seed", "seed") and owner in ("torch", "torch.cuda", "np.random", "random")
        draws = (name in DRAWS and owner == "torch") or name in IN_PLACE
        of_all = draws and not any(keyword.arg == "generator" for keyword in call.keywords)
        if seeds or of_all or (owner in GLOBAL and name not in GLOBAL[owner]):
            yield f"{module_of(file)}:{call.lineno} {owner}.{name}"


def asks_for_a_familys_name(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Compare):
            sides = {ast.unparse(side) for side in (node.left, *node.comparators)}
            if sides & {"family.name", "self.family.name"}:
                yield f"{module_of(file)}:{node.lineno}"


def is_long(file):
    if len(file.read_text(encoding="utf-8").splitlines()) > 400:
        yield module_of(file)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 100:
            yield f"{module_of(file)}:{node.lineno} {node.name}"


def catches_all(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ExceptHandler):
            named = set() if node.type is None else set(ast.unparse(node.type).strip("()").split(", "))
            if not named or {"Exception", "BaseException"} & named:
                yield f"{module_of(file)}:{node.lineno}"


NEVER_DONE = (
    imports_upward,
    imports_a_library_of_others,
    draws_from_a_global_generator,
    asks_for_a_familys_name,
    is_long,
    catches_all,
)


@pytest.mark.parametrize("does", NEVER_DONE, ids=lambda does: does.__name__)
def test_no_file(does):
    assert [said for file in FILES for said in does(file)] == []


def test_the_house_as_it_is_drawn(capsys):
    rooms = {room for floor in FLOORS for room in floor}
    assert {module_of(file).partition(".")[0] for file in FILES} == rooms
    assert main() == 0
    assert capsys.readouterr().out.endswith(f"{len(rooms)} rooms, {len(arrows())} arrows, 0 upward\n")


@pytest.mark.parametrize("arrow", [("core", "data"), ("run", "cache"), ("data", "diffusion"), ("families", "training")])
def test_an_arrow_upward_or_sideways_is_seen(arrow):
    assert upward(arrow) and not upward(("training", arrow[0]))


def test_no_run_of_more_than_eight_lines_stands_in_two_families():
    """Blank lines, imports and a Family's `encode_clips=encode_clips` aside: what families share lives beside them."""
    where = {}
    for file in FILES:
        if family := family_of(module_of(file)):
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            lines = [line for line in lines if line and not re.match(r"import |from |(\w+)=\1,$", line)]
            for start in range(len(lines) - 8):
                where.setdefault(tuple(lines[start : start + 9]), set()).add(family)
    assert len(where) > 1000
    assert not [(families, run[0]) for run, families in where.items() if len(families) > 1]


def test_modules_that_say_no_torch_have_none():
    torch_free = [module_of(file) for file in FILES if "(no torch)" in (ast.get_docstring(tree_of(file)) or "")]
    assert {"core.errors", "core.rng", "config.parse", "config.rules", "data.plan", "data.shapes"} <= set(torch_free)
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n importlib.import_module('reeltune.' + name)\n"
    code += " assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code, *torch_free], check=True)
