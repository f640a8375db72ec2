"""The selection grammar: which modules, which layers and heads, which steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from patchkit.errors import InvalidOption

_PART = re.compile(r"^\s*(-?\d+)\s*(?:(-)\s*(-?\d+)?)?\s*$")
_SLICE = re.compile(r"^\s*(-?\d+)?\s*:\s*(-?\d+)?\s*$")


@dataclass(frozen=True)
class Indices:
    """Numbers and ranges such as ``"0,5-10,-1"``: ends included, negative numbers count from the end.

    ``"2:-1"`` is a slice as Python's, its end not included: all but the first two and the last.
    """

    parts: tuple[tuple[int, int | None], ...] | None  # None = all

    @classmethod
    def parse(cls, text: str | int | Sequence[int] | None, where: str) -> Indices:
        """Read the grammar; raises :class:`InvalidOption`."""
        if text is None:
            return cls(None)
        if isinstance(text, int):
            return cls(((text, text),))
        if not isinstance(text, str):
            return cls(tuple((int(i), int(i)) for i in text))
        parts: list[tuple[int, int | None]] = []
        for piece in text.split(","):
            cut = _SLICE.match(piece)
            if cut:
                parts.append(_slice(cut, where))
                continue
            match = _PART.match(piece)
            if not match:
                raise InvalidOption(
                    f"cannot read {piece.strip()!r}",
                    where,
                    "numbers, ranges and slices, for instance '0,5-10,-1', '5-' or '2:-1'",
                )
            start = int(match[1])
            stop = start if match[2] is None else (int(match[3]) if match[3] is not None else None)
            if stop is not None and start >= 0 and 0 <= stop < start:
                raise InvalidOption(
                    f"the range {piece.strip()!r} runs backwards", where, "put the smaller number first"
                )
            parts.append((start, stop))
        return cls(tuple(parts))

    def resolve(self, count: int) -> frozenset[int]:
        """The selected numbers out of 0 .. count-1; those outside are left out."""
        if self.parts is None:
            return frozenset(range(count))
        chosen: set[int] = set()
        for start, stop in self.parts:
            low = start + count if start < 0 else start
            high = count - 1 if stop is None else (stop + count if stop < 0 else stop)
            chosen.update(range(max(low, 0), min(high, count - 1) + 1))
        return frozenset(chosen)

    def beyond(self, count: int) -> list[str]:
        """The parts that select nothing out of 0 .. count-1, as they may have been written."""
        found = []
        for start, stop in self.parts or ():
            if Indices(((start, stop),)).resolve(count):
                continue
            if stop is not None and stop < 0 <= start:
                found.append(f"{start}:{'' if stop == -1 else stop + 1}")
            else:
                found.append(str(start) if start == stop else f"{start}-{'' if stop is None else stop}")
        return found


def _slice(cut: re.Match[str], where: str) -> tuple[int, int | None]:
    start, end = int(cut[1] or 0), None if cut[2] is None else int(cut[2])
    if end == 0 or (end is not None and 0 <= end <= start):
        raise InvalidOption(f"the slice {cut[0].strip()!r} is empty", where, "put the smaller number first")
    return start, None if end is None else end - 1


@dataclass(frozen=True)
class StepWindow:
    """Steps from ``start`` up to, but without, ``stop``; as fractions of the run or as step numbers."""

    start: int | float
    stop: int | float
    always: bool = False

    @classmethod
    def parse(cls, steps: tuple[int | float, int | float] | None, where: str) -> StepWindow:
        """Read ``(start, stop)``; raises :class:`InvalidOption`."""
        if steps is None:
            return cls(0.0, 1.0, always=True)
        start, stop = steps
        if isinstance(start, float) and stop == 1:
            stop = 1.0  # (0.2, 1) means up to the end, not up to the second step
        for value in (start, stop):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise InvalidOption(f"{value} is no step", where, "fractions in [0, 1] (floats) or step numbers (ints)")
        if isinstance(start, float) == isinstance(stop, float) and stop <= start:
            raise InvalidOption(f"the window {steps} is empty", where, "put the earlier step first")
        return cls(start, stop)

    def contains(self, step: int | None, total: int | None) -> bool:
        """Whether ``step`` of ``total`` lies in the window. Without a clock only the full window contains it."""
        if self.always:
            return True
        if step is None:
            return False
        return self._number(self.start, total) <= step < self._number(self.stop, total)

    @staticmethod
    def _number(value: int | float, total: int | None) -> float:
        if isinstance(value, float):
            return round(value * total, 6) if total else (0.0 if value <= 0 else float("inf"))
        return value

    def overlaps(self, other: StepWindow) -> bool:
        """Whether some step of some run lies in both; windows in different units are taken to overlap."""
        if self.always or other.always:
            return True
        if isinstance(self.start, float) != isinstance(other.start, float):
            return True
        return self.start < other.stop and other.start < self.stop


def matches(name: str, pattern: str | Sequence[str] | None) -> bool:
    """peft's rule: a list matches the name or an ending after a dot, a string is a regular expression for all of it."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise InvalidOption(f"{pattern!r} is not a regular expression: {error}", "targets or exclude") from None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)
