"""A small attention-like kernel in forms that the compile gate must tell apart: sound, spilling, not pipelined."""

from __future__ import annotations

import triton
import triton.language as tl

from patchkit.kernels.gpu import Variant


@triton.jit
def _scores(q, k, out, n, TILE: tl.constexpr, D: tl.constexpr):
    rows, keys, dims = tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, D)
    b_q = tl.load(q + rows[:, None] * D + dims[None, :])  # [TILE, D]
    acc = tl.zeros([TILE, D], tl.float32)
    for start in range(0, n, TILE):
        b_k = tl.load(k + (start + keys[:, None]) * D + dims[None, :])  # [TILE, D]
        s = tl.dot(b_q, tl.trans(b_k))
        acc += tl.dot(tl.exp2(s).to(b_k.dtype), b_k)
    tl.store(out + rows[:, None] * D + dims[None, :], acc)


TYPES = {"q": "*bf16", "k": "*bf16", "out": "*fp32", "n": "i32"}


def variants():
    return [
        Variant("sound", _scores, TYPES, {"TILE": 64, "D": 64}, num_warps=4, num_stages=2),
        Variant("huge tile", _scores, TYPES, {"TILE": 256, "D": 128}, num_warps=4, num_stages=2),
        Variant("one stage", _scores, TYPES, {"TILE": 64, "D": 64}, num_warps=4, num_stages=1),
        Variant("nonsense", _scores, TYPES, {"TILE": 48, "D": 64}),
    ]
