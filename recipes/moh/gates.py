"""The routers: which heads each token has on, and with which gates. Everything here is computed in fp32.

Shapes: B samples, N tokens, C channels, H heads, the first h_s of them shared, E = H - h_s routed, K chosen by each
token. Heads stand before tokens, as in the op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.recipes.moh.budget import Budget

Gate = Literal["binary", "weighted"]
EVEN = 1e-4  # spread of norms, as a share of their mean, below which they count as equal


@dataclass(frozen=True)
class Gates:
    """What a router decided.

    Attributes:
        active: bool (B, H, N), the heads that are on.
        value: fp32 (B, H, N), what their outputs are multiplied with; None where it is 1 for all that are on and no
            gradient has to pass.
        scores: p, fp32 (B, E, N), the routers' probabilities of the routed heads, which sum to 1; None where no head
            is chosen, and where nothing needs them.
        straight: whether heads that are off have a gradient, too.
    """

    active: Tensor
    value: Tensor | None
    scores: Tensor | None
    straight: bool = False


@dataclass(frozen=True)
class Weights:
    """Parameters of the linear router; those that a layer has no use for are None.

    Attributes:
        shared: W_s (h_s, C).
        routed: W_r (E, C).
        stages: W_h (2, C), shared against routed.
    """

    shared: Tensor | None = None
    routed: Tensor | None = None
    stages: Tensor | None = None

    @staticmethod
    def needed(budget: Budget, gate: Gate) -> dict[str, int]:
        """Which of them a layer needs, and how many rows each has. Binary gates need only what chooses."""
        rows = {"routed": budget.routed if budget.chosen else 0}
        if gate == "weighted":
            rows["shared"] = budget.shared if budget.shared > 1 else 0
            rows["stages"] = 2 if budget.shared and budget.chosen else 0
        return {name: count for name, count in rows.items() if count}


def lengths(queries: Tensor) -> Tensor:
    """l2 norms (B, H, N) of queries (B, H, N, D) as the projection made them; RoPE does not change them."""
    return torch.linalg.vector_norm(queries, dim=-1, dtype=torch.float32)


def spread_scores(norms: Tensor) -> Tensor:
    """p (B, E, N) = softmax(n / std(n)) over the routed heads, from norms (B, E, N).

    The standard deviation is the unbiased one of each token's norms. Where they are all alike it is next to nothing, or
    for one head undefined: then a small share of their mean stands in, and p is even.
    """
    count = norms.shape[1]
    mean = norms.mean(1, keepdim=True)
    spread = (norms - mean).square().sum(1, keepdim=True) / max(count - 1, 1)
    # the floor inside the root: its gradient at 0 would be infinite
    floor = (EVEN * mean.detach()).square().clamp_min(1e-24)
    return torch.softmax((norms - mean) / torch.maximum(spread, floor).sqrt(), dim=1)


def choose(scores: Tensor, count: int) -> Tensor:
    """Bool (B, E, N), True for the ``count`` highest of (B, E, N); of equal ones, the lower head number."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def by_length(queries: Tensor, budget: Budget, gate: Gate, train: bool) -> Gates:
    """The router without parameters: a token chooses the heads whose queries are longest.

    Args:
        queries: (B, H, N, D) of the projection, before any norm.
        budget: the layer's.
        gate: ``"binary"``: heads are on or off. ``"weighted"``: routed heads weigh p, scaled to mean 1 over the chosen;
            shared ones 1.
        train: whether gradients shall pass to the router.
    """
    with torch.autocast(queries.device.type, enabled=False):
        norms = lengths(queries)[:, budget.shared :]
        chosen = choose(norms, budget.chosen)
        # binary gates need probabilities only for gradients
        scores = spread_scores(norms) if budget.chosen and (train or gate == "weighted") else None
        routed = _routed(scores, chosen, budget, gate, train)
        return _joined(chosen, routed, (None, budget.shared), None, scores, train and gate == "binary")


def by_weights(hidden: Tensor, weights: Weights, budget: Budget, gate: Gate, train: bool) -> Gates:
    """The two-stage router with parameters, scaled so that zero logits make every gate 1.

    Weighted gates are a_1 h_s softmax(W_s x) of the shared heads and a_2 K p m / sum(p m) of the routed ones, where
    p = softmax(W_r x), m says which K are highest, and (a_1, a_2) = 2 softmax(W_h x).

    Args:
        hidden: (B, N, C), the attention module's input.
        weights: the parameters that :meth:`Weights.needed` lists.
        budget: the layer's.
        gate: see above; ``"binary"``: heads are on or off, the shared ones on.
        train: whether gradients shall pass to the router.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.float()
        scores, chosen = None, None
        if weights.routed is not None:
            scores = _softmax(x, weights.routed)
            chosen = choose(scores, budget.chosen)
        else:
            empty = (hidden.shape[0], budget.routed, hidden.shape[1])
            chosen = torch.zeros(empty, dtype=torch.bool, device=hidden.device)
        routed = _routed(scores, chosen, budget, gate, train)
        shared = None if weights.shared is None else budget.shared * _softmax(x, weights.shared)
        stages = None if weights.stages is None else 2 * _softmax(x, weights.stages)
        return _joined(chosen, routed, (shared, budget.shared), stages, scores, train and gate == "binary")


def _softmax(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(W x) over the rows of W: (B, N, C) -> (B, rows, N)."""
    return torch.softmax(F.linear(x, weight.float()), dim=-1).transpose(1, 2)


def _routed(scores: Tensor | None, chosen: Tensor, budget: Budget, gate: Gate, train: bool) -> Tensor | None:
    """Gates (B, E, N) of the routed heads; None where they are ``chosen`` as numbers and no gradient has to pass."""
    if scores is None:
        return None
    if gate == "weighted":
        kept = scores * chosen
        return budget.chosen * kept / kept.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    # straight through: 0 or 1 exactly, with the gradient of p for every routed head, chosen or not
    return chosen.float() + (scores - scores.detach()) if train else None


def _joined(
    chosen: Tensor,
    routed: Tensor | None,
    shared: tuple[Tensor | None, int],
    stages: Tensor | None,
    scores: Tensor | None,
    straight: bool,
) -> Gates:
    """Shared heads first, each stage times its weight. ``shared``: their gates, None = 1, and their number."""
    first, count = shared
    size = (chosen.shape[0], count, chosen.shape[2])
    active = torch.cat([torch.ones(size, dtype=torch.bool, device=chosen.device), chosen], dim=1)
    if routed is None and first is None and stages is None:
        return Gates(active, None, scores)
    first = first if first is not None else torch.ones(size, device=chosen.device)
    second = routed if routed is not None else chosen.float()
    if stages is not None:
        first, second = stages[:, :1] * first, stages[:, 1:] * second
    value = torch.cat([first, second], dim=1)
    return Gates(active, value, scores, straight and value.requires_grad)
