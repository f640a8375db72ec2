"""What a wrapper receives: the attention op, the denoiser forward, or the pipeline run that it stands around."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from patchkit import masks

if TYPE_CHECKING:
    from patchkit.blocks import Block
    from patchkit.ledger import Ledger
    from patchkit.sites import Site


class Grid(NamedTuple):
    """The shape of the visual tokens, in tokens: images have one frame. Order in the sequence: frame, row, column."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """How many tokens that are."""
        return self.frames * self.height * self.width


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a sequence."""

    start: int
    stop: int

    def __len__(self) -> int:  # a span has the length of what it covers, not of the pair
        return self.stop - self.start


@dataclass(slots=True)
class Moment:
    """Where in the run a call happens.

    ``step`` counts from 0 and ``total`` is the number of denoising steps; both are None where nobody tells (a bare
    model outside a pipeline). For a language model, ``step`` is 0 in the prefill and then counts forwards: tokens, and
    further chunks of a prefill that is done in chunks.
    ``branch`` names the guidance pass: ``"cond"``, ``"uncond"``, ``"batched"`` (both in one batch, unconditional half
    first) or ``"single"`` (no guidance, or guidance embedded in the model). ``part`` names the part of the run, where a
    recipe cuts the denoiser's call into several (tiles of a long video): what recipes keep is kept for each part.
    """

    step: int | None = None
    total: int | None = None
    branch: str = "single"
    part: str = ""

    @property
    def fraction(self) -> float | None:
        """How far the run is, in [0, 1)."""
        if self.step is None or not self.total:
            return None
        return self.step / self.total

    @property
    def place(self) -> str:
        """Guidance pass and part: what is kept from step to step is kept for each."""
        return f"{self.branch}@{self.part}" if self.part else self.branch


class _Timed:
    """What the calls inside a run have in common."""

    __slots__ = ()
    moment: Moment

    @property
    def step(self) -> int | None:
        """Number of the denoising step, from 0; None where nobody tells."""
        return self.moment.step

    @property
    def total(self) -> int | None:
        """How many steps the run has; None where nobody tells."""
        return self.moment.total

    @property
    def branch(self) -> str:
        """Guidance pass; see :class:`Moment`."""
        return self.moment.branch


@dataclass(slots=True)
class AttentionCall(_Timed):
    """One call of the attention op at one site.

    Attributes:
        q: (B, H, Nq, D), after RoPE and query normalisation.
        k, v: (B, Hkv, Nk, D); key-value heads are not repeated.
        mask: as the model gave it, broadcastable to (B, H, Nq, Nk): bool (True = attend) or additive; None = none.
        scale: softmax scale; None means D ** -0.5.
        causal: query i sees keys up to ``i + Nk - Nq``. Only ever True when ``mask`` is None.
        site: which attention module.
        index: which op call of that module (Mochi calls once per sample, image-to-video cross-attention twice).
        grid: shape of the visual tokens, None if unknown or without meaning here.
        text: where the text tokens are: in the joint sequence, or among the keys of a cross-attention (None: no text
            here, or unknown).
        visual: (B, Nk) bool, True = a visual token, in the decoder of a vision-language model; None elsewhere, and
            where it cannot be known.
        real: (B, Nk) bool, True = a token, False = padding or an empty slot of the cache, in a language model; None if
            unknown.
        first: number of the key that belongs to the first query, in a language model; None if unknown.
        dropped: tokens of the sequence that a sliding window has let go: key j belongs to token j + dropped.
        hidden: (B, Nq, C) what the attention module was given, if the recipe listens to it; else None.
        queries: (B, H, Nq, D) as the query projection made them, before any norm and RoPE, if the recipe listens to
            them; else None.
        moment: step, total and guidance branch.
        state: what this recipe keeps for (component, site, branch, index) until the run ends.
        shared: what this recipe keeps until the run ends for all calls at all levels.
        ledger: where the recipe writes what it did, for the report.
        prepared: what the recipe's :meth:`~patchkit.recipe_base.Recipe.prepare` returned.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    causal: bool
    site: Site
    index: int = 0
    grid: Grid | None = None
    text: Span | None = None
    visual: Tensor | None = None
    real: Tensor | None = None
    first: int | None = None
    dropped: int = 0
    hidden: Tensor | None = None
    queries: Tensor | None = None
    moment: Moment = field(default_factory=Moment)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    ledger: Ledger = None  # type: ignore[assignment]  # set before any recipe sees the call
    prepared: Any = None
    # the library's own arguments, handed through; shared by all copies of the call. The model's own op leaves the
    # attention weights under "weights" where the library's function returns them
    extra: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> AttentionCall:
        """A copy of this call with some inputs changed; give it to ``next``."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    @property
    def softcap(self) -> float | None:
        """The c of logits c * tanh(s / c), where the model's own op caps them."""
        found = self._argument("softcap")
        return None if found is None else float(found)

    @property
    def window(self) -> int | None:
        """How many keys, itself included, a query of a sliding-window layer sees; None where it sees all."""
        found = self._argument("sliding_window")
        return None if found is None else int(found)

    def _argument(self, name: str) -> Any:
        """One of the library's own arguments, compiled or not."""
        return self.extra.get(name, self.extra.get("kwargs", {}).get(name))

    @property
    def unreadable_mask(self) -> str | None:
        """Why it cannot be told what the mask says (flex attention has masks that are no tensors); None if it can."""
        return masks.unreadable(self.mask)

    def visible(self, rows: Tensor | None = None) -> Tensor | None:
        """Which keys some queries see: ``mask`` with causality and window in it, whatever its form.

        Args:
            rows: (R,) numbers of queries; None = all.

        Returns:
            Bool or additive, broadcastable to (B, H, R, Nk); None = all of them see everything.

        Raises:
            UnsupportedModel: :attr:`unreadable_mask` says why.
        """
        return masks.visible(self, rows)

    def key_padding(self) -> Tensor | None:
        """(B or 1, Nk) bool, True = a real key, if the mask only says which keys are padding; else None.

        Additive masks count as padding masks when each entry is 0 or leaves nothing of a key; diffusers writes -10000.
        """
        return None if self.mask is None else masks.padding(self.mask)


@dataclass(slots=True)
class BlockCall(_Timed):
    """One call of a transformer block.

    ``args`` and ``kwargs`` are exactly what the model passed; return what the block would have returned, be it from
    ``next`` or from elsewhere. ``layer`` counts in the order in which blocks run, as the sites' numbers do.
    """

    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moment: Moment
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    ledger: Ledger = None  # type: ignore[assignment]
    prepared: Any = None

    @property
    def layer(self) -> int:
        """Number of the block in its component."""
        return self.block.layer

    def replace(self, **changes: Any) -> BlockCall:
        """A copy of this call with some fields changed; ``kwargs`` is copied so that it can be edited."""
        return _replaced(self, changes)


@dataclass(slots=True)
class BlockInput(_Timed):
    """What enters a transformer block. To be looked at only.

    Attributes:
        block: the block; its ``layer`` counts as the sites' numbers do.
        hidden: (B, N, width), the residual stream before the block's first norm.
        past: how many tokens of the sequence came before these N, in a language model; None if unknown.
        moment, state, shared, ledger, prepared: as of an :class:`AttentionCall`; ``state`` is that of the block.
    """

    block: Block
    hidden: Tensor
    past: int | None
    moment: Moment
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    ledger: Ledger = None  # type: ignore[assignment]
    prepared: Any = None

    @property
    def layer(self) -> int:
        """Number of the block in its component."""
        return self.block.layer


@dataclass(slots=True)
class DenoiseCall(_Timed):
    """One call of a denoiser (or of a language model's forward).

    ``args`` and ``kwargs`` are exactly what the pipeline passed; change them, call ``next(call)`` as often as needed,
    and return what the module would have returned. ``sites`` are the attention modules that the recipe has selected,
    of all components: with them it can prepare what its :meth:`~patchkit.Recipe.attend` will need, a cache for one.
    ``carried`` is what the recipe's :meth:`~patchkit.Recipe.run` laid down for this run.
    """

    module: torch.nn.Module
    component: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moment: Moment
    sites: list[Site] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    carried: dict[Any, Any] = field(default_factory=dict)
    ledger: Ledger = None  # type: ignore[assignment]

    def replace(self, **changes: Any) -> DenoiseCall:
        """A copy of this call with some fields changed; ``kwargs`` is copied so that it can be edited."""
        return _replaced(self, changes)


@dataclass(slots=True)
class RunCall:
    """One call of the pipeline: ``pipe(*args, **kwargs)``.

    ``options`` holds the arguments that the recipe declared for itself (they never reach the pipeline). What the recipe
    lays down in ``carried`` its :meth:`~patchkit.Recipe.denoise` finds there until the pipeline's call ends; ``state``
    and ``shared`` are cleared when the run's timesteps are set.
    """

    pipeline: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    carried: dict[Any, Any] = field(default_factory=dict)
    ledger: Ledger = None  # type: ignore[assignment]

    @property
    def generator(self) -> Any:
        """The run's random generator, as the caller gave it."""
        return self.kwargs.get("generator")

    def replace(self, **changes: Any) -> RunCall:
        """A copy of this call with some fields changed; ``kwargs`` is copied so that it can be edited."""
        return _replaced(self, changes)


C = TypeVar("C", BlockCall, DenoiseCall, RunCall)


def _replaced(call: C, changes: dict[str, Any]) -> C:
    other = copy.copy(call)
    other.kwargs = dict(call.kwargs)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


Attend = Callable[[AttentionCall], Tensor]
AroundBlock = Callable[[BlockCall], Any]
Denoise = Callable[[DenoiseCall], Any]
Run = Callable[[RunCall], Any]
