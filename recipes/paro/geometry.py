"""Where the image is in a sequence, and which blocks hold nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.context import AttentionCall, Grid, Span


@dataclass(frozen=True)
class Geometry:
    """Image, text and blocks of one sequence.

    Attributes:
        tokens: length of the sequence.
        grid: shape of the image or video, in tokens.
        start: its first token; 0 unless text stands first.
        block: tokens of a block, queries and keys alike.
    """

    tokens: int
    grid: Grid
    start: int
    block: int

    @classmethod
    def of(cls, call: AttentionCall, block: int) -> Geometry | str:
        """The geometry of a call, or why there is none."""
        tokens, text = call.q.shape[2], call.text if call.text else Span(0, 0)
        if tokens != call.k.shape[2]:
            return "queries and keys differ in number"
        if call.grid is None:
            return "the shape of the visual tokens is unknown"
        if call.site.kind == "joint" and call.text is None:
            return "joint attention, but where the text stands is unknown"
        if call.grid.tokens + len(text) != tokens:
            return f"{tokens} tokens are not the {call.grid.tokens} of the grid and {len(text)} of text"
        if len(text) and text.start > 0 and text.stop < tokens:
            return f"text at {text.start}-{text.stop} stands inside the image"
        found = cls(tokens, call.grid, len(text) if text.start == 0 else 0, block)
        return found if found.count > 0 else f"no block of {block} holds visual tokens only"

    @property
    def text(self) -> int:
        """Text tokens."""
        return self.tokens - self.grid.tokens

    @property
    def text_first(self) -> bool:
        """Whether text stands before the image."""
        return self.start > 0

    @property
    def total(self) -> int:
        """Blocks of the whole sequence, text and the ragged last one included."""
        return -(-self.tokens // self.block)

    @property
    def first(self) -> int:
        """The first block without text."""
        return -(-self.start // self.block)

    @property
    def last(self) -> int:
        """Behind the last whole block without text: what comes is text, or the ragged end."""
        return (self.start + self.grid.tokens) // self.block

    @property
    def count(self) -> int:
        """Blocks that hold nothing but image: the side of a mask."""
        return self.last - self.first

    @property
    def span(self) -> slice:
        """The tokens of these blocks."""
        return slice(self.first * self.block, self.last * self.block)
