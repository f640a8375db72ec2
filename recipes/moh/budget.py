"""How many heads a layer has on: which are shared, and how many of the others each token chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchkit.errors import InvalidOption

Amount = int | float  # a number of heads, or a share of them
SLACK = 1e-6  # 0.7 * 10 is 7, whatever binary fractions say


@dataclass(frozen=True)
class Budget:
    """The heads of one layer.

    Attributes:
        heads: H, all of them.
        shared: h_s, the first ones, which are on for every token.
        chosen: K, how many of the others each token chooses.
    """

    heads: int
    shared: int
    chosen: int

    @property
    def routed(self) -> int:
        """E, the heads that tokens choose from."""
        return self.heads - self.shared

    @property
    def share(self) -> float:
        """(h_s + K) / H."""
        return (self.shared + self.chosen) / self.heads

    @property
    def everything(self) -> bool:
        """Whether every head is on for every token."""
        return self.chosen == self.routed

    @classmethod
    def of(cls, heads: int, shared: Amount, active: Amount, where: str) -> Budget:
        """From the options of a layer, shares being rounded down to whole heads.

        Raises:
            InvalidOption: more heads are to be on than there are, fewer than are shared, or none.
        """
        always, on = _count(shared, heads), _count(active, heads)
        if always > heads or on > heads:
            name, many = ("shared", shared) if always > heads else ("active", active)
            raise InvalidOption(f"{name} {many} of {heads} heads", where, f"give a share, or 0 to {heads}")
        if on < always:
            raise InvalidOption(
                f"active {active} is less than shared {shared} of {heads} heads",
                where,
                "active counts the shared heads too: raise it, or lower shared",
            )
        if on == 0:
            raise InvalidOption(f"active {active} leaves none of {heads} heads on", where, "raise it")
        return cls(heads, always, on - always)


def _count(amount: Amount, heads: int) -> int:
    return math.floor(amount * heads + SLACK) if isinstance(amount, float) else amount
