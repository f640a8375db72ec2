"""The transformer blocks of a model: what a recipe can stand around between the denoiser's call and its attention."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit import compiled, instance
from patchkit.adapters.base import Adapter
from patchkit.bound import Bound
from patchkit.chains import around_block, enter_block
from patchkit.context import AroundBlock, BlockCall, BlockInput
from patchkit.journal import Journal
from patchkit.sites import Site

if TYPE_CHECKING:
    from patchkit.installation import Installation


@dataclass(eq=False)
class Block:
    """One transformer block.

    Attributes:
        component: which part of the pipeline it belongs to, as its sites say.
        name: its name inside the component.
        module: the module itself.
        layer: its number in the order in which blocks run; sites count with the same numbers.
        layers: how many blocks the component has.
        chained: whether each block of its list hands what it returns to the next one and to nothing else.
    """

    component: str
    name: str
    module: torch.nn.Module
    layer: int
    layers: int
    chained: bool = False
    entered: Tensor | None = None  # what a compiled graph knows it by

    @property
    def full_name(self) -> str:
        """Component and module name."""
        return f"{self.component}.{self.name}"

    @property
    def stack(self) -> str:
        """Name of the list that the block stands in."""
        return self.name.rpartition(".")[0]

    @property
    def must_run(self) -> str | None:
        """Why its call cannot be left out: others count on it running. None if it can."""
        if hasattr(self.module, "_diffusers_hook"):
            return "diffusers' hooks (a cache, or group offloading) stand on it"
        if hasattr(self.module, "_hf_hook"):
            return "accelerate's hooks stand on it"
        return None


def blocks_of(adapter: Adapter, sites: list[Site]) -> list[Block]:
    """The blocks that hold the sites, in execution order; sites that stand in no callable block have none."""
    found: dict[tuple[str, str], Block] = {}
    for site in sites:
        name = adapter.block_name(site.name)
        root = adapter.root(site.component)
        if not name or name == site.name or (site.component, name) in found:
            continue
        module = root.get_submodule(name)
        if not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            chained = adapter.chained(site.component)
            found[site.component, name] = Block(site.component, name, module, site.layer, site.layers, chained)
    return list(found.values())


class Blocks:
    """The blocks of one installation, and the recipes around them."""

    def __init__(self, installation: Installation) -> None:
        self._owner = weakref.ref(installation)
        self._slot, self._mark = installation.slot, installation.mark
        self.installed: dict[int, Block] = {}  # by the id of its module, which the block keeps alive
        self.around: list[Bound] = []  # outermost first
        self.looking: list[Bound] = []  # those that look at what enters
        self.missed: set[str] = set()  # recipes whose blocks ran inside a compiled graph
        self._classes: dict[type, type] = {}
        self._passed = False  # whether a block has come by since the last call of its model began

    def install(self, bounds: list[Bound], journal: Journal) -> None:
        """Lead the blocks that recipes stand around to :meth:`run`."""
        installation = self._owner()
        wanted = [b for b in bounds if b.recipe.wraps("block") or b.recipe.wraps("enter")]
        if installation is None or not wanted:
            return
        for block in blocks_of(installation.adapter, installation.sites):
            if id(block.module) not in self.installed and any(_wants(b, block) for b in wanted):
                self.installed[id(block.module)] = block  # first: a failure inside is taken back for it
                block.entered = compiled.number(block, self.look)
                journal.set(block, block.module, "_patchkit_block", block.entered)
                journal.set(block, block.module, "__class__", self._class(type(block.module)))

    def chain(self, active: list[Bound]) -> None:
        """Let these recipes work, outermost first."""
        self.around = [b for b in active if b.recipe.wraps("block")]
        self.looking = [b for b in active if b.recipe.wraps("enter")]

    def withdraw(self, keep: set[int], journal: Journal) -> None:
        """Take back the blocks that came since ``keep`` was all there was."""
        for number in set(self.installed) - keep:
            journal.undo(self.installed.pop(number))

    def _class(self, original: type) -> type:
        """Blocks of one class share one subclass: compiled by themselves they then share their graph."""
        if original not in self._classes:
            self._classes[original] = instance.subclass_of(original, {"__call__": self._call(original)}, self._mark)
        return self._classes[original]

    def _call(self, original: Any) -> Callable[..., Any]:
        slot, own = self._slot, original.__call__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            # Inside a compiled graph only the block itself runs; `watch` notices that nobody came by.
            if slot.closed:
                return own(module, *args, **kwargs)
            if torch.compiler.is_compiling():
                if self.looking:
                    args, kwargs = _shown(module._patchkit_block, args, kwargs)
                return own(module, *args, **kwargs)
            return self.run(own, module, args, kwargs)

        return call

    def run(self, own: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a block, through the recipes around it."""
        installation, block = self._owner(), self.installed.get(id(module))
        self._passed = True
        if installation is None or block is None or not (self.around or self.looking):
            return own(module, *args, **kwargs)
        moment = installation.tracker.moment_of(block.component)

        def chain(call: BlockCall) -> Any:
            if self.looking and (found := _hidden(call.args, call.kwargs)) is not None:
                self.look(block, found)
            return own(module, *call.args, **call.kwargs)

        return self._around(block, chain)(BlockCall(block, args, kwargs, moment))

    def _around(self, block: Block, chain: AroundBlock) -> AroundBlock:
        for bound in reversed(self.around):
            if bound.covers(block.component):
                chain = around_block(bound, chain)
        return chain

    def look(self, block: Block, hidden: Tensor) -> None:
        """Show the recipes what enters a block."""
        installation = self._owner()
        if installation is not None:
            tracker = installation.tracker
            for bound in self.looking:
                if bound.enters(block.component, block.layer):
                    moment = tracker.moment_of(block.component)
                    enter_block(bound, BlockInput(block, hidden, tracker.past, moment))

    @contextlib.contextmanager
    def watch(self, components: tuple[str, ...]) -> Iterator[None]:
        """While the model runs: notice that recipes wait for blocks of which none comes by."""
        waiting = [b.recipe.name for b in self.around if any(b.covers(c) for c in components)]
        self._passed = False
        yield
        if waiting and not self._passed:
            self.missed.update(waiting)


def _wants(bound: Bound, block: Block) -> bool:
    if bound.recipe.wraps("block") and bound.covers(block.component):
        return True
    return bound.enters(block.component, block.layer)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments: the first of them."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _shown(number: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inside a compiled graph: show what enters, and go on with it. Is traced."""
    if args:
        return (compiled.enter(args[0], number), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": compiled.enter(kwargs["hidden_states"], number)}
