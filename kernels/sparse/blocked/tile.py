"""Attention of a few query rows over keys that lie together in memory: the inner step of the blocked path."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dense.library import cpu_flash


def native_low_precision() -> bool:
    """Whether this CPU multiplies bf16/fp16 matrices in hardware (AVX-512 BF16 or AMX).

    Without such units gathered keys are widened to fp32 once and reused by both matmuls: measured 3 to 8 % faster than
    torch's emulated bf16 kernel on AVX2, and far faster than its fp16 one.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in probes)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of n independent tiles.

    Args:
        q: (n, r, D).
        k: (n, m, D).
        v: (n, m, D).
        scale: logit scale.
        bias: (n, r, m) fp32, 0 or -inf; None when every pair attends.

    Returns:
        Output (n, r, D) and natural-log LSE (n, r) fp32, -inf and 0 for rows whose bias is all -inf.
    """
    if q.device.type == "cpu":
        mask = None if bias is None else bias.unsqueeze(1).to(q.dtype)
        out, lse = cpu_flash(q[:, None], k[:, None], v[:, None], mask, scale)
        out, lse = out[:, 0], lse[:, 0]
    else:
        logits = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
        if bias is not None:
            logits += bias
        lse = torch.logsumexp(logits, -1)
        p = logits.sub_(lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp_()
        out = torch.bmm(p, v.float())
    if bias is not None:
        # torch's CPU kernel reports LSE 0 for a row without keys.
        dead = (bias == float("-inf")).all(-1)
        out, lse = out.masked_fill(dead.unsqueeze(-1), 0), lse.masked_fill(dead, float("-inf"))
    return out, lse
