"""Unit: the bootstrap against its definition, and intervals against what they must cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowedit.evaluation import intervals
from knowedit.evaluation.intervals import RESAMPLES, TAILS, Estimate, draws, mean, ratio


def test_a_draw_takes_as_many_clusters_as_there_are():
    found = draws(7, 3)
    assert found.shape == (RESAMPLES, 7) and (found.sum(1) == 7).all()
    assert found.mean() == pytest.approx(1) and (found == draws(7, 3)).all()
    assert (found != draws(7, 4)).any()


def test_the_interval_is_that_of_resampled_clusters():
    """Written out: draw clusters with replacement, divide the sums of what is drawn."""
    rng = np.random.default_rng(1)
    above, below = rng.random(12), rng.integers(1, 5, 12).astype(float)
    drawn = np.random.default_rng(9).integers(12, size=(RESAMPLES, 12))
    wanted = np.quantile([above[d].sum() / below[d].sum() for d in drawn], TAILS)
    found = ratio(above, below, 9)
    assert (found.low, found.high) == pytest.approx(tuple(wanted), rel=1e-12)
    assert found.mean == pytest.approx(above.sum() / below.sum()) and found.records == below.sum()


def test_clusters_are_resampled_whole():
    values = [float(i % 3 == 0) for i in range(30)]
    once = mean(values, range(30))
    thrice = mean(values * 3, [*range(30)] * 3)
    assert (once.low, once.high, once.mean) == (thrice.low, thrice.high, thrice.mean)
    assert (once.records, thrice.records) == (30, 90)
    assert mean(values, ["all"] * 30).low == mean(values).mean


def test_six_of_six_is_no_certainty():
    """Clopper and Pearson (1934): at the low end, so many successes in a row have 2.5 %."""
    found = mean([1.0] * 6, share=True)
    assert found.mean == found.high == 1 and found.low**6 == pytest.approx(0.025)
    found = mean([0.0] * 6, share=True)
    assert found.mean == found.low == 0 and (1 - found.high) ** 6 == pytest.approx(0.025)
    assert mean([1.0], share=True).low == pytest.approx(0.025)
    many, one = mean([1.0] * 60, range(60), share=True), mean([1.0] * 60, [0] * 60, share=True)
    assert many.low == pytest.approx(0.025 ** (1 / 60)) and one.low == pytest.approx(0.025)
    assert (many.records, one.records) == (60, 60)


def test_only_a_share_at_its_end_takes_the_exact_interval():
    values = [1.0, 1.0, 0.0, 1.0]
    assert mean(values, share=True) == mean(values)
    assert mean([0.5] * 4, share=True) == mean([0.5] * 4) == Estimate(0.5, 0.5, 0.5, 4)
    zero = mean([0.0] * 4)  # a divergence, which is really 0
    assert (zero.low, zero.high) == (0, 0)


def test_the_measures_that_are_shares_are_named():
    rows = [("a", "success", i, 1.0) for i in range(4)] + [("a", "kl", i, 0.0) for i in range(4)]
    found = intervals.estimates(rows, shares=("success",))["a"]
    assert found["success"].low == pytest.approx(0.025**0.25) and found["kl"].high == 0


def test_estimates_leave_out_what_is_undefined():
    values = [("a", "m", "x", 1.0), ("a", "m", "y", float("nan")), ("a", "n", "x", 0.5)]
    found = intervals.estimates(values)
    assert found == {"a": {"m": Estimate(1, 1, 1, 1), "n": Estimate(0.5, 0.5, 0.5, 1)}}


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-1, 1)), min_size=1, max_size=30))
def test_the_mean_lies_in_its_interval(pairs):
    clusters, values = zip(*pairs)
    found = mean(values, clusters)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = mean(rng.normal(1.0, 2.0, 50), rng=rng)
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_an_estimate_is_formatted_with_its_interval():
    found = Estimate(0.5, -0.25, 1, 3)
    assert f"{found:+.1f}" == "+0.5 [-0.2, +1.0]" and str(found) == "0.500 [-0.250, 1.000]"
    assert str(Estimate(0.5, 0.5, 0.5, 1)) == "0.500"  # one value tells nothing of an interval
    assert not found.excludes_zero and Estimate(1, 0.1, 2, 3).excludes_zero
