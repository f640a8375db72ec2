"""Knows, at every attention call, where the run is: step, guidance branch, shape of the visual tokens.

It listens to what every pipeline does: ``scheduler.set_timesteps`` and ``scheduler.step``, the denoiser being called,
and ``cache_context`` where a pipeline names its guidance passes. One tracker serves all recipes on a pipeline.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.context import AttentionCall, Grid, Moment


@dataclass
class Frame:
    """What is known while one denoiser call is running."""

    component: str
    moment: Moment
    inputs: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    ops: Counter[int] = field(default_factory=Counter)  # op calls so far by site, where nothing else counts them
    past: int | None = None  # tokens of a language model's sequence before this call
    told: bool = False  # whether the adapter has taken in what the call says of its tokens


# (denoiser, its inputs by name) -> shape of its visual tokens
GridRule = Callable[[torch.nn.Module, dict[str, Any]], Grid | None]
# fills in grid, text span and the like; the dictionary lasts until the run ends
PlaceRule = Callable[[AttentionCall, "Frame", dict[str, Any]], None]


class Tracker:
    """The clock and map of one patched target.

    Args:
        target: the pipeline (a weak reference is kept), or a bare model.
        grid_rules: per component.
        place: finds grid and text span of one attention call.
        on_reset: called when a new run begins, so that states can be cleared.
    """

    def __init__(
        self, target: Any, grid_rules: dict[str, GridRule], place: PlaceRule, on_reset: Callable[[], None]
    ) -> None:
        self._target = weakref.ref(target)
        self._grid_rules = grid_rules
        self._place = place
        self._on_reset = on_reset
        self._signatures: dict[type, tuple[list[str], str | None]] = {}
        self._frames: list[Frame] = []
        self._contexts: dict[str, str] = {}  # component -> name of the running cache_context
        self._loose: Frame | None = None
        self._recent: list[Frame] = []  # of the last call, for checkpointed blocks that run again in the backward
        self.blind = False  # whether attention ran where no call of the denoiser was seen
        self.clocked = False  # whether a scheduler tells the steps
        self.reset()

    # --- the clock --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """A new run begins."""
        self.step: int | None = 0 if self.clocked else None
        self.total: int | None = None
        self._unnamed: Counter[tuple[str, str]] = Counter()  # calls in this step, by (component, branch)
        self._batched: dict[str, int] = {}  # size of the batch that holds both guidance halves, else 0
        self._grids: dict[str, tuple[tuple[Any, ...], Grid | None]] = {}
        self.memory: dict[str, Any] = {}  # what an adapter wants to remember until the run ends
        self.past: int | None = None  # tokens in the cache of a language model when its forward began
        self._bare = _BareClock()
        self._heard: Frame | None = None  # of the last call inside a compiled graph, whose end nobody tells

    def timesteps_set(self, count: int) -> None:
        """The scheduler was given its timesteps."""
        self.clocked = True
        self.reset()
        self.step, self.total = 0, count
        self._on_reset()

    def stepped(self) -> None:
        """The scheduler made a step."""
        self.step = (self.step or 0) + 1
        self._unnamed.clear()

    # --- denoiser calls ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def context(self, component: str, name: str) -> Iterator[None]:
        """A pipeline named the guidance pass that follows."""
        before = self._contexts.get(component)
        self._contexts[component] = name
        try:
            yield
        finally:
            if before is None:
                self._contexts.pop(component, None)
            else:
                self._contexts[component] = before

    def inside(self, component: str) -> bool:
        """Whether a call of this component is running already."""
        return any(f.component == component for f in self._frames)

    def bind(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's inputs by name."""
        if not args:
            return dict(kwargs)
        names, rest = self._positional(type(module))
        over = args[len(names) :]
        if (over and rest is None) or any(name in kwargs for name in names[: len(args)]):
            return dict(kwargs)  # the call itself is wrong: the module will say so better than we can
        return dict(zip(names, args, strict=False)) | ({rest: over} if over and rest else {}) | kwargs

    def _positional(self, cls: type[torch.nn.Module]) -> tuple[list[str], str | None]:
        """Names of the arguments that a module takes by position, and of the one that collects any further ones."""
        if cls not in self._signatures:  # once a class: reading it costs more than many a call
            _, *parameters = inspect.signature(cls.forward).parameters.values()
            by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
            self._signatures[cls] = ([p.name for p in parameters if p.kind in by_place], rest)
        return self._signatures[cls]

    def moment(self, component: str, inputs: dict[str, Any]) -> Moment:
        """Step, total and branch of a denoiser call that is about to run."""
        step, total = self.step, self.total
        if not self.clocked:
            step = self._bare.read(inputs)
            if self._bare.restarted:
                self._batched.clear()
                self._on_reset()
        elif step == 0:
            total = self.total = self._announced(total)
        return Moment(step, total, self._branch(component, inputs))

    def _announced(self, total: int | None) -> int | None:
        """Image-to-image runs use a part of the timesteps; pipelines then announce how many."""
        count = getattr(self._target(), "_num_timesteps", None)
        return count if isinstance(count, int) and total and 0 < count < total else total

    def _branch(self, component: str, inputs: dict[str, Any]) -> str:
        name = self._contexts.get(component)
        if name not in (None, "cond_uncond"):
            return str(name)
        size = _batch(inputs)
        if component not in self._batched:
            self._batched[component] = size if self._is_batched(inputs) else 0
        # a further pass of the same step may run one half only, as skip-layer guidance does
        base = "batched" if size and size == self._batched[component] else "single"
        seen = self._unnamed[component, base]
        self._unnamed[component, base] += 1
        return base if seen == 0 or not self.clocked else f"{base}#{seen}"

    def _is_batched(self, inputs: dict[str, Any]) -> bool:
        """Whether one batch holds both guidance halves: the pipeline says so, or the latents are there twice.

        Two videos from the same noise are there twice as well: a guidance scale that asks for no guidance tells.
        """
        said = getattr(self._target(), "do_classifier_free_guidance", None)
        scale = getattr(self._target(), "guidance_scale", None)
        latents = inputs.get("hidden_states", inputs.get("sample"))
        if not isinstance(latents, torch.Tensor) or latents.shape[0] % 2 or latents.is_meta:
            return False
        if isinstance(said, bool):
            return said
        if isinstance(scale, int | float) and scale <= 1:
            return False
        half = latents.shape[0] // 2
        return bool(torch.equal(latents[:half], latents[half:]))

    def language_moment(self, step: int, past: int, memory: dict[str, Any]) -> Moment:
        """Of a language model's forward, which goes on after ``past`` tokens with a sequence's own memory."""
        self.step, self.past, self.memory = step, past, memory
        return Moment(step, None)

    @contextlib.contextmanager
    def frames(
        self, components: tuple[str, ...], moment: Moment, module: torch.nn.Module, inputs: dict[str, Any]
    ) -> Iterator[None]:
        """While the denoiser (or model) runs."""
        self._loose = self._heard = None
        frames = [Frame(c, moment, inputs, self._grid(c, module, inputs), past=self.past) for c in components]
        self._frames.extend(frames)
        try:
            yield
        finally:
            del self._frames[-len(frames) :]
            self._recent = frames if torch.is_grad_enabled() else []
            for frame in frames:
                frame.ops.clear()

    def heard(self, component: str, module: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """A denoiser call begins inside a compiled graph."""
        self._grids.pop(component, None)  # tensors of a graph may bear the identity of other ones that are gone
        moment = self.moment(component, inputs)
        self._heard = Frame(component, moment, inputs, self._grid(component, module, inputs))

    def _grid(self, component: str, module: torch.nn.Module, inputs: dict[str, Any]) -> Grid | None:
        rule = self._grid_rules.get(component)
        if rule is None:
            return None
        # some grids are read off tensors on the device: once per run, not once per call
        key = tuple(
            (name, id(value), tuple(value.shape))
            for name, value in sorted(inputs.items())
            if isinstance(value, torch.Tensor) and name in ("img_ids",)
        )
        known = self._grids.get(component)
        if key and known and known[0] == key:
            return known[1]
        grid = rule(module, inputs)
        self._grids[component] = (key, grid)
        return grid

    def moment_of(self, component: str) -> Moment:
        """Of the call of a component that is running; an empty one if none is."""
        known = self._frames or ([self._heard] if self._heard else [])
        if not known and torch._C._current_graph_task_id() != -1:  # a checkpointed block runs again in the backward
            known = self._recent
        return next((f.moment for f in reversed(known) if f.component == component), Moment())

    # --- attention calls --------------------------------------------------------------------------------------

    def fill(self, call: AttentionCall) -> None:
        """Tell an attention call where it is."""
        known = self._frames or ([self._heard] if self._heard else [])
        if not known and torch._C._current_graph_task_id() != -1:  # inside a backward pass
            known = self._recent
        for frame in reversed(known):
            if frame.component == call.site.component:
                call.moment = frame.moment
                self._place(call, frame, self.memory)
                return
        self.blind = self.blind or call.site.component != "vision"
        # called outside any denoiser: vision towers are, before the decoder that uses them
        self._loose = self._loose or Frame("", Moment(self.step if self.clocked else None, self.total))
        call.moment = self._loose.moment
        self._place(call, self._loose, self.memory)


def _batch(inputs: dict[str, Any]) -> int:
    latents = inputs.get("hidden_states", inputs.get("sample"))
    return int(latents.shape[0]) if isinstance(latents, torch.Tensor) and latents.ndim else 0


class _BareClock:
    """Counts steps of a bare denoiser by its ``timestep``: a new value is a new step, a jump back a new run."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.last: float | None = None
        self.direction = 0.0
        self.restarted = False

    def read(self, inputs: dict[str, Any]) -> int | None:
        self.restarted = False
        value = inputs.get("timestep")
        if isinstance(value, torch.Tensor):
            value = float(value.detach().float().max()) if value.numel() else None
        if value is None:
            return None
        value = float(value)
        if self.last is None:
            self.step, self.restarted = 0, True
        elif value != self.last:
            change = value - self.last
            if self.direction and change * self.direction < 0:
                self.step, self.direction, self.restarted = 0, 0.0, True
            else:
                self.direction = change
                self.step = (self.step or 0) + 1
        self.last = value
        return self.step
