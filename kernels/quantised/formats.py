"""Which numbers quantised attention multiplies, and how they are rounded.

PAROAttention (arXiv 2506.16054) and SageAttention (arXiv 2410.02367, 2411.10958): Q in groups of 32 tokens, K in blocks
of 64 tokens less its mean over all tokens, P in blocks of 64 x 64 (or by row of such a block), V by channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import value_error
from ..reorder.orders import Grid, check_codes

WHERE = "quantised_attention"
LOG2E, LN2 = math.log2(math.e), math.log(2)
Q_GROUP, K_GROUP, P_ROWS = 32, 64, 64  # tokens; smaller where the layout's blocks are
LARGEST = {"int8": 127.0, "int4": 7.0}
LARGEST_FP8 = 448.0  # e4m3
# Below this a group counts as zero: its scale must not be 0, and what it holds is lost in fp32 anyway.
FLOOR = 1e-20

QK = Literal["none", "int8", "int4"]
PV = Literal["none", "int8", "int4", "fp8"]
Scale = Literal["block", "row", "static"]


@dataclass(frozen=True)
class Format:
    """How the two products are rounded.

    Args:
        qk: numbers of Q and K; ``"none"``: as they come.
        pv: numbers of P and V. INT4 has 4-bit values in 8-bit products: the rounding is that of INT4, the speed is not.
        smooth_k: take the mean over tokens off K, which shifts each row of logits by a constant: softmax forgets it.
        smooth_v: take the mean over tokens off V and add it to the output again.
        p_scale: a scale for each block of P, for each row of it, or 1 / 127 always (an ablation: it rounds rows whose
            maximum lies elsewhere to nothing). Without meaning for ``"none"`` and ``"fp8"``.
    """

    qk: QK = "int8"
    pv: PV = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    p_scale: Scale = "block"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("qk", self.qk, ("none", "int8", "int4")),
            ("pv", self.pv, ("none", "int8", "int4", "fp8")),
            ("p_scale", self.p_scale, ("block", "row", "static")),
        ):
            if value not in known:
                raise value_error(f"{name} is {value!r}", WHERE, f"Use one of {', '.join(known)}.")

    @property
    def smooths_k(self) -> bool:
        """Whether the mean really leaves K: nothing is gained where it is not rounded."""
        return self.smooth_k and self.qk != "none"

    @property
    def smooths_v(self) -> bool:
        """Whether the mean really leaves V."""
        return self.smooth_v and self.pv != "none"


class Reorder(NamedTuple):
    """An order of the visual tokens for each query head; see :func:`patchkit.kernels.reorder_heads`."""

    codes: tuple[int, ...]
    grid: Grid
    start: int = 0

    def checked(self, heads: int, tokens: int) -> Reorder:
        """Itself, if it fits to a call; raises KernelValueError."""
        check_codes(self.codes, self.grid)
        size = self.grid[0] * self.grid[1] * self.grid[2]
        if len(self.codes) != heads or self.start < 0 or self.start + size > tokens:
            raise value_error(
                f"{len(self.codes)} orders of a grid {self.grid} at {self.start} for {heads} heads, {tokens} tokens",
                WHERE,
                "Give one code for each query head, and a grid that lies in the sequence.",
            )
        return self


def scale_of(largest: Tensor, top: float) -> Tensor:
    """The step of a group whose largest magnitude is ``largest``; never 0."""
    return largest.clamp(min=FLOOR) / top


def rounded(x: Tensor, scale: Tensor | float, top: float) -> Tensor:
    """x / scale to the nearest integer (halves up, as the kernels round) within -top .. top; fp32."""
    return (x / scale + 0.5).floor().clamp(-top, top)


def fp8(x: Tensor) -> Tensor:
    """Rounded to e4m3, in fp32."""
    return x.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).float()


def top_of(pv: str) -> float:
    """The largest number of a format of values."""
    return LARGEST_FP8 if pv == "fp8" else LARGEST[pv]
