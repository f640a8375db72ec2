"""What a training reads: text as rows of tokens, and which of them belong to which step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InvalidOption


@dataclass(frozen=True)
class Rows:
    """Rows of equally many tokens, read in an order that depends on the seed and the step alone.

    Attributes:
        tokens: (R, window) int64.
        seed: of the order; each pass over the rows has one of its own.
    """

    tokens: Tensor
    seed: int

    @classmethod
    def of(cls, text: str, tokenizer: Any, window: int, seed: int, where: str) -> Rows:
        """Cut a text; a beginning-of-sequence token stands before every row where the tokenizer has one."""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        start = tokenizer.bos_token_id
        own = window if start is None else window - 1
        count = len(ids) // own
        if count == 0:
            raise InvalidOption(f"the text has {len(ids)} tokens", where, f"give more than {own}, or a shorter window")
        rows = ids[: count * own].view(count, own)
        if start is not None:
            rows = torch.cat([torch.full((count, 1), start), rows], dim=1)
        return cls(rows, seed)

    def of_step(self, step: int, batch: int) -> Tensor:
        """(batch, window): the rows of a step, from 0."""
        count = len(self.tokens)
        places = range(step * batch, (step + 1) * batch)
        orders = {place // count: self._order(place // count) for place in places}
        return self.tokens[torch.stack([orders[place // count][place % count] for place in places])]

    def _order(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(len(self.tokens), generator=generator)


def split(text: str, held_out: float) -> tuple[str, str]:
    """The text that is learned from, and its end, which is not; cut at a paragraph if one is near."""
    if not held_out:
        return text, ""
    cut = round(len(text) * (1 - held_out))
    near = text.find("\n\n", cut)
    if 0 <= near - cut < len(text) * held_out / 4:
        cut = near
    return text[:cut], text[cut:].lstrip()
