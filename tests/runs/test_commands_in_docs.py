"""The documents: every command is run, with small sizes, on a tiny checkpoint and a small data set; what they name is
there."""

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from reeltune import cli, compat
from reeltune.config.parse import settings
from scripts.recipe_page import page
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "reeltune"
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), PACKAGE / "families" / "ADDING.md"]
OF_THEIR_DAY = ("log.md", "CHANGELOG.md")  # what they name may be gone
SMALL = {
    "video_sample_n_frames": 5,
    "video_sample_stride": 1,
    "video_sample_size": 32,
    "image_sample_size": 32,
    "token_sample_size": 32,
    "max_train_steps": 2,
    "mixed_precision": "no",
    "dataloader_num_workers": 0,
    "preview_count": 0,
    "preview_steps": 1,
    "held_out_levels": 1,
    "report_to": "none",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def newest(match: re.Match) -> str:
    """A checkpoint of the folder named, whichever step it is of."""
    found = sorted(Path(match[1]).glob("checkpoint-*"))
    assert found, f"{match[0]}: no run before it has written a checkpoint there"
    return str(found[-1])


def reeltune_words(command: str) -> list[str] | None:
    """What `reeltune` is given, if the command starts it."""
    words = shlex.split(re.sub(r"(\S+)/checkpoint-\d+", newest, command))
    if words[0] == "reeltune":
        return words[1:]
    if words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
        rest = words[words.index("reeltune") + 1 :]  # in one process here, which shares nothing
        return rest if "--engine" not in rest else [word for word in rest if word not in ("--engine", "fsdp", "zero3")]
    return None


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """A folder in which the paths that the documents name are there."""
    folder = tmp_path_factory.mktemp("documents")
    tiny_checkpoint(folder / "models" / "Wan2.1-Fun-V1.1-1.3B-Control", "control_v1.1")
    tiny_checkpoint(folder / "models" / "Wan2.2-T2V-A14B", "2.2_a14b_t2v")
    data_set(folder / "datasets" / "mine")
    pair = {"A": torch.ones(2, 48), "B": torch.ones(48, 2)}  # of another tool, without an alpha
    named = {f"diffusion_model.blocks.0.self_attn.q.lora_{one}.weight": weight for one, weight in pair.items()}
    save_file(named, folder / "theirs.safetensors")
    for name in ("recipes", "config"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def place(laid_out, tmp_path, monkeypatch, measured_here):
    """Where a page's commands are run, one after the other."""
    shutil.copytree(laid_out, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_run(page, place):
    for command in commands_of(page):
        kept = {"mixed_precision"} if "--mixed_precision" in command else set()
        small = [f"--{name}={value}" for name, value in SMALL.items() if name not in kept]
        if "bf16_stochastic" in command:
            small.append("--mixed_precision=bf16")
        if "--rank" in command or "_lora" in command:  # tiny layers have no more
            small.append("--rank=2")
        if "a14b" in command:  # there are two blocks
            small.append("--blocks_to_swap=2")
        script = re.search(r" scripts/(\S+\.py) (.*)", command)
        argv = reeltune_words(command) if script is None else shlex.split(script[2])
        if argv is None:
            assert_known(command)
        elif script is not None:
            assert compat.train(script[1], [*argv, *small]) == 0, command
        elif argv[0] in (*cli.RUN, "plan", "sample"):
            assert cli.main([*argv, *small]) == 0, command
        else:
            assert cli.main(argv) == 0, command


def assert_known(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "sh":  # for another machine
        subprocess.run(["sh", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
    else:
        assert words[0] == "export", f"a document has a command that no test runs: {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_leads_to_every_page():
    links = set(re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8")))
    assert {str(page.relative_to(ROOT)) for page in PAGES if page != README} <= links


def test_the_tree_in_the_readme_is_that_of_the_package():
    """Each folder with the first line of its docstring."""
    tree = re.search(r"^src/reeltune/\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert tree is not None
    lines = re.findall(r"^( *)(\S+) +(.+)$", tree[1], re.MULTILINE)
    told = {name.rstrip("/"): about for indent, name, about in lines if indent}
    folders = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert told.keys() == folders.keys() | files
    for name, path in folders.items():
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
        assert told[name] == first.replace(" (no torch)", "").rstrip("."), f"copy {name}'s line into the README's tree"
    assert all((ROOT / name).is_dir() for indent, name, _ in lines if not indent)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OF_THEIR_DAY], ids=name_of)
def test_files_named_in_the_documents_exist(page):
    """Words in code marks such as `data/plan.py`: from the top, from the package or from its families."""
    names = set(re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|md|yaml))`", page.read_text(encoding="utf-8")))
    bases = ROOT, PACKAGE, PACKAGE / "families"
    assert not [name for name in names if not any((base / name).exists() for base in bases)]


def test_settings_named_in_the_documents_exist():
    """Words in code marks that look like a setting."""
    known = set(settings())
    parts = {word for name in known for word in name.split("_")}
    for file in PAGES:
        for word in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){2,})`", file.read_text(encoding="utf-8")):
            if set(word.split("_")) <= parts:
                assert word in known, f"{file.name} names {word}"


def test_the_changelog_has_the_version():
    """pyproject.toml is the one place that says it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_commit_is_checked_by_what_make_lint_runs():
    lint = subprocess.run(["make", "-n", "lint"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    for hook in hooks:
        assert hook["language"] == "system" and hook["entry"].removesuffix(" --fix") in lint


def test_the_page_of_settings_is_up_to_date():
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page(), "run make docs"


def test_the_page_of_original_commands_has_every_script_and_flag():
    page = (ROOT / "docs" / "original_commands.md").read_text(encoding="utf-8")
    for script, own in compat.SCRIPTS.items():
        assert f"`scripts/{script}`" in page
        for name, what in own.refused.items():
            assert f"| `--{name}`, of `scripts/{script}` | {what} |" in page
    for name, what in (compat.ACCEPTED | compat.REFUSED).items():
        assert f"| `--{name}` | {what} |" in page
