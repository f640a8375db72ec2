"""The past of some samples as packed runs and exact tokens, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.errors import PatchkitError
from patchkit.kernels import Packed
from patchkit.kernels.runs import Metric
from patchkit.recipes.deltallm.windows import Border

SPARE = 32  # tokens by which a packed past can be cropped without a trace, and rows that a buffer has to spare


@dataclass(frozen=True)
class Rule:
    """What becomes a run.

    Args:
        theta: threshold at this layer.
        metric: its measure.
        sink: first tokens, which are runs of one.
        mean_keys: whether a run's key is the mean of its keys.
        border: where runs end and exact tokens begin.
    """

    theta: float
    metric: Metric
    sink: int
    mean_keys: bool
    border: Border

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.border.chunk


@dataclass
class Past:
    """What is kept of the tokens of those samples of a batch that begin at the same place.

    Positions count from a sample's first real token. Runs cover positions up to ``border``; exact keys and values are
    kept from ``kept`` on, which lies before the border where they may be asked for again (see :meth:`crop`).

    Attributes:
        samples: their numbers in the batch.
        start: padding before their first token.
        tokens: how many they have.
        prompt: how many they had after the first call.
        packed: runs of positions 0 to ``border``; None while there is none.
        rows: (b, Hkv) int32, how many of the packed rows hold something.
        marks: position -> ``rows`` when the border stood there, for positions that it can be moved back to.
        keys, values: (b, Hkv, room, D), of which the first ``tokens - kept`` rows are filled.
    """

    samples: list[int]
    start: int
    keys: Tensor
    values: Tensor
    tokens: int = 0
    prompt: int = 0
    border: int = 0
    kept: int = 0
    packed: Packed | None = None
    rows: Tensor | None = None
    marks: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def new(cls, samples: list[int], start: int, k: Tensor, v: Tensor) -> Past:
        """Nothing yet; ``k`` and ``v`` only say what sizes there will be."""
        keys, values = (x.new_empty(len(samples), x.shape[1], 0, x.shape[3]) for x in (k, v))
        return cls(samples, start, keys, values)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """The exact keys and values, from position ``kept`` on."""
        n = self.tokens - self.kept
        return self.keys[:, :, :n], self.values[:, :, :n]

    def extend(self, k: Tensor, v: Tensor, room: int) -> None:
        """Add tokens; a new buffer has ``room`` rows to spare."""
        n, more = self.tokens - self.kept, k.shape[2]
        if not n and not room:  # nothing to join and nothing to come: no copy
            self.keys, self.values = k, v
            self.tokens += more
            return
        # A tensor made in inference mode must not be written outside of it.
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if n + more > self.keys.shape[2] or frozen:
            old = self.tail
            self.keys, self.values = (x.new_empty(*x.shape[:2], n + more + room, x.shape[3]) for x in (k, v))
            self.keys[:, :, :n], self.values[:, :, :n] = old
        self.keys[:, :, n : n + more], self.values[:, :, n : n + more] = k, v
        self.tokens += more

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: Rule, scale: float | None, keep: bool = True) -> Tensor:
        """Take in new tokens and attend from them, (b, H, L, D); what fell out of the window is packed.

        Without ``keep`` this is the last call: nothing has to be stored.
        """
        first = self.tokens
        self.extend(k, v, SPARE if keep else 0)
        self.prompt = self.prompt or self.tokens
        blocks = range(first // rule.chunk, (self.tokens - 1) // rule.chunk + 1)
        exact = [rule.border.exact_from(b, self.prompt) for b in blocks]
        if exact[0] < self.kept:
            raise PatchkitError(
                f"exact keys are kept from token {self.kept} on, and {exact[0]} is asked for",
                "the packed cache of recipe 'deltallm'",
                f"do not crop it by more than {SPARE} tokens, or call reset() and begin again",
            )
        if exact[-1] > self.border:
            self.pack(exact[-1], rule)
        keys, values = self.tail
        skip = exact[0] - self.kept
        used, packed = self._used(exact), self.packed
        if packed is None:
            packed = _no_runs(k, v)
        out = kernels.packed_attention(
            q,
            packed,
            used,
            keys[:, :, skip:],
            values[:, :, skip:],
            exact,
            chunk=rule.chunk,
            first=first,
            scale=scale,
        )
        if keep:
            self.forget(rule)
        return out

    def _used(self, exact: list[int]) -> Tensor:
        shape = self.keys.shape[:2]
        none = torch.zeros(shape, dtype=torch.int32, device=self.keys.device)
        return torch.stack([self.marks.get(e, none) for e in exact])

    def pack(self, border: int, rule: Rule) -> None:
        """Move the border forward: the exact tokens before it become runs."""
        span = slice(self.border - self.kept, border - self.kept)
        k, v = (x[:, :, span] for x in self.tail)
        begins = kernels.find_runs(
            k, rule.theta, metric=rule.metric, chunk=rule.chunk, single=rule.sink, first=self.border
        )
        fresh = kernels.pack_runs(k, v, begins, mean_keys=rule.mean_keys)
        upto = begins.cumsum(-1, dtype=torch.int32)
        before = self.rows if self.rows is not None else torch.zeros_like(upto[..., 0])
        self.marks[self.border] = before
        for position in range(self.border + rule.chunk, border + 1, rule.chunk):
            self.marks[position] = before + upto[..., position - self.border - 1]
        self.packed = fresh if self.packed is None else _append(self.packed, before, fresh, upto[..., -1])
        self.border, self.rows = border, self.marks[border]

    def forget(self, rule: Rule) -> None:
        """Let go of exact tokens that neither the next call nor one after a crop by ``SPARE`` can ask for."""
        block = max(0, self.tokens - SPARE) // rule.chunk
        kept = min(rule.border.exact_from(block, self.prompt), self.border)
        # Moved in one go: copying the tail at every block that a long prompt brings would be work for nothing.
        if kept > self.kept:
            n = self.tokens - kept
            old = [x[:, :, kept - self.kept :] for x in self.tail]
            self.keys, self.values = (x.new_empty(*x.shape[:2], n + SPARE, x.shape[3]) for x in old)
            self.keys[:, :, :n], self.values[:, :, :n] = old
            self.kept = kept
        self.marks = {at: rows for at, rows in self.marks.items() if at >= self.kept}

    def can_crop(self, count: int, rule: Rule) -> bool:
        """Whether the last ``count`` tokens can be taken back without a trace."""
        left = self.tokens - count
        return left >= 0 and rule.border.exact_from(left // rule.chunk, self.prompt) >= self.kept

    def crop(self, count: int, rule: Rule) -> None:
        """Take the last tokens back, and the border with them."""
        self.tokens -= count
        border = rule.border.exact_from(self.tokens // rule.chunk, self.prompt)
        if border < self.border:
            self.border, self.rows = border, self.marks.get(border)

    def select(self, places: list[int], samples: list[int]) -> Past:
        """The samples at ``places`` of this one, as ``samples`` of a new batch."""
        at = torch.tensor(places, device=self.keys.device)
        packed = None if self.packed is None else Packed(*(x[at] for x in self.packed))
        marks = {position: rows[at] for position, rows in self.marks.items()}
        return Past(
            samples,
            self.start,
            self.keys[at],
            self.values[at],
            self.tokens,
            self.prompt,
            self.border,
            self.kept,
            packed,
            None if self.rows is None else self.rows[at],
            marks,
        )

    def removed(self) -> Tensor | None:
        """Share of rows that packing saved, (b, Hkv); None while nothing is packed."""
        return None if self.rows is None or not self.border else 1 - self.rows / self.border

    def expanded(self) -> tuple[Tensor, Tensor]:
        """A key and a value for every token: those of its run where it is in one."""
        ends = [x[:, :, self.border - self.kept :] for x in self.tail]
        if self.packed is None or not self.border:
            return ends[0], ends[1]
        assert self.rows is not None
        whole = []
        for x, end in zip(self.packed[:2], ends, strict=True):
            out = x.new_empty(*x.shape[:2], self.border, x.shape[3])
            for b, h in _pairs(x):
                m = int(self.rows[b, h])
                out[b, h] = x[b, h, :m].repeat_interleave(self.packed.counts[b, h, :m].long(), dim=0)
            whole.append(torch.cat([out, end], 2))
        return whole[0], whole[1]


def _append(old: Packed, rows: Tensor, new: Packed, more: Tensor) -> Packed:
    """Each head's new rows behind its ``rows`` old ones; the longest head sets the size."""
    total = rows + more
    longest = int(total.max())
    if bool((rows == old.counts.shape[2]).all()):
        joined = (torch.cat([a, b], 2)[:, :, :longest] for a, b in zip(old, new, strict=True))
        return Packed(*(x.contiguous() for x in joined))
    out = [x.new_zeros(*x.shape[:2], longest, *x.shape[3:]) for x in new]
    held, coming = rows.tolist(), more.tolist()
    for b, h in _pairs(new.keys):
        n, m = held[b][h], coming[b][h]
        for target, a, x in zip(out, old, new, strict=True):
            target[b, h, :n] = a[b, h, :n]
            target[b, h, n : n + m] = x[b, h, :m]
    return Packed(*out)


def _pairs(x: Tensor) -> list[tuple[int, int]]:
    return [(b, h) for b in range(x.shape[0]) for h in range(x.shape[1])]


def _no_runs(k: Tensor, v: Tensor) -> Packed:
    keys, values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (k, v))
    return Packed(keys, values, torch.empty(*k.shape[:2], 0, dtype=torch.int32, device=k.device))
