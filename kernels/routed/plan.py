"""Which implementation a call takes, and why."""

from __future__ import annotations

from torch import Tensor

from .. import gpu
from ..sparse.plan import Path
from .decode import heads_read
from .reference import everywhere

__all__ = ["Path", "routed_path", "triton_obstacle", "why_dense"]

# Measured on a CPU with AVX2 and one thread against torch's dense kernel (benchmarks/routed_attention.py): (pairs of
# tokens, share of the routed rows up to which computing only the active ones gains). At 2,048 tokens every call gained
# at 0.67, at 1,024 at 0.33; at 512 hardly any did.
PAYS_BELOW_SHARE = ((2048 * 2048, 0.7), (1024 * 1024, 0.4))
# One query: numbers of a key head from which a head that is left unread is worth the calls that go round it, and the
# share of the key-value heads up to which leaving the others unread gains.
ONE_QUERY_NUMBERS, ONE_QUERY_SHARE = 2048 * 64, 0.85
# The Triton kernel: unmeasured. Below 4,096 tokens a dense call is a matter of a few waves.
GPU_PAYS_FROM_PAIRS = 4096 * 4096


def routed_path(q: Tensor, k: Tensor, active: Tensor, shared: int = 0) -> Path:
    """Path that :func:`patchkit.kernels.routed_attention` takes unless it is told one.

    Args:
        q: (B, H, N, D).
        k: (B, G, M, D).
        active: (B, H, N) bool. Counted on a CPU; an accelerator is not waited for.
        shared: heads that serve every row.

    Returns:
        "dense" (all heads, times their gates), "blocked" (active rows gathered, plain torch) or "triton".
    """
    what = f"{q.shape[2]} x {k.shape[2]} tokens, D = {q.shape[-1]}, {q.dtype} on {q.device}"
    reason = why_dense(q, k, shared)
    if reason is not None:
        return Path("dense", f"{what}: {reason}", False)
    if triton_obstacle(q, k) is None:
        return Path("triton", what, True)
    if q.shape[2] == 1:
        read = float(heads_read(everywhere(active, shared), k.shape[1]).float().mean())
        if read > ONE_QUERY_SHARE:
            why = f"{read:.2f} of the key-value heads are read, too many to gain over dense"
            return Path("dense", f"{what}: {why}", False)
        return Path("blocked", f"{what}: {read:.2f} of the key-value heads are read", True)
    share = float(active[:, shared:].float().mean()) if active.numel() else 0.0
    if share > _pays_below(q, k):
        return Path("dense", f"{what}: {share:.2f} of the routed rows are active, too many to gain over dense", False)
    return Path("blocked", f"{what}: {share:.2f} of the routed rows are active", True)


def why_dense(q: Tensor, k: Tensor, shared: int = 0) -> str | None:
    """Why calls of these shapes are computed dense whatever is active, or None. Reads no tensor: it can be traced."""
    if shared >= q.shape[1]:
        return "every head is shared"
    missing = triton_obstacle(q, k)
    if missing is None:
        return "too short to gain over dense" if q.shape[2] * k.shape[2] < GPU_PAYS_FROM_PAIRS else None
    if q.device.type != "cpu":
        return f"{missing}, and gathered rows are not measured there"
    if q.shape[2] == 1 and k.shape[1] == 1:
        return "one query, and one key-value head for all query heads"
    return None if _pays_below(q, k) else "too short to gain over dense"


def _pays_below(q: Tensor, k: Tensor) -> float:
    """The share of active rows (of one row: of key-value heads) up to which a CPU gains; 0 = it never does."""
    n, m, d = q.shape[2], k.shape[2], k.shape[3]
    if n == 1:
        return ONE_QUERY_SHARE if m * d >= ONE_QUERY_NUMBERS else 0.0
    return next((share for least, share in PAYS_BELOW_SHARE if n * m >= least), 0.0)


def triton_obstacle(q: Tensor, k: Tensor) -> str | None:
    """Why the Triton kernel does not take this call; None when it does. Reads no tensor."""
    missing = gpu.obstacle(q.device)
    if missing is None:
        from .triton.table import unsupported

        missing = unsupported(q, k)
    return missing
