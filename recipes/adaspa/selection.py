"""Which blocks each head keeps: budgets, row-wise choice, and where the text is among the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchkit.context import Span
from patchkit.kernels import row_topk

Mode = Literal["rows", "global"]


def levels(density: float) -> tuple[float, float]:
    """(low, high) densities of the heads that need few and many blocks, so that their mean is ``density``.

    The paper's (1 + s) / 2 and (3 s - 1) / 2 are d / 2 and 3 d / 2 in densities. Above 2/3 the high level would pass
    1: it is capped there and the low one raised (ours).
    """
    high = min(1.5 * density, 1.0)
    return 2 * density - high, high


def level_of(recall: Tensor, threshold: float) -> Tensor:
    """Which level each head gets from its recall (B, H) at the common density: 0 low, 1 common, 2 high.

    Of the heads above ``threshold`` there are n; the n of highest recall give blocks to the n of lowest. n is at most
    half of the heads (ours: the paper is silent there). Equal recalls: the lower head number counts as higher. A head
    without any mass (its LSE is too old to see some) has no recall and counts as the worst.
    """
    recall = recall.nan_to_num(nan=-1.0)
    heads = recall.shape[-1]
    n = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return torch.ones_like(rank).masked_fill(rank < n, 0).masked_fill(rank >= heads - n, 2)


def blocks_per_row(density: float, columns: int) -> int:
    """How many of ``columns`` key blocks a row keeps: never none, rounded half to even (ours)."""
    return min(max(1, round(density * columns)), columns)


@dataclass(frozen=True)
class Nested:
    """The best blocks of every row for each of three budgets, from one ranking: each is a part of the next.

    Attributes:
        lists: (B, h, R, k) ascending column numbers, one tensor a budget.
        kept: (B, h, 3) the mass they hold.
    """

    lists: list[Tensor]
    kept: Tensor

    @classmethod
    def of(cls, video: Tensor, ks: list[int]) -> Nested:
        """From masses (B, h, R, C) and three rising budgets. The masses are read once: the best k of a row are among
        its best k' > k, and an ascending list keeps the order by which equal masses are told apart.
        """
        columns, _ = row_topk(video, ks[-1])
        best = video.gather(-1, columns.long())
        lists, sums = [columns], [best.sum((-1, -2))]
        for k, wider in zip(ks[-2::-1], ks[:0:-1], strict=True):
            if k < wider:
                places = row_topk(best, k)[0].long()
                columns, best = columns.gather(-1, places), best.gather(-1, places)
            lists.insert(0, columns)
            sums.insert(0, best.sum((-1, -2)))
        return cls(lists, torch.stack(sums, dim=-1))


def select_lists(parts: list[Nested], level: Tensor) -> Tensor:
    """(B, H, R, k) lists of all heads, each at its level (B, H); entries past a head's own k mean nothing."""
    low, middle, lists = (torch.cat([part.lists[i] for part in parts], dim=1) for i in range(3))
    for i, narrow in ((1, middle), (0, low)):
        if narrow.shape[-1] < lists.shape[-1]:
            front = lists[..., : narrow.shape[-1]]
            front.copy_(torch.where((level == i)[..., None, None], narrow, front))
    return lists


def rank_all(mass: Tensor, keep: int) -> Tensor:
    """Numbers (B, H, keep) into the flattened blocks of a head by falling mass; equal ones by rising number."""
    return mass.flatten(-2).sort(dim=-1, descending=True, stable=True).indices[..., :keep].to(torch.int32)


def mask_of(ranked: Tensor, count: Tensor, rows: int, columns: int) -> Tensor:
    """The first ``count`` (B, H) of each head's ranking as a mask: bool (B, H, rows, columns)."""
    inside = torch.arange(ranked.shape[-1], device=ranked.device) < count[..., None]
    flat = torch.zeros(*ranked.shape[:-1], rows * columns, dtype=torch.bool, device=ranked.device)
    return flat.scatter_(-1, ranked.long(), inside).unflatten(-1, (rows, columns))


@dataclass(frozen=True)
class Choice:
    """What one search found; numbers per head are (B, H).

    Attributes:
        k: video blocks per row.
        density: the level that k was rounded from.
        recall: share of the attention mass that stays, text included.
        base_recall: the same at the common density, which decided the levels.
        columns: how many key blocks have no text.
        lists: (B, H, R, >= k) the kept ones of them in each row, ascending; k of them count. None in global mode.
        mask: bool (B, H, R, columns) the same in global mode, whose rows differ in length.
    """

    k: Tensor
    density: Tensor
    recall: Tensor
    base_recall: Tensor
    columns: int
    lists: Tensor | None = None
    mask: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Bool (B, H, R, C) over the blocks without text. As large as all masses of a layer: not made on the way."""
        if self.mask is not None:
            return self.mask
        assert self.lists is not None
        inside = torch.arange(self.lists.shape[-1], device=self.k.device) < self.k[..., None, None]
        places = self.lists.long().masked_fill(~inside, self.columns)  # a spare column for what does not count
        mask = torch.zeros(*places.shape[:-1], self.columns + 1, dtype=torch.bool, device=places.device)
        return mask.scatter_(-1, places, True)[..., : self.columns]


def choose(
    masses: Iterable[Tensor],
    geometry: Geometry,
    density: float,
    *,
    threshold: float = 0.8,
    adaptive: bool = True,
    mode: Mode = "rows",
) -> Choice:
    """Choose blocks from exact block masses.

    Args:
        masses: (B, h, Nq, Nk) for some heads after others. Only lists of the best blocks outlive each of them, so
            that W of a long video (0.3 GB a layer) is never held as a whole.
        geometry: where the text is.
        density: mean share of video blocks that a row keeps.
        threshold: recall above which a head can give blocks away.
        adaptive: whether heads get different budgets.
        mode: ``"rows"`` (every row of a head keeps as many) or ``"global"``.
    """
    (r0, r1), (c0, c1) = geometry.rows, geometry.columns
    rows, columns = r1 - r0, c1 - c0
    low, high = levels(density) if adaptive else (density, density)
    steps = (low, density, high)
    ks = [blocks_per_row(d, columns) for d in steps]
    nested: list[Nested] = []
    ranked, recalls = [], []
    for mass in masses:
        video = mass[..., r0:r1, c0:c1]
        if mode == "rows":
            nested.append(Nested.of(video, ks))
            kept = nested[-1].kept
        else:
            ranked.append(rank_all(video, ks[2] * rows))
            best = video.flatten(-2).gather(-1, ranked[-1].long())
            kept = torch.stack([best[..., : k * rows].sum(-1) for k in ks], dim=-1)
        recalls.append(_recalls(mass, video, kept))
    recall = torch.cat(recalls, dim=1)  # (B, H, 3)
    level = level_of(recall[..., 1], threshold) if adaptive else torch.ones_like(recall[..., 1], dtype=torch.long)
    k = torch.tensor(ks, device=level.device)[level]
    return Choice(
        k,
        torch.tensor(steps, device=level.device)[level],
        recall.gather(-1, level[..., None])[..., 0],
        recall[..., 1],
        columns,
        select_lists(nested, level) if mode == "rows" else None,
        mask_of(torch.cat(ranked, dim=1), k * rows, rows, columns) if mode == "global" else None,
    )


def _recalls(mass: Tensor, video: Tensor, kept: Tensor) -> Tensor:
    """(B, h, 3): the share of mass that three choices keep, with ``kept`` (B, h, 3) of the video and all text."""
    total = mass.sum((-1, -2))
    text = total - video.sum((-1, -2))
    # a ratio, so that a stale LSE, which scales every row's mass, leaves it meaningful
    return ((kept + text[..., None]) / total[..., None]).clamp(max=1.0)


@dataclass(frozen=True)
class Geometry:
    """Where video and text are among the blocks of one sequence.

    Queries keep the model's order. Keys do as well, unless text stands first and is padded: then they are rolled so
    that the text, and with it the padding, comes last, and one length per sample says what is real.

    Attributes:
        tokens: length of the sequence.
        block: (query block, key block).
        rows: first and last (exclusive) query block without text.
        columns: the same of the key blocks.
        lengths: real keys per sample, None if all are.
        shift: by how many tokens keys are rolled to the left.
    """

    tokens: int
    block: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    lengths: tuple[int, ...] | None = None
    shift: int = 0

    @classmethod
    def of(cls, tokens: int, block: tuple[int, int], text: Span | None, valid: Tensor | None) -> Geometry | str:
        """The geometry of a sequence, or why there is none that AdaSpa can use.

        Args:
            tokens: length of the sequence.
            block: (query block, key block).
            text: where the text is.
            valid: (B, tokens) bool, the keys that are no padding.
        """
        if text is not None and len(text) == 0:
            text = None
        if text is not None and text.start > 0 and text.stop < tokens:
            return f"text at {text.start}-{text.stop} stands inside the video"
        first = text is not None and text.start == 0
        words = len(text) if text is not None else 0
        lengths, shift = None, 0
        if valid is not None:
            found = _lengths(valid, words if first else 0)
            if found is None:
                return "mask hides keys between others"
            lengths = found if min(found) < tokens else None
            if lengths is not None:
                shift = words if first else 0
                if min(lengths) < tokens - words:
                    return "mask hides video tokens"
        rows = _free(tokens, block[0], words, first)
        columns = _free(tokens, block[1], words, first and not shift)
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            return f"no block of {block} is free of text"
        return cls(tokens, block, rows, columns, lengths, shift)

    @property
    def counts(self) -> tuple[int, int]:
        """Query and key blocks of the whole sequence."""
        return -(-self.tokens // self.block[0]), -(-self.tokens // self.block[1])

    def with_text(self, video: Tensor) -> Tensor:
        """A mask over video blocks (B, H, R, C) as one over all blocks: those that touch text are kept."""
        batch, heads = video.shape[:2]
        mask = torch.ones(batch, heads, *self.counts, dtype=torch.bool, device=video.device)
        mask[..., self.rows[0] : self.rows[1], self.columns[0] : self.columns[1]] = video
        return mask


def _lengths(valid: Tensor, shift: int) -> tuple[int, ...] | None:
    """Real keys per sample if, after a roll by ``shift``, they all stand before the padding; else None."""
    valid = valid.roll(-shift, -1)
    counts = valid.sum(-1)
    places = torch.arange(valid.shape[-1], device=valid.device)
    whole = (valid == (places < counts[:, None])).all()
    *lengths, whole_too = torch.cat([counts, whole[None].to(counts.dtype)]).tolist()  # one wait for the device
    return tuple(lengths) if whole_too else None


def _free(tokens: int, block: int, words: int, first: bool) -> tuple[int, int]:
    """First and last (exclusive) block without any of ``words`` text tokens."""
    total = -(-tokens // block)
    if words == 0:
        return 0, total
    return (-(-words // block), total) if first else (0, (tokens - words) // block)
