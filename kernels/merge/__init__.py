"""Exact union of two attention results over disjoint key sets."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets into attention over their union, exactly.

    Args:
        o1: (..., q_len, D) normalised output over the first key set, any float dtype.
        lse1: (..., q_len) natural-log sum of exponentials of the scaled logits, fp32; -inf where the set is empty.
        o2: output over the second key set, same shape as ``o1``.
        lse2: its log-sum-exp.

    Returns:
        The output in ``o1``'s dtype and the fp32 log-sum-exp. Rows empty in both sets are 0 and -inf. Gradients reach
        all four inputs; that of an LSE of -inf is 0.
    """
    top = torch.maximum(lse1, lse2)
    empty = top == float("-inf")
    # A common factor of both weights, which the result does not depend on: a constant to autograd.
    safe = top.masked_fill(empty, 0.0).detach()
    w1, w2 = torch.exp(lse1 - safe), torch.exp(lse2 - safe)
    total = (w1 + w2).masked_fill(empty, 1.0)
    lse = (torch.log(total) + safe).masked_fill(empty, float("-inf"))
    share1, share2 = (w1 / total).unsqueeze(-1), (w2 / total).unsqueeze(-1)
    return (o1.float() * share1 + o2.float() * share2).to(o1.dtype), lse
