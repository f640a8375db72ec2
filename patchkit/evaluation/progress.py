"""How far a comparison is, and how long it will still take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patchkit.text import duration


@dataclass(frozen=True)
class Progress:
    """How far a comparison is; ``left`` are the seconds that it will still take, None before that can be told."""

    done: int
    total: int
    what: str
    left: float | None = None

    def __str__(self) -> str:
        left = "" if self.left is None else f", about {duration(self.left)} left"
        return f"sample {self.done + 1} of {self.total}: {self.what}{left}"


class Clock:
    """How long what is missing will take, from what has been timed so far. ``missing``: the variant of each sample."""

    def __init__(self, missing: Sequence[str]) -> None:
        self.missing = list(missing)
        self.seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timing(self, variant: str) -> Iterator[None]:
        """Time one sample, with all that is measured on it."""
        begun = time.perf_counter()
        yield
        self.seconds.setdefault(variant, []).append(time.perf_counter() - begun)
        self.missing.remove(variant)

    def left(self) -> float | None:
        """Seconds; variants that were not timed yet are taken to be like the others."""
        if not self.seconds:
            return None
        means = {label: sum(s) / len(s) for label, s in self.seconds.items()}
        typical = sum(means.values()) / len(means)
        return sum(means.get(label, typical) for label in self.missing)
