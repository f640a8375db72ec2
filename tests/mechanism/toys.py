"""Small recipes that show what the mechanism does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import InvalidOption, Recipe, recipe
from patchkit.context import AttentionCall, DenoiseCall, Grid, Moment, RunCall, Span


class Seen(NamedTuple):
    """What a recipe was told about one attention call."""

    component: str
    site: str
    kind: str
    layer: int
    q: tuple[int, ...]
    k: tuple[int, ...]
    mask: str
    visible: list[int] | None  # keys that the mask leaves, by sample
    causal: bool
    grid: Grid | None
    text: Span | None
    visual: list[int] | None  # visual keys, by sample
    step: int | None
    total: int | None
    branch: str
    index: int


def mask_kind(mask: Tensor | None) -> str:
    if mask is None:
        return "none"
    if mask.dtype != torch.bool:
        return "additive"
    return "bool_key" if mask.shape[-2] == 1 else "bool"


def seen(call: AttentionCall) -> Seen:
    padding = call.key_padding()
    return Seen(
        call.site.component,
        call.site.name,
        call.site.kind,
        call.site.layer,
        tuple(call.q.shape),
        tuple(call.k.shape),
        mask_kind(call.mask),
        None if padding is None else padding.sum(-1).tolist(),
        call.causal,
        call.grid,
        call.text,
        None if call.visual is None else call.visual.sum(-1).tolist(),
        call.step,
        call.total,
        call.branch,
        call.index,
    )


@recipe("toy-watch")
@dataclass(frozen=True)
class Watch(Recipe):
    """Changes nothing at any level and remembers everything."""

    def validate(self) -> None:
        for name in ("seen", "denoised", "runs"):
            object.__setattr__(self, name, [])

    seen: ClassVar[list[Seen]]
    denoised: ClassVar[list[tuple[str, Moment]]]
    runs: ClassVar[list[RunCall]]

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        self.seen.append(seen(call))
        return next(call)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        self.denoised.append((call.component, call.moment))
        return next(call)


@recipe("toy-identity")
@dataclass(frozen=True)
class Identity(Recipe):
    """Stands around the op only."""

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        return next(call)


@recipe("toy-scale")
@dataclass(frozen=True)
class Scale(Recipe):
    """Multiplies the values, so that it shows; in one branch only, if that is given."""

    factor: float = 0.5
    branch: str | None = None

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        if self.branch is not None and call.branch != self.branch:
            return next(call)
        return next(call.replace(v=call.v * self.factor))


def own_attention(call: AttentionCall) -> Tensor:
    """A recipe's own op, from nothing but what the call says."""
    mask = call.mask
    q, k, v = call.q, call.k, call.v
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if call.causal:
        queries, keys = q.shape[2], k.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)


@recipe("toy-replace")
@dataclass(frozen=True)
class Replace(Recipe):
    """Computes the op itself."""

    effect = "replaces"

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        call.ledger.count("own")
        return own_attention(call)


@recipe("toy-replace-too")
@dataclass(frozen=True)
class ReplaceToo(Replace):
    """Another one that does."""


@recipe("toy-counter")
@dataclass(frozen=True)
class Counter(Recipe):
    """Counts its calls in the state, and remembers every (key, count)."""

    def validate(self) -> None:
        object.__setattr__(self, "counts", [])

    counts: ClassVar[list[tuple[Any, ...]]]

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        call.state["calls"] = call.state.get("calls", 0) + 1
        key = (call.site.full_name, call.branch, call.index, call.step)
        self.counts.append((*key, call.state["calls"]))
        call.ledger.count("counted")
        return next(call)


def _mean(first: Any, second: Any) -> Any:
    """Of two denoiser outputs, as tuples or as the library's output objects."""
    if isinstance(first, tuple):
        return ((first[0] + second[0]) / 2, *first[1:])
    key = "sample" if "sample" in first else "logits"
    first[key] = (first[key] + second[key]) / 2
    return first


@recipe("toy-twice")
@dataclass(frozen=True)
class Twice(Recipe):
    """Runs the denoiser twice and averages; the second time in a branch of its own."""

    own_branch: bool = True

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        call.ledger.count("averaged")
        first = next(call)
        if not self.own_branch:
            return _mean(first, next(call))
        weak = Moment(call.step, call.total, f"{call.branch}-weak")
        return _mean(first, next(call.replace(moment=weak)))


@recipe("toy-loudness")
@dataclass(frozen=True)
class Loudness(Recipe):
    """Adds an argument to the pipeline's call and multiplies the result by it."""

    arguments = {"loudness": "what the result is multiplied by"}

    def check_call(self, call: RunCall) -> None:
        if call.options.get("loudness", 1.0) < 0:
            raise InvalidOption("loudness is negative", "argument 'loudness'", "give a number above 0")

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        call.ledger.note(loudness=call.options.get("loudness"))
        (latents, *rest) = next(call)
        return (latents * call.options.get("loudness", 1.0), *rest)


@recipe("toy-fail")
@dataclass(frozen=True)
class Fail(Recipe):
    """Raises at one level, the n-th time it gets there."""

    level: str = "attend"
    at: int = 1

    def validate(self) -> None:
        object.__setattr__(self, "left", {"attend": self.at, "denoise": self.at, "run": self.at})
        object.__setattr__(self, "error", RuntimeError("the toy fails"))

    left: ClassVar[dict[str, int]]
    error: ClassVar[BaseException]

    def _pass(self, level: str) -> None:
        self.left[level] -= 1
        if level == self.level and self.left[level] == 0:
            raise self.error

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        call.state["seen"] = True
        self._pass("attend")
        return next(call)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        self._pass("denoise")
        return next(call)

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        self._pass("run")
        return next(call)


@contextmanager
def counting_ops() -> Iterator[dict[str, int]]:
    """How often upstream's own attention op ran."""
    from unittest import mock

    counts = {"ops": 0}
    original = F.scaled_dot_product_attention

    def op(*args: Any, **kwargs: Any) -> Tensor:
        counts["ops"] += 1
        return original(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", op):
        yield counts
