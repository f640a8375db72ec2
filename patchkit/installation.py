"""One installation on one target, shared by all patches on it: the first installs, the last to leave removes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchkit import clock, instance
from patchkit.adapters import adapter_for
from patchkit.adapters.base import unwrap
from patchkit.context import Attend, AttentionCall, DenoiseCall, RunCall
from patchkit.errors import Conflict, PatchkitError
from patchkit.journal import Journal
from patchkit.ledger import Ledger
from patchkit.rebind import Slot
from patchkit.recipe_base import Recipe
from patchkit.selection import Indices, StepWindow
from patchkit.sites import Site
from patchkit.tracker import Tracker

logger = logging.getLogger(__name__)

Key = tuple[str, str, str, int]  # component, site, branch, op index


@dataclass(eq=False)
class Bound:
    """One recipe of one patch, tied to the sites it selected, with what it keeps and what it wrote down."""

    recipe: Recipe
    owner: object
    sites: list[Site]
    enabled: bool = True
    window: StepWindow = field(init=False)
    states: dict[Key, dict[str, Any]] = field(default_factory=dict)
    ledgers: dict[Key, Ledger] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.window = StepWindow.parse(self.recipe.steps, "steps")

    def state(self, key: Key) -> dict[str, Any]:
        """What the recipe keeps there until the run ends."""
        return self.states.setdefault(key, {})

    def ledger(self, key: Key) -> Ledger:
        """What the recipe writes down there."""
        if key not in self.ledgers:
            self.ledgers[key] = Ledger()
        return self.ledgers[key]

    def heads(self, site: Site) -> frozenset[int]:
        """The heads that the option ``heads`` selects at a site."""
        return Indices.parse(self.recipe.heads, "heads").resolve(site.heads)


class Installation:
    """Everything that stands on one pipeline or model while at least one patch is on it."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.adapter = adapter_for(target)
        self.journal = Journal()
        self.slot = Slot()
        self.bound: list[Bound] = []
        self.sites = self.adapter.sites()
        self.installed: set[Site] = set()
        self.tracker = Tracker(target, self.adapter.grid_rules(), self.adapter.place, self._new_schedule)
        self.running = 0
        for site in self.sites:
            site.tracker = self.tracker

    @classmethod
    def of(cls, target: Any) -> Installation | None:
        """The installation on ``target``, or None."""
        mark = instance.mark_of(target)
        reference = mark() if isinstance(mark, weakref.ref) else None
        return reference if isinstance(reference, Installation) and reference.holds(target) else None

    def holds(self, target: Any) -> bool:
        """Whether ``target`` is what this installation stands on (or the wrapper around it)."""
        return target is self.target or target is self.adapter.target or target is self.adapter.outer

    # --- coming and going -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Write what all patches share: the denoisers' and the pipeline's calls, and the scheduler's clock."""
        for name, module in self.adapter.components().items():
            self._enter(name, module)
        self._listen()
        if self.adapter.is_pipeline:
            call = type(self.target).__call__
            run = lambda this, *args, **kwargs: self._run(  # noqa: E731
                lambda *a, **k: call(this, *a, **k), args, kwargs
            )
            instance.override(self.journal, self, self.target, {"__call__": run}, _mark(self))

    def _enter(self, component: str, module: Any) -> None:
        """Stand around the calls of one denoiser, as its caller holds it, and hear its ``cache_context``."""
        inner = unwrap(module)
        for obj in dict.fromkeys((inner, module)):
            other = instance.mark_of(obj)
            if other is not None:
                raise Conflict(
                    f"{component} ({type(obj).__name__}) is already patched through another pipeline or by itself",
                    self.adapter.name,
                    "remove that patch first: a model can only be patched through one of its holders at a time",
                )
        mark = _mark(self)
        if hasattr(type(inner), "cache_context"):
            context = self._context_method(component, type(inner).cache_context)
            methods = {"cache_context": context}
            if inner is module:
                methods["__call__"] = self._call_method(component, type(module).__call__)
            instance.override(self.journal, self, inner, methods, mark)
            if inner is module:
                return
        instance.override(
            self.journal, self, module, {"__call__": self._call_method(component, type(module).__call__)}, mark
        )

    def _call_method(self, component: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            # inside a compiled wrapper the wrapper's own call has been here already
            if torch.compiler.is_compiling() or self.slot.closed:
                return original(module, *args, **kwargs)
            return self._denoise(component, original, module, args, kwargs)

        return call

    def _context_method(self, component: str, original: Callable[..., Any]) -> Callable[..., Any]:
        import contextlib

        @contextlib.contextmanager
        def cache_context(module: Any, name: str, **kwargs: Any) -> Any:
            with original(module, name, **kwargs), self.tracker.context(component, name):
                yield

        return cache_context

    def _listen(self) -> None:
        scheduler = self.adapter.scheduler()
        if scheduler is not None:
            clock.listen(self.journal, self, scheduler, self.tracker)

    def refresh(self) -> None:
        """Before a run: users swap schedulers, and compile models, after patching."""
        scheduler = self.adapter.scheduler()
        if scheduler is not None and not clock.listens(scheduler, self.tracker):
            self._listen()
        for name, module in self.adapter.components().items():
            if instance.mark_of(module) is None:
                inner = unwrap(module)
                if inner is not module and instance.mark_of(inner) is not None:
                    call = {"__call__": self._call_method(name, type(module).__call__)}
                    instance.override(self.journal, self, module, call, _mark(self))

    def add(self, bounds: list[Bound]) -> None:
        """Let the recipes of one patch in."""
        for bound in bounds:
            for site in bound.sites if bound.recipe.wraps("attend") else ():
                if site not in self.installed:
                    self.installed.add(site)  # first: a failure inside is taken back for it
                    self.adapter.install(site, self.journal, site, self.slot)
        self.bound.extend(bounds)
        self.rebuild()

    def leave(self, owner: object) -> list[str]:
        """Let the recipes of one patch out; the last one takes everything back. Returns what had drifted."""
        self.bound = [b for b in self.bound if b.owner is not owner]
        if self.bound:
            self.rebuild()
            return []
        return self.close()

    def withdraw(self, owner: object, keep: set[Site], everything: bool) -> None:
        """A patch failed half-way through coming: leave things as they were before it."""
        if everything:
            self.close()
            return
        self.bound = [b for b in self.bound if b.owner is not owner]
        for site in self.installed - keep:
            self.journal.undo(site)
        self.installed = set(keep)
        self.rebuild()

    def close(self) -> list[str]:
        """Take back every write."""
        self.slot.closed = True
        for site in self.sites:
            site.chain = None
        drift = self.journal.undo()
        self.adapter.close()
        self.installed.clear()
        self.bound.clear()
        return drift

    # --- chains -----------------------------------------------------------------------------------------------

    def order(self) -> list[Bound]:
        """Outermost first, as the recipes' ``before`` and ``after`` ask."""
        from patchkit.ordering import ordered

        return ordered(self.bound)

    def rebuild(self) -> None:
        """Put the chains together again."""
        active = [b for b in self.order() if b.enabled]
        wrapping: dict[Site, list[Bound]] = {}
        for bound in active:
            if bound.recipe.wraps("attend"):
                for site in bound.sites:
                    wrapping.setdefault(site, []).append(bound)
        for site in self.sites:
            chain: Attend | None = None
            for bound in reversed(wrapping.get(site, [])):
                chain = _around(bound, chain or site.terminal)  # type: ignore[arg-type]
            site.chain = chain
        self._denoisers = [b for b in active if b.recipe.wraps("denoise")]
        self._runners = [b for b in active if b.recipe.wraps("run")]

    def _denoise(
        self,
        component: str,
        original: Callable[..., Any],
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        tracker = self.tracker
        if tracker.inside(component):
            return original(module, *args, **kwargs)
        inner = unwrap(module)
        inputs = tracker.bind(inner, args, kwargs)
        if self.adapter.family == "transformers":
            moment = self._lm_moment(inputs)
        else:
            moment = tracker.moment(component, inputs)

        def model(call: DenoiseCall) -> Any:
            changed = call.args is not args or call.kwargs is not kwargs
            seen = tracker.bind(inner, call.args, call.kwargs) if changed else inputs
            names = self._frames_of(component)
            with tracker.frames(names, call.moment, inner, seen):
                return original(module, *call.args, **call.kwargs)

        chain: Callable[[DenoiseCall], Any] = model
        for bound in reversed(self._denoisers):
            if self.adapter.family == "transformers" or any(s.component == component for s in bound.sites):
                chain = _around_denoise(bound, component, chain)
        try:
            return chain(DenoiseCall(inner, component, args, kwargs, moment))
        except BaseException:
            self.clear()
            raise

    def _frames_of(self, component: str) -> tuple[str, ...]:
        """A language model is called as one component but its sites may belong to several towers."""
        if self.adapter.family == "transformers":
            return tuple(dict.fromkeys(s.component for s in self.sites)) or (component,)
        return (component,)

    def _lm_moment(self, inputs: dict[str, Any]) -> Any:
        fresh, moment = self.tracker.language_moment(inputs)
        if fresh:
            self.clear()
            if not self.running:
                self.forget()
        return moment

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running or not any(b.enabled for b in self.bound):
            return original(*args, **kwargs)
        options, rest = self._own_arguments(kwargs)
        self.refresh()
        self.clear()
        self.forget()
        self.tracker.reset()
        chain: Callable[[RunCall], Any] = lambda call: original(*call.args, **call.kwargs)  # noqa: E731
        for bound in reversed(self._runners):
            chain = _around_run(bound, options.get(id(bound), {}), chain)
        self.running += 1
        try:
            return chain(RunCall(self.target, args, rest))
        finally:
            self.running -= 1
            self.clear()  # states are of one run: they hold tensors as large as the attention

    def _own_arguments(self, kwargs: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
        """Split the call's arguments into those of recipes and those of the pipeline."""
        rest = dict(kwargs)
        options: dict[int, dict[str, Any]] = {}
        for bound in self._runners:
            mine = {name: kwargs[name] for name in bound.recipe.arguments if name in kwargs}
            options[id(bound)] = mine
            own = _parameters(self.target)
            for name in mine:
                if name not in own:
                    rest.pop(name, None)
        return options, rest

    # --- states -----------------------------------------------------------------------------------------------

    def _new_schedule(self) -> None:
        self.clear()
        if not self.running:
            self.forget()

    def clear(self) -> None:
        """Drop every recipe's state."""
        for bound in self.bound:
            bound.states.clear()

    def forget(self) -> None:
        """Start the ledgers anew."""
        for bound in self.bound:
            bound.ledgers.clear()

    def drift(self) -> list[str]:
        """What others have replaced since it was installed."""
        return self.journal.drift()


def _mark(installation: Installation) -> Any:
    return weakref.ref(installation)


def _parameters(target: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(target).__call__).parameters)


def _around(bound: Bound, inner: Attend) -> Attend:
    recipe, window = bound.recipe, bound.window

    def attend(call: AttentionCall) -> Tensor:
        moment = call.moment
        if not window.contains(moment.step, moment.total):
            return inner(call)
        site = call.site
        key = (site.component, site.name, moment.branch, call.index)
        ledger = bound.ledger(key)
        ledger.calls += 1
        out = recipe.attend(call.replace(state=bound.state(key), ledger=ledger), inner)
        expected = (*call.q.shape[:-1], call.v.shape[-1])
        if not isinstance(out, Tensor) or out.shape != expected:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise PatchkitError(
                f"recipe {recipe.name!r} returned {got} from attend, not a tensor of shape {tuple(expected)}",
                site.full_name,
                "return the attention output as (B, H, Nq, D)",
            )
        return out

    return attend


def _around_denoise(bound: Bound, component: str, inner: Callable[[DenoiseCall], Any]) -> Callable[[DenoiseCall], Any]:
    def denoise(call: DenoiseCall) -> Any:
        if not bound.window.contains(call.step, call.total):
            return inner(call)
        key = (component, "", call.branch, 0)
        ledger = bound.ledger(key)
        ledger.calls += 1
        return bound.recipe.denoise(call.replace(state=bound.state(key), ledger=ledger), inner)

    return denoise


def _around_run(bound: Bound, options: dict[str, Any], inner: Callable[[RunCall], Any]) -> Callable[[RunCall], Any]:
    def run(call: RunCall) -> Any:
        key = ("pipeline", "", "", 0)
        ledger = bound.ledger(key)
        ledger.calls += 1
        return bound.recipe.run(call.replace(options=options, state=bound.state(key), ledger=ledger), inner)

    return run
