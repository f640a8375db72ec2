"""What is known of each token of a language model's sequence: whether it is visual, and whether it is one at all.

Prompts tell it once: decode calls hold nothing but the new ids. So it is read off each call of the model and kept for
the sequence. Boolean masks throughout: tiles of one picture may have text between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchkit.masks import NOTHING_LEFT

_MARKERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_VISUAL_KINDS = (1, 2)  # mm_token_type_ids: image and video; 3 is sound


class Keys(NamedTuple):
    """The tokens as the keys of one attention call.

    Attributes:
        visual: (B, Nk) bool; None if it cannot be known.
        real: (B, Nk) bool, False = padding or an empty slot of the cache; None if it cannot be known.
        first: number of the key of the first query.
        dropped: tokens before the first key.
    """

    visual: Tensor | None
    real: Tensor | None
    first: int
    dropped: int


class Tokens:
    """The tokens of one sequence (a batch of them), as far as calls of the model have told."""

    def __init__(self) -> None:
        self._visual: Tensor | None = None  # (B, length)
        self._real: Tensor | None = None
        self._length = 0
        self._new = 0
        self._keys: dict[tuple[int, torch.device], Keys] = {}

    def take(self, model: Any, inputs: dict[str, Any], past: int) -> None:
        """A call of ``model`` with ``inputs`` begins, after ``past`` tokens."""
        given = inputs.get("input_ids")
        given = inputs.get("inputs_embeds") if given is None else given
        self._keys.clear()
        if not isinstance(given, Tensor):
            self._visual, self._real, self._length, self._new = None, None, 0, 0
            return
        batch, self._new = given.shape[:2]
        visual = _visual(model, inputs, batch, self._new, given.device)
        self._visual = _joined(self._visual, visual, past, batch)
        self._length = past + self._new
        self._real = _real(inputs.get("attention_mask"), batch, self._length, given.device)

    def as_keys(self, keys: int, device: torch.device) -> Keys:
        """As an op with so many keys sees them: sliding windows drop the oldest, static caches have empty slots."""
        known = self._keys.get((keys, device))
        if known is None:
            dropped = max(0, self._length - keys)
            known = self._keys[keys, device] = Keys(
                _fitted(self._visual, dropped, keys, device),
                _fitted(self._real, dropped, keys, device),
                self._length - self._new - dropped,
                dropped,
            )
        return known


def markers(model: Any) -> list[int]:
    """Ids of the tokens in whose place a model puts what it sees."""
    return [m for name in _MARKERS if isinstance(m := getattr(model.config, name, None), int)]


def _fitted(known: Tensor | None, dropped: int, keys: int, device: torch.device) -> Tensor | None:
    if known is None:
        return None
    part = known[:, dropped : dropped + keys].to(device)
    return torch.nn.functional.pad(part, (0, keys - part.shape[1])) if part.shape[1] < keys else part


def _joined(known: Tensor | None, new: Tensor | None, past: int, batch: int) -> Tensor | None:
    """What is known of the first ``past`` tokens (a cache may have been cut back), and of the new ones."""
    if past == 0 or new is None:
        return new
    if known is None or known.shape[0] != batch or known.shape[1] < past:
        return None  # the beginning ran while nobody was listening
    return torch.cat((known[:, :past].to(new.device), new), 1)


def _visual(model: Any, inputs: dict[str, Any], batch: int, count: int, device: torch.device) -> Tensor | None:
    """(B, count) bool, or None if nothing tells."""
    if count == 1:  # a token that was decoded, whatever its id
        return torch.zeros(batch, 1, dtype=torch.bool, device=device)
    found: Tensor | None = None
    places = markers(model)
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if places and isinstance(ids, Tensor):
        found = torch.isin(ids, torch.tensor(places, device=ids.device))
    kinds = inputs.get("mm_token_type_ids")
    if isinstance(kinds, Tensor) and kinds.shape == (batch, count):
        told = torch.isin(kinds, torch.tensor(_VISUAL_KINDS, device=kinds.device)).to(device)
        found = told if found is None else found | told
    if found is None and places and isinstance(embeds, Tensor):
        rows = model.get_input_embeddings()(torch.tensor(places, device=embeds.device)).to(embeds.dtype)
        found = (embeds[:, :, None] == rows).all(-1).any(-1)
        found = found if bool(found.any()) else None  # the features may stand there already
    return found


def _real(mask: Any, batch: int, length: int, device: torch.device) -> Tensor | None:
    """(B, length) bool from whatever was given as the attention mask; None if it cannot be told."""
    if isinstance(mask, dict):  # one a kind of layer
        mask = mask.get("full_attention")
        if mask is None:
            return None
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:  # a key that no query sees is none
        seen = mask if mask.dtype == torch.bool else mask > NOTHING_LEFT
        mask = seen.flatten(1, 2).any(1)
    if mask.shape[1] < length:
        return None
    return mask[:, :length].bool().expand(batch, -1)
