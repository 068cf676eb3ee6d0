"""What a run makes of its learning rate, and when that is worth a notice."""

import pytest

from reeltune.config.recipe import Optimization
from reeltune.training.rate import LOOKED_AT, Rates, rate_notices, rate_of


def optimization(**changes):
    return Optimization(
        **{"learning_rate": 1e-4, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0, **changes}
    )


def test_rates_are_those_of_the_steps():
    warm = optimization(lr_warmup_steps=4)
    rates = Rates.of(rate_of(warm, 8), 8)
    assert (rates.highest, rates.mean, rates.last) == pytest.approx(
        (1e-4, (0 + 0.25 + 0.5 + 0.75 + 4) / 8 * 1e-4, 1e-4)
    )
    cosine = optimization(lr_scheduler="cosine")
    rates = Rates.of(rate_of(cosine, 4), 4)
    assert rates.last == pytest.approx(1e-4 * (1 + 2**-0.5 * -1) / 2) and rates.highest == 1e-4
    long = Rates.of(rate_of(cosine, 100 * LOOKED_AT), 100 * LOOKED_AT)
    assert long.mean == pytest.approx(0.5e-4, rel=1e-3) and long.last < 1e-12


def test_a_warm_up_longer_than_the_run_is_said():
    (notice,) = rate_notices(optimization(lr_warmup_steps=500), 4)
    assert notice == (
        "the rate is at most 6e-07, 3e-07 in the mean, 6e-07 at the last step of the run's 4; learning_rate is 0.0001, "
        "lr_scheduler is constant_with_warmup and lr_warmup_steps 500; lower lr_warmup_steps"
    )
    assert rate_notices(optimization(lr_warmup_steps=4), 8) == []
    assert rate_notices(optimization(learning_rate=0.0, lr_warmup_steps=500), 4) == []


def test_of_a_schedule_that_falls_early_the_warm_up_is_not_blamed():
    (notice,) = rate_notices(optimization(lr_scheduler="polynomial", lr_power=4.0, lr_warmup_steps=2), 100)
    assert notice.endswith("lr_scheduler is polynomial and lr_warmup_steps 2; raise learning_rate, if more is meant")
