"""What a recipe writes down while it works; the report is made of it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Ledger:
    """One recipe's account of one (component, site, branch, op index) during one run.

    Counting and noting are cheap enough for every call: tensors are kept as they are and read when the report is made.
    """

    calls: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dense: Counter[str] = field(default_factory=Counter)  # reason -> how often the op ran dense because of it
    values: dict[str, Any] = field(default_factory=dict)
    cautions: dict[str, str] = field(default_factory=dict)  # what the user did not ask for or cannot want -> why
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _sums: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def count(self, what: str, by: int = 1) -> None:
        """Add to a named count (``searches``, ``sparse`` ...)."""
        self.counts[what] += by

    def ran_dense(self, reason: str) -> None:
        """Say that this call ran dense, and why."""
        self.dense[reason] += 1

    def note(self, **values: Any) -> None:
        """Keep the newest value of something (a number, a list, a tensor per head)."""
        self.values.update(values)

    def average(self, **values: tuple[Any, Any]) -> None:
        """Add (total, count) to a mean over calls: numbers or tensors of one shape, say one entry a head."""
        for name, (total, count) in values.items():
            if name in self._sums:
                total, count = self._sums[name][0] + total, self._sums[name][1] + count
            self._sums[name] = total, count

    def caution(self, what: str, why: str) -> None:
        """Have the report begin with a line "WHAT at N of M sites: WHY". An empty ``why`` takes it back."""
        if why:
            self.cautions[what] = why
        else:
            self.cautions.pop(what, None)

    @contextlib.contextmanager
    def time(self, what: str, device: torch.device) -> Iterator[None]:
        """Add the time spent inside to ``what``. On CUDA by events, so that nothing waits for the device."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.device(device):
                begin.record()
                try:
                    yield
                finally:
                    end.record()
                    self._events.append((what, begin, end))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun

    def settle(self) -> None:
        """Turn recorded device events into seconds; waits for them."""
        for what, begin, end in self._events:
            end.synchronize()
            self.seconds[what] += begin.elapsed_time(end) / 1000
        self._events.clear()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        self.settle()
        means = {name: _mean(*both) for name, both in self._sums.items()}
        return {
            "calls": self.calls,
            "counts": dict(self.counts),
            "dense": dict(self.dense),
            "cautions": dict(self.cautions),
            "values": {name: _plain(value) for name, value in (self.values | means).items()},
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
        }


class Unwritten(Ledger):
    """For compiled graphs, which cannot write into a ledger: takes everything and keeps nothing."""

    def count(self, what: str, by: int = 1) -> None:
        """Not kept."""

    def ran_dense(self, reason: str) -> None:
        """Not kept."""

    def note(self, **values: Any) -> None:
        """Not kept."""

    def average(self, **values: tuple[Any, Any]) -> None:
        """Not kept."""

    def caution(self, what: str, why: str) -> None:
        """Not kept."""

    @contextlib.contextmanager
    def time(self, what: str, device: torch.device) -> Iterator[None]:
        """Not measured."""
        yield


UNWRITTEN = Unwritten()


def _mean(total: Any, count: Any) -> Any:
    """0 where nothing was counted."""
    totals, counts = (torch.as_tensor(x).detach().double().cpu() for x in (total, count))
    return torch.where(counts > 0, totals / counts.clamp_min(1), 0.0)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
