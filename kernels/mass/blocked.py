"""Block mass in plain torch: tiles of logits that are reduced at once. Memory O(tile), one matmul and one exp2."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..threads import for_each
from .reference import EXPONENT_LIMIT

LOG2E = math.log2(math.e)
# Tile of logits: as many rows as keep the matmul near its peak, times 1024 keys to stay in the cache.
TILE_Q, TILE_K = 512, 1024
# An accelerator wants larger launches.
DEVICE_TILE_Q, DEVICE_TILE_K = 1024, 8192
# With every logit (base 2) and every LSE within this bound, exp2(logit) and exp2(-LSE) are both far from the limits of
# fp32 and may be multiplied after the sum over a block's rows, which saves a pass over the tile.
SAFE_EXPONENT = 50.0


def block_mass_blocked(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    kv_lens: Tensor | None,
    row_sum: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`patchkit.kernels.block_mass`; the row sums are an empty tensor unless ``row_sum``."""
    B, H, q_len, _ = q.shape
    group, kv_len = H // k.shape[1], k.shape[2]
    W = q.new_zeros(B, H, -(-q_len // block_q), -(-kv_len // block_k), dtype=torch.float32)
    sums = q.new_zeros((B, H, q_len) if row_sum else (0,), dtype=torch.float32)
    tile_q, tile_k = (TILE_Q, TILE_K) if q.device.type == "cpu" else (DEVICE_TILE_Q, DEVICE_TILE_K)
    step_q, step_k = max(1, tile_q // block_q) * block_q, max(1, tile_k // block_k) * block_k
    lens = [kv_len] * B if kv_lens is None else [int(n) for n in kv_lens.tolist()]
    longest = {(b, g): longest_key(k[b, g, : lens[b]]) for b in range(B) for g in range(k.shape[1])}

    def make_worker() -> Callable[[tuple[int, int, int]], None]:
        buffer = torch.empty(min(step_q, q_len) * min(step_k, kv_len), dtype=torch.float32, device=q.device)

        def work(at: tuple[int, int, int]) -> None:
            b, h, start = at
            rows = slice(start, min(q_len, start + step_q))
            band = Band(q[b, h, rows], lse[b, h, rows], scale, block_q, block_k, buffer, step_k, row_sum)
            total, per_row = band.run(k[b, h // group, : lens[b]], longest[b, h // group])
            W[b, h, start // block_q : -(-rows.stop // block_q), : total.shape[1]] = total
            if per_row is not None:
                sums[b, h, rows] = per_row

        return work

    bands = [(b, h, start) for b in range(B) for h in range(H) for start in range(0, q_len, step_q)]
    for_each(bands, make_worker, q.device)
    return W, sums


def longest_key(keys: Tensor) -> float:
    """Largest norm among keys (n, D), NaN if one of them is; 0 without keys."""
    return float(torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).amax()) if keys.shape[0] else 0.0


class Band:
    """One band of query rows q (r, D) against all keys, tile by tile."""

    def __init__(
        self,
        q: Tensor,
        lse: Tensor,
        scale: float,
        block_q: int,
        block_k: int,
        buffer: Tensor,
        step_k: int,
        row_sum: bool,
    ) -> None:
        self.q = q.float() * (scale * LOG2E)
        # Rows without keys have LSE -inf; they count as 0, not as exp(+inf).
        shift = lse.float() * -LOG2E
        self.shift = shift.masked_fill(shift == float("inf"), float("-inf"))
        self.block_q, self.block_k, self.step_k = block_q, block_k, step_k
        self.buffer, self.row_sum = buffer, row_sum

    def run(self, keys: Tensor, longest: float) -> tuple[Tensor, Tensor | None]:
        """Masses (blocks of rows, blocks of keys) and the row sums (r,); ``longest`` is the largest key norm."""
        bound = float(self.q.norm(dim=-1).amax()) * longest
        reach = float(self.shift.masked_fill(self.shift == float("-inf"), 0.0).abs().amax())
        # NaN compares false and so takes the direct way as well.
        mode = "scaled" if bound <= SAFE_EXPONENT and reach <= SAFE_EXPONENT else "direct"
        total, per_row = self._pass(keys, mode)
        # The exponent limit matters for a stale LSE only, so it is not a pass over every tile: an element beyond the
        # limit makes its block sum exceed it too, and only then the band is computed again with the clamp.
        if not bool((total <= math.exp(EXPONENT_LIMIT)).all()):
            total, per_row = self._pass(keys, "clamped")
        return total, per_row

    def _pass(self, keys: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
        n = keys.shape[0]
        r = self.q.shape[0]
        columns = torch.zeros(-(-r // self.block_q), n, dtype=torch.float32, device=keys.device)
        per_row = torch.zeros(r, dtype=torch.float32, device=keys.device) if self.row_sum else None
        weight = self.shift.exp2() if mode == "scaled" else None
        for left in range(0, n, self.step_k):
            part = keys[left : left + self.step_k].float()
            tile = self.buffer[: r * part.shape[0]].view(r, -1)
            if weight is not None:
                torch.mm(self.q, part.t(), out=tile)
            else:
                tile.copy_(self.shift.unsqueeze(-1).expand_as(tile))
                torch.addmm(tile, self.q, part.t(), out=tile)
            if mode == "clamped":
                tile.clamp_(max=EXPONENT_LIMIT * LOG2E)
            tile.exp2_()
            columns[:, left : left + self.step_k] = self._rows(tile, weight)
            if per_row is not None:
                per_row += tile.sum(-1) if weight is None else tile.sum(-1) * weight
        blocks = F.pad(columns, (0, -n % self.block_k)).unflatten(-1, (-1, self.block_k)).sum(-1)
        return blocks, per_row

    def _rows(self, tile: Tensor, weight: Tensor | None) -> Tensor:
        """(Weighted) sum over the rows of each query block: (r, c) to (ceil(r / block_q), c)."""
        r, c = tile.shape
        weight = torch.ones_like(self.shift) if weight is None else weight
        whole = r // self.block_q * self.block_q
        parts = []
        if whole:
            parts.append(torch.bmm(weight[:whole].view(-1, 1, self.block_q), tile[:whole].view(-1, self.block_q, c)))
        if whole < r:
            parts.append(weight[whole:].view(1, 1, -1) @ tile[whole:].unsqueeze(0))
        return torch.cat(parts).squeeze(1)
