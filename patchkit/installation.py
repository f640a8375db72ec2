"""One installation on one target, shared by all patches on it: the first installs, the last to leave removes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from patchkit import arguments, clock, compiled, instance
from patchkit.adapters import adapter_for
from patchkit.adapters.base import unwrap
from patchkit.blocks import Blocks
from patchkit.bound import Bound
from patchkit.chains import around_denoise, attend_chain, run_chain
from patchkit.context import Denoise, DenoiseCall, Moment, RunCall
from patchkit.drift import swapped
from patchkit.entry import alive, enter
from patchkit.errors import Conflict
from patchkit.journal import Journal
from patchkit.listening import Ear, What
from patchkit.ordering import ordered
from patchkit.rebind import Slot
from patchkit.sequences import Sequences
from patchkit.sites import Site
from patchkit.tracker import Tracker

logger = logging.getLogger(__name__)


class Installation:
    """Everything that stands on one pipeline or model while at least one patch is on it."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.adapter = adapter_for(target)
        self.journal = Journal()
        self.slot = Slot()
        self.mark = weakref.ref(self)
        self.bound: list[Bound] = []
        self.sites = self.adapter.sites()
        self.installed: set[Site] = set()
        self.entered: dict[str, Any] = {}  # the model inside each component
        self.tracker = Tracker(target, self.adapter.grid_rules(), self.adapter.place, self._new_schedule)
        self.running = 0
        self.tensor = compiled.register(self)
        self.unheard: set[str] = set()  # recipes around a call that happened inside a compiled graph
        self.inside: set[str] = set()  # components whose model is running
        self._moments: dict[str, Moment] = {}  # of the denoise chains that are running
        self.blocks = Blocks(self)
        self.sequences = Sequences()  # of a language model
        for site in self.sites:
            site.tracker = self.tracker

    @classmethod
    def of(cls, target: Any) -> Installation | None:
        """The installation on ``target``, or None."""
        found = alive(instance.mark_of(target))
        return found if found is not None and found.holds(target) else None

    @classmethod
    def around(cls, part: Any) -> Installation | None:
        """The installation that ``part`` belongs to, though it stands on something larger."""
        return alive(instance.mark_of(part))

    def holds(self, target: Any) -> bool:
        """Whether ``target`` is what this installation stands on (or the wrapper around it)."""
        return target is self.target or target is self.adapter.target or target is self.adapter.outer

    # --- coming and going -------------------------------------------------------------------------------------

    def check_free(self) -> None:
        """Raise :class:`Conflict` where somebody else's patch is on the target, or on a part of it."""
        for name, module in self.adapter.components().items():
            other = alive(instance.mark_of(unwrap(module))) or alive(instance.mark_of(module))
            taken = [s.full_name for s in self.sites if s.component == name and self.adapter.is_taken(s)]
            if other is not None or taken:
                through = f" through {type(other.target).__name__}" if other is not None else ""
                raise Conflict(
                    f"{name} ({type(module).__name__}) is already patched{through}",
                    self.adapter.name,
                    "remove that patch first: a model can only be patched through one of its holders at a time",
                )

    def open(self) -> None:
        """Write what all patches share: the denoisers' and the pipeline's calls, and the scheduler's clock."""
        for name, module in self.adapter.components().items():
            self.entered[name] = unwrap(module)
            enter(self, name, module)
        self._listen()
        if self.adapter.is_pipeline:
            call = type(self.target).__call__

            def run(this: Any, *args: Any, **kwargs: Any) -> Any:
                return self._run(lambda *a, **k: call(this, *a, **k), args, kwargs)

            instance.override(self.journal, self, self.target, {"__call__": run}, self.mark)

    def _listen(self) -> None:
        scheduler = self.adapter.scheduler()
        if scheduler is not None and not clock.listens(scheduler, self.tracker):
            clock.listen(self.journal, self, scheduler, self.tracker)

    def refresh(self) -> None:
        """Before a run: users swap schedulers, and wrap models for compiling, after patching."""
        self._listen()
        for name, module in self.adapter.holders().items():
            if unwrap(module) is self.entered.get(name):
                enter(self, name, module)

    def add(self, bounds: list[Bound]) -> None:
        """Let the recipes of one patch in."""
        for bound in bounds:
            bound.attachment = bound.recipe.attach(self.adapter.target, bound.sites)
        for bound in bounds:
            for site in bound.sites if bound.recipe.wraps("attend") else ():
                if site not in self.installed:
                    self.installed.add(site)  # first: a failure inside is taken back for it
                    self.adapter.install(site, self.journal, site, self.slot)
                self._listen_to(site, bound.recipe.listens(site))
        self.blocks.install(bounds, self.journal)
        self.bound.extend(bounds)
        self.rebuild()

    def _listen_to(self, site: Site, what: frozenset[What]) -> None:
        """Keep what a site's module is given for its recipes; hooks stay until the installation is over."""
        known = site.ear.what if site.ear is not None else frozenset()
        if not what <= known:
            ear = Ear(site.module, known | what)
            self.journal.do(site, ear.open, ear.close, "hooks")
            site.ear = ear

    def leave(self, owner: object) -> list[str]:
        """Let the recipes of one patch out; the last one takes everything back. Returns what had drifted."""
        self.bound = [b for b in self.bound if b.owner is not owner]
        if self.bound:
            self.rebuild()
            return []
        return self.close()

    def present(self) -> tuple[set[Site], set[int]]:
        """What is installed now, for :meth:`withdraw`."""
        return set(self.installed), set(self.blocks.installed)

    def withdraw(self, owner: object, keep: tuple[set[Site], set[int]], everything: bool) -> None:
        """A patch failed half-way through coming: leave things as they were before it."""
        if everything:
            self.close()
            return
        self.bound = [b for b in self.bound if b.owner is not owner]
        for site in self.installed - keep[0]:
            self.journal.undo(site)
            site.ear = None
        self.installed = set(keep[0])
        self.blocks.withdraw(keep[1], self.journal)
        self.rebuild()

    def close(self) -> list[str]:
        """Take back every write."""
        self.slot.closed = True
        for site in self.sites:
            # sites may live on in a plan; the pipeline must not because of that
            site.chain = site.tracker = site.ear = None
        drift = swapped(self) + self.journal.undo()
        self.adapter.close()
        self.installed.clear()
        self.bound.clear()
        self.blocks = Blocks(self)
        return drift

    # --- chains -----------------------------------------------------------------------------------------------

    def order(self) -> list[Bound]:
        """Outermost first, as the recipes' ``before`` and ``after`` ask."""
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
            site.chain = attend_chain(site, wrapping.get(site, []))
        self.blocks.chain(active)
        self.sequences.drop_others()  # recipes that come and go know nothing of what they miss
        self._denoisers = [b for b in active if b.recipe.wraps("denoise")]
        self._runners = [b for b in active if b.recipe.wraps("run")]
        self._checkers = [b for b in active if b.recipe.wraps("run") or b.recipe.wraps("check_call")]

    def denoise(
        self, component: str, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a denoiser (or model), through the recipes that stand around it."""
        if component in self.inside:
            return original(module, *args, **kwargs)
        inner = unwrap(module)
        model = self._model(component, original, module, args, kwargs)
        if component in self._moments:  # a recipe calls the module itself instead of `next`: not through it again
            return model(DenoiseCall(inner, component, args, kwargs, self._moments[component]))
        moment = self._moment(component, inner, args, kwargs)
        chain: Denoise = model
        for bound in reversed(self._denoisers):
            if self.adapter.family == "transformers" or bound.covers(component):
                chain = around_denoise(bound, component, chain)
        self._moments[component] = moment
        try:
            result = chain(DenoiseCall(inner, component, args, kwargs, moment))
            self.sequences.belongs_to(getattr(result, "past_key_values", None))  # models make one themselves
            return result
        except BaseException:
            self.clear()
            raise
        finally:
            del self._moments[component]

    def _model(
        self, component: str, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Denoise:
        """The end of a denoise chain: the module itself, with the tracker told what it was given."""
        inner = unwrap(module)

        def model(call: DenoiseCall) -> Any:
            inputs = self.tracker.bind(inner, call.args, call.kwargs)
            self.inside.add(component)
            try:
                frames = self._frames_of(component)
                with self.tracker.frames(frames, call.moment, inner, inputs), self.blocks.watch(frames):
                    return original(module, *call.args, **call.kwargs)
            finally:
                self.inside.discard(component)

        return model

    def heard(self, component: str, inputs: dict[str, Any]) -> None:
        """A call of a denoiser is happening inside a compiled graph: the recipes around attention need its place."""
        module = self.entered.get(component)
        if module is not None and not self.slot.closed:
            self.tracker.heard(component, module, inputs)
            self.unheard.update(b.recipe.name for b in self._denoisers if b.covers(component))

    def _moment(self, component: str, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        inputs = self.tracker.bind(inner, args, kwargs)
        if self.adapter.family != "transformers":
            return self.tracker.moment(component, inputs)
        sequences = self.sequences
        if sequences.turn_to(inputs.get("past_key_values"), self.bound):
            self._new_schedule()
        return self.tracker.language_moment(sequences.current.step, sequences.past, sequences.current.memory)

    def _frames_of(self, component: str) -> tuple[str, ...]:
        """A language model is called as one component but its sites may belong to several towers."""
        if self.adapter.family == "transformers":
            return tuple(dict.fromkeys(s.component for s in self.sites)) or (component,)
        return (component,)

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running or not any(b.enabled for b in self.bound):
            return original(*args, **kwargs)
        options, rest = arguments.split(type(self.target), self._runners, kwargs)
        if arguments.unknown(type(self.target), rest):
            return original(*args, **rest)  # for the pipeline's own error, before any recipe has computed anything
        first = RunCall(self.target, args, rest)
        for bound in self._checkers:
            bound.recipe.check_call(first.replace(options=options.get(id(bound), {})))
        self.refresh()
        self.clear()
        self.forget()
        self.tracker.reset()
        chain = run_chain(self._runners, options, lambda call: original(*call.args, **call.kwargs))
        # how many steps an earlier run had announced must not pass for this run's
        announced = vars(self.target).pop("_num_timesteps", None)
        self.running += 1
        try:
            return chain(first)
        finally:
            self.running -= 1
            self.clear()  # states are of one run: they hold tensors as large as the attention
            for bound in self.bound:
                bound.carried.clear()
            if announced is not None:
                vars(self.target).setdefault("_num_timesteps", announced)

    # --- states -----------------------------------------------------------------------------------------------

    def _new_schedule(self) -> None:
        self.clear()
        if not self.running:
            self.forget()

    def clear(self) -> None:
        """Drop every recipe's state."""
        for bound in self.bound:
            bound.clear()

    def forget(self) -> None:
        """Start the ledgers anew."""
        for bound in self.bound:
            bound.ledgers.clear()


def find(target: Any) -> Installation | None:
    """The installation on a target, also when asked through a wrapper of it."""
    found = Installation.of(target)
    if found is None:
        adapter = adapter_for(target)
        for obj in (adapter.outer, adapter.target):
            found = found or Installation.of(obj)
    return found
