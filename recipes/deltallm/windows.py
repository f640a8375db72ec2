"""Which tokens of a query's past stay exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["sliding", "block"]
SMALLEST = 16  # tokens of a sliding window that is given as a share


@dataclass(frozen=True)
class Window:
    """The exact tokens at the end of a query's past.

    Args:
        size: tokens (int), or a share of all tokens (float).
        kind: ``"sliding"``: the last ``size`` tokens, the query's own included; ``"block"``: those of the query's own
            block, the sequence being cut into blocks of ``size``, so that the first query of a block has itself only.
    """

    size: int | float
    kind: Kind

    def width(self, tokens: int) -> int:
        """W for ``tokens`` tokens. A sliding window that is a share has at least 16; one of blocks may be 0."""
        if isinstance(self.size, int):
            return self.size
        width = round(self.size * tokens)
        return max(SMALLEST, width) if self.kind == "sliding" else width

    def exact_share(self, tokens: int) -> float:
        """W / N, at most 1."""
        return min(1.0, self.width(tokens) / tokens) if tokens else 1.0


@dataclass(frozen=True)
class Border:
    """Where the packed past ends and the exact one begins, for blocks of ``chunk`` queries.

    It moves by whole chunks only, depends on positions alone (never on how the tokens were fed in), and never moves
    back. What lies between the border and a query is at least the window, and less than a window and two chunks.

    Args:
        window: what has to stay exact. A sliding window that is a share is one of the tokens up to the query.
        chunk: tokens of a chunk.
        dense: the first queries, which see everything exactly.
    """

    window: Window
    chunk: int
    dense: int = 0

    def exact_from(self, block: int, prompt: int) -> int:
        """First exact position for the queries of a block; ``prompt``: length by which a share of blocks is taken."""
        position = block * self.chunk
        if position < self.dense:
            return 0
        if self.window.kind == "sliding":
            width = self.window.width(position + 1)
            return max(0, block - -(-width // self.chunk)) * self.chunk
        width = self.window.width(prompt)
        start = position // width * width if width else position
        return start // self.chunk * self.chunk
