"""BlockLayout: which key blocks each block of queries attends to.

The index-list form (kept blocks, not a mask) is what block-sparse kernels loop over. Source of the use case: AdaSpa,
arXiv 2502.21079; the same object serves static layouts, windows, segment masks and head routing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .constructors import Constructors
from .recall import remember
from .rules import ElementRule, unpack_bits

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockLayout(Constructors):
    """Kept blocks of an attention pattern, per sample, head and query block. Immutable; build it with a constructor.

    Leading dimensions B' and H' are 1 (shared) or the real batch / number of query heads. Nq = ceil(q_len / block_q),
    Nk = ceil(kv_len / block_k).

    Args:
        block_q: query rows per block.
        block_k: keys per block.
        q_len: number of queries (the last block may be ragged).
        kv_len: number of keys (the last block may be ragged).
        kv_idx: (B', H', Nq, Kmax) int16 or int32, the FULL blocks of each row, ascending and unique; entries past
            ``kv_num`` are ignored. int16 where Nk allows it: it halves the memory of a cached layout.
        kv_num: (B', H', Nq) int32. A row with ``kv_num == number of valid key blocks`` is complete: its list is
            implicit and not read, so Kmax does not grow to Nk because a few (text) rows attend to everything.
        part_idx: (B', H', Nq, Pmax), the PARTIAL blocks: computed with the element rule below. None if there are none.
        part_num: (B', H', Nq) int32.
        part_bits: (B', H', Nq, Pmax, block_q, ceil(block_k / 64)) int64 row bits of the partial blocks, or None.
        causal_offset: partial blocks keep key n for query i iff ``n <= i + causal_offset``; None for no diagonal.
        q_seg: (q_len,) or (B, q_len) segment ids; partial blocks keep equal, non-negative ids. With ``kv_seg``.
        kv_seg: (kv_len,) or (B, kv_len) segment ids.
        kv_lens: (B,) int32 valid keys of each sample (right padding), or None. Blocks past it are never listed.

    Several element rules together mean their conjunction.
    """

    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    kv_idx: Tensor
    kv_num: Tensor
    part_idx: Tensor | None = None
    part_num: Tensor | None = None
    part_bits: Tensor | None = None
    causal_offset: int | None = None
    q_seg: Tensor | None = None
    kv_seg: Tensor | None = None
    kv_lens: Tensor | None = None

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def n_q(self) -> int:
        """Number of query blocks Nq."""
        return -(-self.q_len // self.block_q)

    @property
    def n_k(self) -> int:
        """Number of key blocks Nk."""
        return -(-self.kv_len // self.block_k)

    @property
    def batch(self) -> int:
        """B': 1, or the batch size."""
        return self.kv_num.shape[0]

    @property
    def heads(self) -> int:
        """H': 1, or the number of query heads."""
        return self.kv_num.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the index lists."""
        return self.kv_num.device

    @property
    def part_mask(self) -> str:
        """Kind of the element rule of partial blocks: "none", or "causal", "segments", "bits" joined by "+"."""
        kinds = [("causal", self.causal_offset), ("segments", self.q_seg), ("bits", self.part_bits)]
        return "+".join(name for name, value in kinds if value is not None) or "none"

    @property
    def rule(self) -> ElementRule:
        """The element rule without the stored bits."""
        return ElementRule(self.causal_offset, self.q_seg, self.kv_seg)

    @cached_property
    def valid_blocks(self) -> Tensor:
        """(B', 1, 1) int32: key blocks a complete row of that sample has."""
        if self.kv_lens is None:
            return torch.full((1, 1, 1), self.n_k, dtype=torch.int32, device=self.device)
        blocks = (self.kv_lens + self.block_k - 1) // self.block_k
        if self.batch == 1:
            blocks = blocks.amax().reshape(1)
        return blocks.to(torch.int32).view(-1, 1, 1)

    @cached_property
    def listed(self) -> Tensor:
        """(B', H', Nq) int32: blocks computed in each row, full and partial."""
        return self.kv_num if self.part_num is None else self.kv_num + self.part_num

    @cached_property
    def order(self) -> Tensor:
        """(B' * H' * Nq,) int32 launch order of the flattened rows, longest first; equal rows keep their order."""
        return torch.sort(self.listed.flatten(), descending=True, stable=True).indices.to(torch.int32)

    # -- figures -------------------------------------------------------------------------------------------------

    def density(self) -> float:
        """Share of all blocks that are computed (partial blocks count whole), mean over samples and heads."""
        return float(self.listed.sum(dtype=torch.int64)) / max(1, self.listed.numel() * self.n_k)

    def nbytes(self) -> int:
        """Bytes held by the tensors of this layout."""
        return sum(x.numel() * x.element_size() for x in self._tensors().values())

    def flops(self, D: int, batch: int | None = None, heads: int | None = None) -> int:
        """Multiply-add FLOPs (2 per pair and matmul, two matmuls) of one attention call with head size ``D``.

        ``batch`` and ``heads`` are the real sizes where the layout is shared; they default to B' and H'.
        """
        share = ((batch or self.batch) // self.batch) * ((heads or self.heads) // self.heads)
        return 4 * D * self.block_q * self.block_k * int(self.listed.sum(dtype=torch.int64)) * share

    def kept_mass(self, W: Tensor) -> Tensor:
        """Recall of the layout: share of the block masses ``W`` (B, H, Nq, Nk) it keeps, (B, H) fp32."""
        from .convert import kept_mass

        return kept_mass(self, W)

    # -- conversions ---------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its tensors on ``device``; itself where they are there already."""
        wanted = torch.device(device)
        if wanted.type == self.device.type and wanted.index in (None, self.device.index):
            return self
        moved: dict[str, Any] = {name: x.to(device) for name, x in self._tensors().items()}
        return self._like(dataclasses.replace(self, **moved))

    def to_bool(self) -> Tensor:
        """(B', H', Nq, Nk) bool: blocks that are computed, full or partial."""
        from .convert import to_bool

        return to_bool(self)

    def to_bits(self) -> Tensor:
        """:meth:`to_bool` packed along the keys into int64 words, for storage; :meth:`from_bits` reads it back."""
        from .rules import pack_bits

        return pack_bits(self.to_bool())

    def element_mask(self) -> Tensor:
        """(B', H', q_len, kv_len) bool: the pairs that attend. Quadratic; for tests and short sequences."""
        from .convert import element_mask

        return element_mask(self)

    def to_flex(self) -> BlockMask:
        """The same pattern as a FlexAttention ``BlockMask`` (usable as oracle and fall-back)."""
        from .flex import to_flex

        return to_flex(self)

    def partial_bits(self, b: int, h: int, rows: Tensor) -> Tensor | None:
        """Bool (R, Pmax, block_q, block_k) stored bits of rows ``rows`` (R,) of one (sample, head), or None."""
        if self.part_bits is None:
            return None
        words = self.part_bits[b if self.batch > 1 else 0, h if self.heads > 1 else 0].index_select(0, rows)
        return unpack_bits(words, self.block_k)

    def validate(self) -> BlockLayout:
        """Check the layout against itself and return it.

        Raises:
            LayoutError: sizes that contradict each other, indices out of range, not ascending, or listed twice.
        """
        from .check import check_layout

        if not self.__dict__.get("_checked", False):
            check_layout(self)
            self.__dict__["_checked"] = True
        remember(self)  # every time: a copy that shares lists may have been used in between
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: the lists, to be checked again by who uses them, and nothing that was derived."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def assured(self) -> BlockLayout:
        """For lists that are right by construction: :meth:`validate` on a CPU; elsewhere their maker's word is taken.

        Reading the lists of an accelerator back would make the host wait for it.
        """
        if self.device.type == "cpu":
            return self.validate()
        self.__dict__["_checked"] = True
        remember(self)
        return self

    def derived(self, key: Hashable, build: Callable[[], T]) -> T:
        """What ``build`` returns, made once and kept with this layout: schedules, transposed lists, groupings.

        A layout lives for many calls, so whatever an implementation needs beyond its lists is made at the first one.
        """
        kept = self.__dict__.setdefault("_derived", {})
        if key not in kept:
            kept[key] = build()
        return kept[key]  # type: ignore[no-any-return]

    # -- internals -----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def _like(self, other: BlockLayout) -> BlockLayout:
        """Carry the 'already validated' note over to a copy."""
        if self.__dict__.get("_checked", False):
            other.__dict__["_checked"] = True
            remember(other)
        return other
