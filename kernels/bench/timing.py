"""Timing: medians of interleaved calls, with events and an emptied cache on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
MOST_CALLS = 50
FEWEST_CALLS = 3


class Timing(NamedTuple):
    """Milliseconds of one call: the median, the 20th and 80th percentile, and how many were timed."""

    ms: float
    low: float
    high: float
    calls: int


def time_calls(work: Mapping[str, Call], device: torch.device | str, seconds: float = 0.5) -> dict[str, Timing]:
    """Time each entry over about ``seconds``, at least 3 and at most 50 calls.

    The entries take turns, so that a clock that falls or a busy machine disturbs all alike. One call of each comes
    first and is not counted: it compiles. On a GPU, CUDA events are put around each call, and a buffer of twice the
    size of the L2 cache is written before it: a model's other layers would have emptied the cache as well.
    """
    device = torch.device(device)
    clock: Any = _Events(device) if device.type == "cuda" else _Wall(device)
    for call in work.values():
        call()
    first = {name: clock.read(clock.around(call)) for name, call in work.items()}
    rounds = {n: max(FEWEST_CALLS, min(MOST_CALLS, int(1e3 * seconds / max(ms, 1e-3)))) for n, ms in first.items()}
    found: dict[str, list[Any]] = {name: [] for name in work}
    for turn in range(max(rounds.values(), default=0)):
        for name, call in work.items():
            if turn < rounds[name]:
                found[name].append(clock.around(call))
    return {name: _summary([clock.read(mark) for mark in marks]) for name, marks in found.items()}


class _Wall:
    """Wall-clock time, for a CPU and for devices whose calls are waited for."""

    def __init__(self, device: torch.device) -> None:
        self.wait = getattr(getattr(torch, device.type, None), "synchronize", None) if device.type != "cpu" else None

    def around(self, call: Call) -> float:
        begun = time.perf_counter()
        call()
        if self.wait is not None:
            self.wait()
        return (time.perf_counter() - begun) * 1e3

    def read(self, mark: float) -> float:
        return mark


class _Events:
    """CUDA events; nothing is waited for until the first mark is read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self.flush: Tensor = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def around(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        return begin, end

    def read(self, mark: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        mark[1].synchronize()
        return float(mark[0].elapsed_time(mark[1]))


def _summary(ms: list[float]) -> Timing:
    ms = sorted(ms)
    at = [ms[round(share * (len(ms) - 1))] for share in (0.5, 0.2, 0.8)]
    return Timing(at[0], at[1], at[2], len(ms))
