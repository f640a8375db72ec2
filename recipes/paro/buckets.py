"""Time buckets: which mask a step uses. Early buckets have their own, later ones share the last (arXiv 2506.16054)."""

from __future__ import annotations

import math

from patchkit.errors import InvalidOption


def bucket_of(step: int, total: int, buckets: int) -> int:
    """The bucket of a step of ``total``, both from 0: the first step is in bucket 0, the last in the last one."""
    return max(0, min(buckets - 1, step * buckets // max(1, total)))


def mask_numbers(buckets: int, share_from: float) -> tuple[int, ...]:
    """The number of its mask for each bucket: 10 buckets shared from 0.5 on have the masks 0 1 2 3 4 5 5 5 5 5."""
    if buckets < 1:
        raise InvalidOption(f"{buckets} buckets", "calibrate, option 'buckets'", "give 1 or more")
    if not 0 <= share_from <= 1:
        raise InvalidOption(f"{share_from} is no share", "calibrate, option 'share_from'", "give a number in [0, 1]")
    own = math.ceil(round(share_from * buckets, 6))
    return tuple(min(t, own) for t in range(buckets))
