"""`reeltune rank`: a full fine-tune taken apart, and what is left of it at each rank."""

import re

import numpy as np
import pytest
import torch

from reeltune import cli
from reeltune.adapters import saved
from reeltune.adapters.factors import EXACT, factors
from reeltune.core.errors import UserError
from reeltune.export.rank import Extracted, Measured, _beginning, _line, measure_ranks
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import recipe

WIDTH = 48  # of the tiny network, above which no rank goes
SETTINGS = {"train_mode": "control", "held_out_share": 0.3, "learning_rate": 0.01, "max_train_steps": 6}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A full fine-tune of the attention and of the norms of its queries."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("rank") / "model", "control_v1.0")
    made = recipe(folder, data, folder.parent / "run", **SETTINGS, trainable_modules=["self_attn"])
    assert train(made) == 0
    return made


@pytest.mark.parametrize("sides", [(40, 30), (EXACT + 40, EXACT + 88)])
def test_a_change_of_low_rank_is_found_exactly(sides):
    torch.manual_seed(0)
    change_OI = torch.randn(sides[0], 5) @ torch.randn(5, sides[1])
    found = factors(change_OI, 8, "a")
    pair = found.low_rank(5)
    assert pair.scale == 1
    torch.testing.assert_close(pair.B_OR @ pair.A_RI, change_OI, rtol=0, atol=1e-4 * float(change_OI.abs().max()))
    assert found.square_at(5) == pytest.approx(found.square, rel=1e-5)
    values_R = torch.linalg.svdvals(change_OI)
    assert found.square_at(2) == pytest.approx(float(values_R[:2].double().square().sum()), rel=1e-4)
    error = change_OI - found.low_rank(2).B_OR @ found.low_rank(2).A_RI
    assert float(error.double().square().sum()) == pytest.approx(found.square - found.square_at(2), rel=1e-3)
    assert torch.equal(factors(change_OI, 8, "a").U_OR, found.U_OR)  # no chance but that of the name


@pytest.mark.slow
def test_each_rank_is_measured_against_the_fine_tune(run, tmp_path):
    checkpoint = tmp_path.parent / run.output.output_dir / "checkpoint-6"
    first, left_out, *rows, verdict, written = measure_ranks(run, checkpoint, [1, 4, WIDTH], tmp_path / "out")
    outside = float(re.match(r"([\d.]+)% of what was trained is outside linear layers", left_out)[1])
    assert 0 < outside < 100
    pattern = r"rank (\d+): [\d.]+ MB, ([\d.]+)% of the change, held-out loss ([\d.]+), ([+-][\d.]+) from the fine-tune"
    found = [re.match(pattern, row).groups() for row in rows]
    assert [int(rank) for rank, *_ in found] == [1, 4, WIDTH]
    shares = [float(share) for _, share, *_ in found]
    assert shares[0] < shares[1] < shares[2] == pytest.approx(100 - outside, abs=0.1)
    apart = [abs(float(difference)) for *_, difference in found]
    assert apart[2] < apart[0] / 2  # at full rank only what is outside linear layers is lacking
    assert re.search(r"of the base, ([\d.]+) of the fine-tune", first)
    chosen = int(re.match(r"rank (\d+) is the smallest", verdict)[1])
    adapter = saved.load(tmp_path / "out")
    assert {layer.rank for layer in adapter.layers.values()} == {chosen}
    assert all("self_attn" in name for name in adapter.layers)
    assert f"rank {chosen}" in written


def test_more_than_all_is_not_advised(run, monkeypatch, tmp_path):
    """And a rank that is given twice is measured once."""
    monkeypatch.setattr(Measured, "is_as_good", False)
    checkpoint = tmp_path.parent / run.output.output_dir / "checkpoint-6"
    *_, row, less = measure_ranks(run, checkpoint, [1, 1])
    assert row.startswith("rank 1:") and less.endswith("try more than 1")
    _, _, told, row, most = measure_ranks(run, checkpoint, [2 * WIDTH, WIDTH])
    assert told == f"no linear layer that changed has a rank over {WIDTH}, which is measured in place of {2 * WIDTH}"
    assert row.startswith(f"rank {WIDTH}:")
    assert most.endswith(
        "no rank does more: what is lacking lies outside linear layers, which adapters learn by train_whole"
    )


def test_a_share_of_the_gain_is_told_where_there_is_one():
    """A fine-tune that is worse than its base has none."""
    base, row = np.array([[0.5], [0.7]]), Measured(4, 0.5, 10**6, 0.5, 0.1, None)
    for tuned, share in ((base - 0.2, ", 50% of its gain"), (base, ""), (base + 0.2, "")):
        assert _line(row, base, tuned).endswith(f"+0.1000 from the fine-tune{share}")
        (first,) = _beginning(base, tuned, Extracted({}, {}))
        assert first.endswith("clips") == bool(share)


def test_the_command(run, capsys):
    checkpoint = f"{run.output.output_dir}/checkpoint-6"
    assert cli.main(["rank", checkpoint, "--ranks", "2,8"]) == 0
    assert "rank 8:" in capsys.readouterr().out
    assert cli.main(["rank", checkpoint, "--ranks", "2,x"]) == 2
    assert cli.main(["rank", checkpoint, "--held_out_share", "0"]) == 2
    assert "no clips are held out" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(run, data, tmp_path):
    with pytest.raises(UserError, match="is no complete checkpoint-N folder"):
        list(measure_ranks(run, tmp_path, [4]))
    out = tmp_path / "adapters"
    made = recipe(
        run.model.pretrained_model_name_or_path,
        data,
        out,
        **SETTINGS | {"max_train_steps": 1},
        rank=2,
        target_name=["q"],
    )
    assert train(made) == 0
    with pytest.raises(UserError, match="keeps an adapter already"):
        list(measure_ranks(run, out / "checkpoint-1", [4]))
