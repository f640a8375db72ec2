"""Which sequence a call of a language model goes on with, told by its cache, and what was kept for it.

Callers may keep several caches and take turns. What recipes know of one sequence must not pass for knowledge of
another.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from patchkit.bound import Bound


@dataclass(eq=False)
class Sequence:
    """What is kept for one cache."""

    step: int
    memory: dict[str, Any] = field(default_factory=dict)  # the adapter's
    kept: dict[Bound, tuple[dict[Any, Any], dict[Any, Any]]] = field(default_factory=dict)  # states and shared


class Sequences:
    """All sequences of one installation; they go when their caches go."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self.current = Sequence(step=-1)
        self.past = 0

    def turn_to(self, cache: Any, bounds: list[Bound]) -> bool:
        """A call with this cache begins. Returns whether it begins a sequence."""
        self.past = length_of(cache)
        found = self._find(cache) if self.past else None
        if found is not self.current:
            self.current.kept = {b: (b.states, b.shared) for b in bounds}
            # one that was begun elsewhere, or goes on in a copy of its cache: nobody here knows its beginning
            self.current = found or Sequence(step=-1)
            for bound in bounds:
                bound.states, bound.shared = self.current.kept.get(bound, ({}, {}))
            self.belongs_to(cache)
        self.current.step += 1
        return self.past == 0

    def _find(self, cache: Any) -> Sequence | None:
        try:
            return self._known.get(cache)
        except TypeError:  # cannot be hashed or referred to weakly
            return self.current

    def belongs_to(self, cache: Any) -> None:
        """The running sequence is kept in this cache: given with the call, or made by it."""
        if hasattr(cache, "get_seq_length"):
            try:
                self._known[cache] = self.current
            except TypeError:
                return

    def drop_others(self) -> None:
        """Keep nothing but the running sequence."""
        for cache, sequence in list(self._known.items()):
            if sequence is not self.current:
                del self._known[cache]


def length_of(cache: Any) -> int:
    """Tokens in a cache; 0 without one."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0  # a tensor in static caches
