"""Charts: few points of many steps, means that nothing spoils, and the page's colours."""

import re

import numpy as np
import pytest

from reeltune.reporting import charts


def test_a_long_run_keeps_its_extremes_and_its_mean_in_few_points():
    values = np.random.RandomState(0).rand(12_345)
    values[6000] = 9.0
    x, mean, low, high = charts.binned(range(12_345), values)
    assert len(x) == charts.BINS and high.max() == 9.0 and low.min() == values.min()
    assert np.average(mean, weights=[41 + (12_345 * (i + 1) // 300 - 12_345 * i // 300 - 41) for i in range(300)]) == (
        pytest.approx(values.mean())
    )
    assert (np.diff(x) > 0).all() and x[0] == 20.0


def test_smoothing_keeps_a_straight_line():
    assert charts.smooth(np.arange(200.0)) == pytest.approx(np.arange(200.0))
    assert charts.smooth(np.tile([0.0, 2.0], 100))[50:150] == pytest.approx(1.0, abs=0.12)


def test_an_infinite_value_is_a_gap_and_spoils_no_mean():
    values = np.ones(200)
    values[[0, 100, 101, 102]] = np.inf, np.nan, -np.inf, np.inf
    _, mean, low, high = charts.binned(range(200), values)
    assert np.isnan(mean).sum() == np.isnan(low).sum() == np.isnan(high).sum() == 4
    smoothed = charts.smooth(mean)
    assert np.isnan(smoothed[0]) and smoothed[1:] == pytest.approx(1.0)


def test_charts_take_every_colour_from_the_page():
    svg = charts.time_split([1, 2, 3], [("now", [1, 2, 3]), ("data", [1.0, 1.0, 2.0])])
    assert not re.search(r"#[0-9a-f]{6}", svg) and "var(--now)" in svg and "var(--data)" in svg
    assert svg.startswith("<svg role") and svg.endswith("</svg>") and "xmlns" not in svg
