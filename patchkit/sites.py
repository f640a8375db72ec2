"""Attention sites: the modules whose attention op a recipe can stand around."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchkit.context import Attend, AttentionCall
    from patchkit.listening import Ear
    from patchkit.tracker import Tracker

Kind = Literal["self", "cross", "joint"]
Side = Literal["first", "last"]

_numbers = itertools.count(1)
# A compiled graph knows a site only by its number (a Python object would cost one graph per layer).
_by_number: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Site:
    """One attention module.

    Attributes:
        component: which part of the pipeline it belongs to (``transformer``, ``unet`` ...; ``model`` for a bare model).
        name: its name inside the component.
        module: the module itself.
        kind: ``self``, ``cross`` or ``joint`` (text and visual tokens in one sequence).
        layer: number of its block, in the order in which blocks run; several sites of a block share it.
        layers: how many blocks the component has.
        order: 0 for the first attention of its block, 1 for the second ...
        heads: query heads.
        text_side: where the text stands in a joint sequence.
        learned_sinks: whether its softmax counts learned logits beside those of the keys.
        unsupported: why it cannot be patched at all, or None.
    """

    component: str
    name: str
    module: torch.nn.Module
    kind: Kind
    layer: int
    heads: int
    text_side: Side | None = None
    unsupported: str | None = None
    learned_sinks: bool = False
    layers: int = 0
    order: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    chain: Attend | None = None  # None: nothing stands around the op
    terminal: Attend | None = None  # the model's own op
    tracker: Tracker | None = None
    ear: Ear | None = None  # for recipes that need what the module itself is given

    def __post_init__(self) -> None:
        self.tensor = torch.tensor(self.number, device="cpu")  # whatever the default device is
        _by_number[self.number] = self

    @property
    def full_name(self) -> str:
        """Component and module name."""
        return f"{self.component}.{self.name}"

    def __repr__(self) -> str:
        return f"<Site {self.full_name} {self.kind} layer {self.layer}>"

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
        index: int,
        extra: dict[str, Any],
    ) -> Tensor:
        """Run the chain of this site, or the model's own op where nothing stands around it."""
        from patchkit.context import AttentionCall, Moment

        # a graph cannot be traced through a dataclass that makes an object of its own for a default: a moment is given
        call = AttentionCall(q, k, v, mask, scale, causal, self, index, moment=Moment(), extra=extra)
        if self.chain is None:
            return self._own_op(call)
        assert self.tracker is not None
        self.tracker.fill(call)
        if self.ear is not None:
            self.ear.tell(call)
        return self.chain(call)

    def _own_op(self, call: AttentionCall) -> Tensor:
        assert self.terminal is not None
        return self.terminal(call)


def by_number(number: int) -> Site:
    """The site of that number; sites live as long as their patch."""
    return _by_number[number]


def execution_order(names: list[str], blocks: tuple[str, ...]) -> list[str]:
    """Sort module names by the first prefix of ``blocks`` that they start with, else keep their order.

    ``named_modules`` follows the order of definition, which in a UNet is not the order in which blocks run.
    """

    def rank(name: str) -> int:
        for i, prefix in enumerate(blocks):
            if name == prefix or name.startswith(prefix + "."):
                return i
        return len(blocks)

    return sorted(names, key=rank)  # stable


def number_layers(sites: list[Site], block_of: Callable[[str], str]) -> None:
    """Fill ``layer`` and ``layers``: sites of one component that share a block share its number."""
    seen: dict[str, dict[str, int]] = {}
    inside: Counter[tuple[str, int]] = Counter()
    for site in sites:
        blocks = seen.setdefault(site.component, {})
        site.layer = blocks.setdefault(block_of(site.name), len(blocks))
        site.order = inside[site.component, site.layer]
        inside[site.component, site.layer] += 1
    for site in sites:
        site.layers = len(seen[site.component])
