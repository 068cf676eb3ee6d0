"""What a run imports, counted: nothing of another family, nothing that only other commands or settings need."""

import gc
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from reeltune.core import imports
from reeltune.core.imports import lean_imports
from tests.families.tiny_wan import tiny_checkpoint

NEVER = {  # where a run begins, whatever its family
    *("bitsandbytes", "torch._inductor.compile_fx", "deepspeed", "pytorch_optimizer"),
    *("matplotlib", "tensorboard", "starlette", "scipy", "pandas"),
    *("reeltune.estimate", "reeltune.export.main", "reeltune.page.app", "reeltune.demo"),
}
OF_NETWORKS = {"jinja2", "diffusers.models", "diffusers.pipelines", "transformers", "peft"}
OF_FAMILIES = {f"reeltune.families.{name}.net" for name in ("wan_fun", "easyanimate", "cogvideox_fun")}
PROGRAM = """
import gc, json, sys
import reeltune.cli
with reeltune.cli.lean_imports():
    import reeltune.training.loop
frozen = gc.get_freeze_count()
with reeltune.cli.lean_imports():
    made = [[] for _ in range(1000)]
print(json.dumps([frozen, gc.get_freeze_count(), len(gc.get_objects())]))
from reeltune import families
for folder in sys.argv[1:]:
    families.find(folder).load(folder)
    print(json.dumps([name for name in sys.modules if sys.modules[name] is not None]))
"""


@pytest.mark.slow
def test_a_run_imports_what_its_family_is_made_of_and_no_more(toy, tmp_path):
    wan = tiny_checkpoint(tmp_path / "model", "control_t2v")
    done = subprocess.run([sys.executable, "-c", PROGRAM, toy, wan], capture_output=True, text=True, check=True)
    garbage, *names = map(json.loads, done.stdout.splitlines())
    of_toy, of_wan = map(set, names)
    assert sorted(of_toy & (NEVER | OF_NETWORKS | OF_FAMILIES)) == []
    assert sorted(of_wan & (NEVER | OF_FAMILIES)) == ["reeltune.families.wan_fun.net"]
    encoders = {name.split(".")[2] for name in of_wan if re.match(r"transformers\.models\.\w+\.modeling_", name)}
    assert "umt5" in encoders and not encoders & {"llama", "llava", "qwen2_vl", "t5"}
    assert "diffusers.models" in of_wan  # so that the name still is one
    assert not [name for name in of_wan if name.startswith("diffusers.pipelines.")]

    frozen, frozen_later, looked_through = garbage
    assert frozen > 100 * looked_through  # all that came with torch
    assert frozen_later <= frozen  # and none of the thousand lists that came later


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "costly").mkdir()
    (tmp_path / "costly/__init__.py").write_text("from costly.inner import value\n")
    (tmp_path / "costly/inner.py").write_text("value = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "LATER", ("costly", "not_installed_at_all"))
    yield "costly"
    for name in ("costly", "costly.inner"):
        sys.modules.pop(name, None)


def test_a_package_is_imported_once_something_of_it_is_asked_for(package):
    with lean_imports():
        import costly  # pyright: ignore[reportMissingImports]

        spec = importlib.util.find_spec(package)
        with pytest.raises(ImportError):
            import not_installed_at_all  # noqa: F401
    assert spec is not None and spec.origin is not None and spec.origin.endswith("costly/__init__.py")
    assert not {"costly", "costly.inner"} & sys.modules.keys()

    from costly.inner import value  # pyright: ignore[reportMissingImports]

    assert costly.value is value  # one package, however it is come by
    assert sys.modules["costly"] is not costly


def test_it_is_imported_within_too_where_it_is_used_at_once(package):
    with lean_imports():
        from costly import value  # pyright: ignore[reportMissingImports]
    assert sys.modules["costly"].value is value
    assert not hasattr(sys.modules["costly"], "make_way")


def test_a_package_that_is_there_stays(package):
    real = importlib.import_module(package)
    with lean_imports():
        assert importlib.import_module(package) is real
    assert sys.modules[package] is real


def test_an_import_that_fails_leaves_all_as_it_was(package):
    with pytest.raises(ImportError), lean_imports():
        assert not gc.isenabled()
        import not_installed_at_all  # noqa: F401
    assert package not in sys.modules and gc.isenabled()


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_looked_for_as_before(collects):
    try:
        (gc.enable if collects else gc.disable)()
        with lean_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        gc.enable()
