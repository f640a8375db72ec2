"""Intervals around what was measured on a few samples: shares, means, paired differences and ratios, all for 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959963984540054  # of the normal distribution, two-sided 95 %


class Interval(NamedTuple):
    """An estimate with its interval; ``low`` and ``high`` are None where one sample alone says nothing of chance."""

    value: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data."""
        return self._asdict()


def wilson(right: float, n: int, z: float = Z) -> tuple[float, float]:
    """95 % interval of a rate of ``right`` out of ``n`` (Wilson 1927). ``right`` may be a sum of shares."""
    rate = right / n
    centre = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def share(values: Sequence[float]) -> Interval:
    """The mean of values in [0, 1] (right or wrong, or a share of several things in one sample), after Wilson.

    For shares of several things this is conservative: as if all of one sample were right or wrong together.
    """
    n = len(values)
    low, high = wilson(sum(values), n)
    return Interval(sum(values) / n, low, high, n)


def mean(values: Sequence[float]) -> Interval:
    """The mean with Student's t interval."""
    n = len(values)
    middle = math.fsum(values) / n
    if n < 2:
        return Interval(middle, None, None, n)
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = student(n - 1) * deviation / math.sqrt(n)
    return Interval(middle, middle - half, middle + half, n)


def share_difference(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """The difference of two shares of the same samples, after Agresti and Min (2005).

    Half a sample is added to each of the four ways a pair can turn out, so that the interval has a width even where
    no pair disagrees.
    """
    n = len(values)
    pairs = list(zip(values, reference, strict=True))
    more = math.fsum(max(0.0, a - b) for a, b in pairs)
    less = math.fsum(max(0.0, b - a) for a, b in pairs)
    size, gain, loss = n + 2, more + 0.5, less + 0.5
    middle = (gain - loss) / size
    half = Z * math.sqrt(max(0.0, gain + loss - (gain - loss) ** 2 / size)) / size
    return Interval((more - less) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


def difference(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """The mean of paired differences with Student's t interval."""
    return mean([a - b for a, b in zip(values, reference, strict=True)])


def ratio(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """The geometric mean of paired ratios of positive numbers, with Student's t interval of their logarithms."""
    found = difference([math.log(v) for v in values], [math.log(v) for v in reference])
    low, high = (None if v is None else math.exp(v) for v in found[1:3])
    return Interval(math.exp(found.value), low, high, found.n)


def student(freedom: int, level: float = 0.95) -> float:
    """The quantile of Student's t distribution that leaves ``1 - level`` outside both tails together."""
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """Probability of [-t, t]; the sums are finite for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
