"""Who may import whom, read from the source; and what no file may do."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "reeltune"
FILES = sorted(PACKAGE.rglob("*.py"))

REPORTING = ("log", "ledger", "report", "charts", "agreement")
ENGINES = ("engine", "launch", "direct", "fsdp", "zero", "shards", "held_state", "watch")
AROUND = ("interrupt", "first_batch", "host_memory")
LAYERS = (  # from the bottom; a name covers what is below it too
    ("types", "errors", "dice", "files"),
    ("recipe", "rules", "settings"),
    ("data", "diffusion"),
    ("families.spec", "families.text", "families.weights", "families.streamed"),
    ("families",),
    (*ENGINES, "ahead", "blocks", "fused", "checkpoint", "optim", "trainable", *AROUND, *REPORTING),
    ("out_of_memory",),
    (
        "train",
        "apart",
        "learner",
        "validate",
        "sample",
        "prompts",
        "inputs",
        "run_folder",
        "saving",
        "check",
        "export",
        "trial",
        "parallel",
        "cache",
    ),
    ("forecast",),
    ("cli", "compat", "demo", "__main__"),
)
NEVER = (  # (these, must not import those), beside what layers say; a report compares with a Recipe's defaults
    ("data", "diffusion"),
    ("diffusion", "data"),
    *((low, "recipe") for low in ("data", "diffusion", "families")),
    *((low, "settings") for low in ("data", "diffusion", "families")),
    *((low, "data") for low in ("families",)),
    *((low, high) for low in LAYERS[5] if low != "report" for high in ("recipe", "rules", "settings")),
)
LIBRARIES = {  # library -> who may import it
    "accelerate": ("engine",),
    "deepspeed": ("zero",),
    "diffusers": ("families", "diffusion.denoise", "optim", "demo"),
    "transformers": ("families", "demo"),
}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; reeltune's own without that first part."""
    names = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inside = PACKAGE / Path(*node.module.split(".")[1:])
            for alias in node.names:
                is_module = (inside / f"{alias.name}.py").is_file() or (inside / alias.name).is_dir()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def own_imports(file: Path) -> set[str]:
    return {name.removeprefix("reeltune.") for name in imports_of(file) if name.startswith("reeltune.")}


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def layer_of(module: str) -> int:
    found = [(len(name), level) for level, names in enumerate(LAYERS) for name in names if within(module, name)]
    assert found, f"{module} is in no layer"
    return max(found)[1]


def family_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "families" and len(parts) > 2 else None


ids = pytest.mark.parametrize("file", FILES, ids=module_of)


@ids
def test_imports_point_downward(file):
    module = module_of(file)
    if not module:
        assert not own_imports(file)
        return
    for name in own_imports(file):
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}, which is above it"
        for low, high in NEVER:
            assert not (within(module, low) and within(name, high)), f"{module} imports {name}"
        families = {family_of(module), family_of(name)} - {None}
        assert len(families) < 2, f"{module} imports {name}, another family"
        by_name = ("families", "demo")  # all else finds a family by the checkpoint's own files
        assert family_of(name) is None or any(within(module, user) for user in by_name), f"{module} imports {name}"


@ids
def test_libraries_stay_where_they_belong(file):
    for name in imports_of(file):
        for library, users in LIBRARIES.items():
            if within(name, library):
                assert any(within(module_of(file), user) for user in users), f"{module_of(file)} imports {name}"


DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial", "normal"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
GLOBAL = {"random": {"Random"}, "np.random": {"RandomState"}, "torch.random": set()}  # generator -> what is private


@ids
def test_no_global_random_generator(file):
    for call in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute):
            continue
        owner, name = ast.unparse(call.func.value), call.func.attr
        where = f"{module_of(file)}:{call.lineno} {owner}.{name}"
        assert name not in ("manual_seed", "seed") or owner not in ("torch", "torch.cuda", "np.random", "random"), where
        assert owner not in GLOBAL or name in GLOBAL[owner], where
        if (name in DRAWS and owner == "torch") or name in IN_PLACE:
            assert any(keyword.arg == "generator" for keyword in call.keywords), where


@ids
def test_no_question_about_a_familys_name(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Compare):
            sides = {ast.unparse(side) for side in (node.left, *node.comparators)}
            assert not sides & {"family.name", "self.family.name"}, f"{module_of(file)}:{node.lineno}"


@ids
def test_nothing_is_caught_unnamed(file):
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not {"Exception", "BaseException"} & set(ast.unparse(node.type).strip("()").split(", ")), node.lineno


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
    assert {"errors", "dice", "settings", "rules", "data.plan", "data.shapes"} <= set(torch_free)
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n importlib.import_module('reeltune.' + name)\n"
    code += " assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code, *torch_free], check=True)
