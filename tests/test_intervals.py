"""Intervals agree with scipy where it has them, and with closed forms elsewhere."""

import math
import random

import pytest

from patchkit import intervals


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 23, 59, 200, 201])
def test_quantiles_of_student(freedom):
    scipy = pytest.importorskip("scipy.stats")
    for level in (0.5, 0.9, 0.95, 0.999):
        assert intervals.student(freedom, level) == pytest.approx(scipy.t.ppf((1 + level) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 7), (55, 100)])
def test_wilson(right, n):
    scipy = pytest.importorskip("scipy.stats")
    wanted = scipy.binomtest(right, n).proportion_ci(method="wilson")
    assert intervals.wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    found = intervals.share([1.0] * right + [0.0] * (n - right))
    assert found == pytest.approx((right / n, wanted.low, wanted.high, n), abs=1e-12)


def test_mean():
    scipy = pytest.importorskip("scipy.stats")
    values = [random.Random(i).gauss(20, 3) for i in range(9)]
    wanted = scipy.ttest_1samp(values, 0).confidence_interval(0.95)
    assert intervals.mean(values)[1:3] == pytest.approx(tuple(wanted), rel=1e-9)
    assert intervals.mean([4.0]) == (4.0, None, None, 1)
    assert intervals.mean([4.0, 4.0, 4.0]) == (4.0, 4.0, 4.0, 3)


def test_paired_differences_and_ratios():
    scipy = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    a = [rng.uniform(1, 2) for _ in range(8)]
    b = [x * rng.uniform(1.1, 1.3) for x in a]
    wanted = scipy.ttest_rel(b, a).confidence_interval(0.95)
    assert intervals.difference(b, a)[1:3] == pytest.approx(tuple(wanted), rel=1e-9)
    wanted = scipy.ttest_rel([math.log(x) for x in b], [math.log(x) for x in a]).confidence_interval(0.95)
    assert intervals.ratio(b, a)[1:3] == pytest.approx([math.exp(x) for x in wanted], rel=1e-9)
    assert intervals.ratio([2.0, 8.0], [1.0, 2.0]).value == pytest.approx(math.sqrt(2 * 4))
    assert intervals.ratio([2.0], [1.0])[1:] == (None, None, 1)


def test_differences_of_shares():
    """By hand: 10 pairs, 3 lost, 1 gained; with half a pair added to each cell (1.5 - 3.5) / 12 and its Wald width."""
    reference = [1.0] * 8 + [0.0] * 2
    values = [0.0] * 3 + [1.0] * 5 + [1.0, 0.0]
    found = intervals.share_difference(values, reference)
    half = intervals.Z * math.sqrt(5 - 4 / 12) / 12
    assert found == pytest.approx((-0.2, -2 / 12 - half, -2 / 12 + half, 10))
    same = intervals.share_difference(reference, reference)
    assert same.value == 0
    assert same.low == -same.high < 0


def test_intervals_cover_what_they_promise():
    """Of 95 % intervals, about 95 % hold the truth: shares near the edge, and paired differences of shares."""
    rng = random.Random(5)
    held = paired = 0
    for _ in range(800):
        values = [float(rng.random() < 0.9) for _ in range(20)]
        low, high = intervals.share(values)[1:3]
        held += low <= 0.9 <= high
        second = [v if rng.random() < 0.8 else float(rng.random() < 0.5) for v in values]  # 0.8 x 0.9 + 0.2 x 0.5
        low, high = intervals.share_difference(second, values)[1:3]
        paired += low <= 0.82 - 0.9 <= high
    assert 0.93 < held / 800 <= 1
    assert 0.93 < paired / 800 <= 1
