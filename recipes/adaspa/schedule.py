"""When AdaSpa runs dense, when it searches and when it is sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The plan of one run; all steps count from 0.

    Attributes:
        total: steps of the run, None if nobody knows.
        warm_up: how many steps from the start have dense outputs.
        searches: later steps that search anew with the cached LSE, ascending.
        ignored: search steps asked for that this run cannot honour (inside the warm-up, or past its end).
    """

    total: int | None
    warm_up: int
    searches: tuple[int, ...]
    ignored: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        """The step of the fused search: the last of the warm-up, or the very first where there is no warm-up."""
        return max(self.warm_up - 1, 0)

    @property
    def sparse_steps(self) -> int | None:
        """How many steps are left for the sparse phase."""
        return None if self.total is None else max(self.total - self.first - 1, 0)


def plan(
    warm_up: int | float, searches: list[int | float] | None, default: float, total: int | None
) -> Schedule | None:
    """The schedule for ``total`` steps; None if fractions cannot be turned into steps because ``total`` is unknown.

    The paper counts steps from 1, so a fraction f names the last step of the first f of the run: 0.2 of 50 steps is
    its step 10, here step 9. That makes the search fraction that equals the warm-up fraction the fused search.
    """
    asked = searches if searches is not None else [default]
    if total is None:
        if isinstance(warm_up, float) or any(isinstance(s, float) for s in searches or ()):
            return None
        asked = searches or []  # the default second search is a fraction: it has no place in an endless run
    count = _count(warm_up, total)
    first = max(count - 1, 0)
    steps = sorted({_index(s, total) for s in asked})
    later = tuple(s for s in steps if s > first and (total is None or s < total))
    ignored = tuple(s for s in steps if s != first and s not in later) if searches is not None else ()
    return Schedule(total, count, later, ignored)


def _count(value: int | float, total: int | None) -> int:
    """A number of steps, or a fraction of them rounded half up."""
    if isinstance(value, float):
        assert total is not None
        return math.floor(round(value * total, 6) + 0.5)  # the inner round takes off what 0.29 * 100 has too little
    return value if total is None else min(value, total)


def _index(value: int | float, total: int | None) -> int:
    return max(_count(value, total) - 1, 0) if isinstance(value, float) else value
