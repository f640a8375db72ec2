"""What DeltaLLM's runs are compared with, on whole sequences: their own ablations, eviction, and merging.

None of these is for use: they read the whole keys at once, and say what they would keep. ``kept`` is the mean number of
rows that a query sees, in units of the tokens it could see, so that variants can be set at equal bytes of cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.kernels import Packed
from patchkit.recipe_base import Recipe
from patchkit.recipes.deltallm import DeltaLLM
from patchkit.recipes.deltallm.windows import Border, Window
from patchkit.sites import Site

Next = Callable[[AttentionCall], Tensor]
CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Rival(Recipe):
    """One variant at the sites that runs mode takes.

    Args:
        how: ``runs`` (as the recipe), ``first value`` (a run keeps its first token's value, not the mean),
            ``no window`` (a query sees the shared keys of everything, itself included), ``merge`` (the most similar
            neighbours share mean key and mean value, without a count), ``merge, counted`` (with one), ``evict`` (first
            tokens and recent ones, as many rows as runs).
        theta: threshold a layer.
        metric: of the runs.
        window: exact tokens.
    """

    how: Literal["runs", "first value", "no window", "merge", "merge, counted", "evict"] = "runs"
    theta: list[float] = None  # type: ignore[assignment]
    metric: Literal["max", "euclidean", "cosine"] = "max"
    window: int | float = 0.05

    name: ClassVar[str] = "deltallm-rival"
    families: ClassVar[tuple[str, ...]] = ("transformers",)

    def accepts(self, site: Site) -> str | None:
        return DeltaLLM(theta=self.theta).accepts(site)

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        q, k, v, n = call.q, call.k, call.v, call.k.shape[2]
        border = Border(Window(self.window, "sliding"), CHUNK)
        exact = [border.exact_from(b, n) for b in range(-(-n // CHUNK))]
        begins = kernels.find_runs(k, self.theta[call.site.layer], metric=self.metric, chunk=CHUNK, single=4)
        seen = _rows_seen(begins, [n] * len(exact) if self.how == "no window" else exact, n)
        call.ledger.note(kept=float((seen / torch.arange(1, n + 1)).mean()), removed=1 - float(begins.float().mean()))
        if self.how == "evict":
            return _evicted(q, k, v, seen, call.scale)
        if self.how == "no window":
            return _shared_everywhere(q, k, v, begins, call.scale)
        past = exact[-1]
        merging = self.how.startswith("merge")
        if merging:
            begins = _most_similar(k, begins)
        begins = begins[:, :, :past]
        packed = kernels.pack_runs(k[:, :, :past], v[:, :, :past], begins, mean_keys=merging)
        if self.how == "first value":
            packed = packed._replace(values=_first_values(v, begins, packed))
        if self.how == "merge":
            packed = packed._replace(counts=packed.counts.clamp(max=1))
        used = torch.stack([F.pad(begins.cumsum(-1, dtype=torch.int32), (1, 0))[:, :, e] for e in exact])
        return kernels.packed_attention(q, packed, used, k, v, exact, chunk=CHUNK, first=0, scale=call.scale)


def _rows_seen(begins: Tensor, exact: list[int], n: int) -> Tensor:
    """How many rows each query reads, averaged over the heads, (N,)."""
    at = torch.arange(n)
    start = torch.tensor(exact)[at // CHUNK]
    start = start.minimum(at + 1)
    upto = F.pad(begins.float().mean((0, 1)).cumsum(-1), (1, 0))
    return upto[start] + (at - start + 1)


def _evicted(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, sinks: int = 4) -> Tensor:
    """Attention to the first tokens and to the most recent ones, ``seen`` of them together (StreamingLLM's rule)."""
    n = k.shape[2]
    at = torch.arange(n)
    out = torch.empty_like(q)
    for low in range(0, n, 256):
        rows = at[low : low + 256, None]
        keep = (at > rows - (seen[low : low + 256, None] - sinks)) | (at < sinks)
        out[:, :, low : low + 256] = F.scaled_dot_product_attention(
            q[:, :, low : low + 256], k, v, attn_mask=keep & (at <= rows), scale=scale, enable_gqa=True
        )
    return out


def _shared_everywhere(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, scale: float | None) -> Tensor:
    """The keys of the runs for every query, itself included; each token its own value, which weighs the same."""
    at = torch.arange(k.shape[2]).where(begins, torch.tensor(0)).cummax(-1).values
    shared = k.gather(2, at.unsqueeze(-1).expand(k.shape))
    return F.scaled_dot_product_attention(q, shared, v, is_causal=True, scale=scale, enable_gqa=True)


def _most_similar(k: Tensor, begins: Tensor) -> Tensor:
    """As many runs a chunk as ``begins`` has, by joining the neighbours whose keys have the highest cosines."""
    near = F.cosine_similarity(k[:, :, 1:].float(), k[:, :, :-1].float(), dim=-1)
    near = F.pad(near, (1, 0), value=-2.0)
    out = torch.zeros_like(begins)
    for low in range(0, k.shape[2], CHUNK):
        part = near[:, :, low : low + CHUNK].clone()
        part[..., 0] = -2.0
        rank = part.argsort(-1).argsort(-1)
        out[:, :, low : low + CHUNK] = rank < begins[:, :, low : low + CHUNK].sum(-1, keepdim=True)
    return out


def _first_values(v: Tensor, begins: Tensor, packed: Packed) -> Tensor:
    values = torch.zeros_like(packed.values)
    for b, h in torch.cartesian_prod(torch.arange(v.shape[0]), torch.arange(v.shape[1])).tolist():
        found = v[b, h, : begins.shape[2]][begins[b, h]]
        values[b, h, : len(found)] = found
    return values
