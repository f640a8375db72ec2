"""What the query rows of a sample see, brought to its simplest form: a prefix of the keys that anybody sees.

Causality and padding, alone or together, become one number a row. That is what makes padding cheap: hidden keys are not
read, and no mask is looked at but where a chunk of rows meets its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """What the rows of one sample see.

    Args:
        keys: the keys that at least one row sees; a slice where they lie together.
        count: how many these are.
        ends: (N,) int64: row i sees the first ``ends[i]`` of them.
        pairs: None, or (N, count) bool where that is not all: then ``ends`` is behind the last key that a row sees.
    """

    keys: slice | Tensor
    count: int
    ends: Tensor
    pairs: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The seen rows of (..., M, D); a view where they lie together."""
        return x[..., self.keys, :] if isinstance(self.keys, slice) else x.index_select(-2, self.keys)

    def stair(self) -> tuple[int, int, int] | None:
        """(c, s, n) when row i sees c + clamp(i + 1 - s, 0, n) keys: all rows c keys, and n of them a causal square.

        Plain attention is (count, 0, 0), causal attention over its own tokens (0, 0, N). None for any other form.
        """
        if self.pairs is not None or not len(self.ends):
            return None
        if bool((self.ends == self.ends[0]).all()):
            return int(self.ends[0]), 0, 0
        up = self.ends.diff()
        (rising,) = (up == 1).nonzero(as_tuple=True)
        if not bool(((up == 0) | (up == 1)).all()) or int(rising[-1] - rising[0]) + 1 != len(rising):
            return None
        s, low = int(rising[0]) + 1, int(self.ends[0])
        if s == 1 and low > 0:  # the first row already stands on the first step
            s, low = 0, low - 1
        return low, s, int(self.ends[-1]) - low


def sights_of(batch: int, n: int, m: int, causal: bool, mask: Tensor | None, device: torch.device) -> list[Sight]:
    """One for each sample; samples under the same mask share one. Reads the mask.

    Args:
        batch: samples.
        n: query rows.
        m: keys.
        causal: whether row i sees no key behind m - n + i.
        mask: bool, broadcastable to (batch, 1, n, m), True = may be seen.
        device: where the rows are.
    """
    if mask is None:
        return [_sight(n, m, causal, None, device)] * batch
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask.expand(*mask.shape[:-1], m)
    if mask.shape[0] == 1:
        return [_sight(n, m, causal, mask[0, 0], device)] * batch
    return [_sight(n, m, causal, mask[b, 0], device) for b in range(batch)]


def _sight(n: int, m: int, causal: bool, mask: Tensor | None, device: torch.device) -> Sight:
    """``mask`` is (1 or n, m)."""
    last = torch.full((n,), m, device=device)
    if causal:
        last = (torch.arange(n, device=device) + (m - n + 1)).clamp_(0, m)
    if mask is None:
        return Sight(slice(0, m), m, last)
    if mask.shape[0] == 1:
        keys, count = _seen(mask[0])
        before = torch.nn.functional.pad(mask[0].cumsum(0), (1, 0))
        return Sight(keys, count, before[last])
    pairs = mask & (torch.arange(m, device=device) < last.unsqueeze(-1)) if causal else mask
    keys, count = _seen(pairs.any(0))
    pairs = pairs[:, keys]
    ends = pairs.sum(-1)
    place = torch.arange(count, device=device)
    if torch.equal(pairs, place < ends.unsqueeze(-1)):
        return Sight(keys, count, ends)
    return Sight(keys, count, (pairs * (place + 1)).amax(-1), pairs)


def _seen(keys: Tensor) -> tuple[slice | Tensor, int]:
    """Where a (m,) bool is True, and how often."""
    (at,) = keys.nonzero(as_tuple=True)
    if not len(at):
        return slice(0, 0), 0
    first, last = int(at[0]), int(at[-1]) + 1
    return (slice(first, last) if last - first == len(at) else at), len(at)
