"""Fixtures: runs from a cache, and one that trains an adapter; and no reports."""

import pytest

from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import STEPS
from tests.runs.reports import reports  # noqa: F401 - for all tests here
from tests.runs.small_run import recipe, write_array


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    return tmp_path_factory.mktemp("index")


@pytest.fixture
def run(data, index, toy, tmp_path):
    """A recipe whose folder is new, and whose data is measured once for all tests."""

    def make(name, model=toy, data=data, **changes):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        if not (out / "index").is_symlink():
            (out / "index").symlink_to(index)
        settings = {"max_train_steps": STEPS, "checkpointing_steps": 100, "cache_variants": 2, "text_drop_ratio": 0.4}
        return recipe(model, data, out, **settings | changes)

    return make


@pytest.fixture(scope="session")
def adapter_run(data, tmp_path_factory):
    """The folder of a run of four steps that trained an adapter and a whole weight; at its end it made a preview, an
    array."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {
        "train_mode": "control",
        "rank": 2,
        "network_alpha": 6.0,
        "target_name": ["q", "ffn.0"],
        "train_whole": ["head.head"],
        "use_ema": True,
        "max_train_steps": 4,
        "checkpointing_steps": 100,
        "learning_rate": 0.05,
        "lr_warmup_steps": 0,
        "held_out_share": 0.0,
        "fix_sample_size": (32, 32),
        "validation_prompts": ["a thing that moves"],
        "validation_paths": [str(data / "control/0.mp4")],
        "negative_prompt": "grey",
        "preview_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reeltune.sampling.sample.write_pixels", write_array)
        model = tiny_checkpoint(folder / "model", "control_v1.1")
        assert train(recipe(model, data, folder / "run", **settings)) == 0
    return folder / "run"
