"""The denoiser's call, cut into clips: which forwards are made in which order, and how their results become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.context import DenoiseCall, Moment
from patchkit.guidance import prediction, with_prediction
from patchkit.recipes.ditctrl import passes
from patchkit.recipes.ditctrl.passes import OpKey, Pass, Prefix
from patchkit.recipes.ditctrl.request import Request
from patchkit.recipes.ditctrl.segments import Blend
from patchkit.recipes.ditctrl.sharing import Source
from patchkit.selection import StepWindow

if TYPE_CHECKING:
    from patchkit.recipes.ditctrl import DiTCtrl

Denoise = Callable[[DenoiseCall], Any]
LAYOUT_STEPS = 2  # in which a reweighted video takes all keys of the unchanged one, so that their layouts agree


class Step:
    """One call of the denoiser for all clips.

    Args:
        recipe: whose options count.
        call: the pipeline's call, of the whole video or of both videos of an edit.
        next: the denoiser.
    """

    def __init__(self, recipe: DiTCtrl, call: DenoiseCall, next: Denoise) -> None:
        self.recipe, self.call, self.denoiser = recipe, call, next
        self.request: Request = call.carried["request"]
        self.texts: list[dict[str, Tensor]] = call.carried["texts"]
        self.model, self.layout, self.clips = self.request.model, self.request.layout, self.request.clips
        self.long = recipe.mode == "longer"
        self.latents: Tensor = call.kwargs["hidden_states"]
        if self._packed:
            self.latents = self.latents.unflatten(1, (self.layout.frames, -1))
        window = StepWindow.parse(recipe.kv_steps, "kv_steps") if recipe.kv_steps is not None else None
        shares = window is not None and window.contains(call.step, call.total)
        self.blocks = min(s.layers for s in call.sites if s.component == call.component)
        self.layers: frozenset[int] = recipe.shared_layers(self.blocks) if shares else frozenset()
        self.raw: Any = None  # what the denoiser returned last
        self.halves = self.latents.shape[0] // (1 if self.long else 2)
        kept = call.shared.get(("bits", call.component))
        if kept is None or kept[0] != call.step:
            kept = call.shared["bits", call.component] = (call.step, {})
        self.store: dict[Any, Any] = kept[1]
        passes.refuse_caches(call, recipe)

    def result(self) -> Any:
        """What the denoiser would have returned for what the pipeline passed."""
        found = self._long() if self.long else self._pair()
        found = found.flatten(1, 2) if self._packed else found
        return with_prediction(self.raw, found)

    # --- one long video ---------------------------------------------------------------------------------------

    def _long(self) -> Tensor:
        """Each adjacent pair predicts its first segment as source and its second as target; all are blended.

        So an inner segment is predicted twice, once in each role. Outside the window of steps both are the same.
        """
        blend = Blend(self.layout, self.model.axis)
        count = len(self.clips)
        self._note_naive(2 * (count - 1))
        if not self.recipe.deduplicates:
            return self._naive(blend)
        before: dict[OpKey, Source] | None = None
        for k in range(count):
            first, last = k == 0, k == count - 1
            if not self.layers:
                blend.add(k, self._forward(k, "source"), times=1 if first or last else 2)
                continue
            left: dict[OpKey, Source] | None = None if last else {}
            prefix = None if first or last else Prefix()
            source = None if last else self._forward(k, "source", leaves=left, prefix=prefix)
            if not first:
                blend.add(k, self._forward(k, "target", takes=before, prefix=prefix))
            if source is not None:
                blend.add(k, source)
            before = left
        return blend.result()

    def _naive(self, blend: Blend) -> Tensor:
        """Pair by pair, nothing shared between the pairs: what :meth:`_long` has to equal."""
        for k in range(len(self.clips) - 1):
            left: dict[OpKey, Source] | None = {} if self.layers else None
            blend.add(k, self._forward(k, "source", leaves=left))
            blend.add(k + 1, self._forward(k + 1, "target" if self.layers else "source", takes=left))
        return blend.result()

    # --- two videos -------------------------------------------------------------------------------------------

    def _pair(self) -> Tensor:
        """The unchanged video first, then the changed one; put back in the pipeline's order."""
        everywhere = self.recipe.mode == "reweight"
        if everywhere:
            self.layers = frozenset()
        early = everywhere and (self.call.step or 0) < LAYOUT_STEPS
        self._note_naive(2)
        left: dict[OpKey, Source] | None = {} if self.layers or early else None
        source = self._forward(0, "source", leaves=left, everywhere=early)
        role = "target" if left is not None or everywhere else "source"
        target = self._forward(1, role, takes=left, everywhere=early)
        rows = [x for half in range(self.halves) for x in (source[half : half + 1], target[half : half + 1])]
        return torch.cat(rows)

    # --- one forward ------------------------------------------------------------------------------------------

    def _forward(
        self,
        number: int,
        role: Any,
        leaves: dict[OpKey, Source] | None = None,
        takes: dict[OpKey, Source] | None = None,
        prefix: Prefix | None = None,
        everywhere: bool = False,
    ) -> Tensor:
        """The prediction of a clip, with the halves of guidance that the pipeline's call has."""
        tile, found = self._tile(number), []
        for call in self._halves(tile):
            now = Pass(
                clip=self.clips[number],
                role=role,
                layers=self.layers,
                sample=call.kwargs["hidden_states"].shape[0] - 1,
                store=self.store,
                leaves=leaves,
                takes=takes,
                prefix=prefix,
                replays=prefix is not None and role == "target",
                everywhere=everywhere,
            )
            self.raw = passes.forward(self.recipe, call, self.denoiser, now)
            found.append(prediction(self.raw, call))
        self.call.carried["progress"].forwarded((self.call.step, self.call.branch), number)
        out = torch.cat(found[::-1]) if len(found) > 1 else found[0]
        return out.unflatten(1, (self.layout.length, -1)) if self._packed else out

    def _halves(self, tile: DenoiseCall) -> list[DenoiseCall]:
        """The forwards of a clip: one, or the conditional half and then the unconditional one."""
        if not self.model.splits or self.halves == 1:
            return [tile]
        out = []
        for row, branch in ((1, "cond"), (0, "uncond")):
            kwargs = {
                name: x[row : row + 1] if isinstance(x, Tensor) and x.ndim and x.shape[0] == 2 else x
                for name, x in tile.kwargs.items()
            }
            moment = tile.moment
            out.append(tile.replace(kwargs=kwargs, moment=Moment(moment.step, moment.total, branch)))
        return out

    @property
    def _packed(self) -> bool:
        return self.model.packed and self.long

    def _tile(self, number: int) -> DenoiseCall:
        """The call of one clip."""
        kwargs = dict(self.call.kwargs)
        if self.long:
            part = self.latents.narrow(self.model.axis, self.layout.span(number).start, self.layout.length)
            kwargs["hidden_states"] = part.flatten(1, 2) if self._packed else part
            if self._packed:
                kwargs["num_frames"] = self.layout.length
            kwargs |= self._texts(number)
            self._cut_positions(kwargs)
        else:
            size = self.latents.shape[0]
            for name, x in kwargs.items():
                if isinstance(x, Tensor) and x.ndim and x.shape[0] == size and name != self.model.rotary:
                    kwargs[name] = x[number::2]
        moment = self.call.moment
        branch = moment.branch
        if branch in ("batched", "single"):  # two videos from the same noise look like two halves of guidance
            branch = "batched" if self.halves == 2 else "single"
        return self.call.replace(kwargs=kwargs, moment=Moment(moment.step, moment.total, branch))

    def _texts(self, number: int) -> dict[str, Tensor]:
        """The segment's words for the conditional half; the unconditional one keeps what the pipeline passed."""
        if self.call.branch == "uncond":
            return {}
        found = {}
        for name in self.model.texts:
            given = self.call.kwargs[name]
            own = self.texts[number][name].to(given.device, given.dtype)
            found[name] = torch.cat([given[: self.halves - 1], own]) if self.halves > 1 else own
        return found

    def _cut_positions(self, kwargs: dict[str, Any]) -> None:
        """Positions begin anew in each segment: the first rows of the tables are those of a video of its length."""
        tables = kwargs.get(self.model.rotary) if self.model.rotary else None
        if tables is not None:
            whole = self.latents.shape[self.model.axis]
            rows = [len(x) * self.layout.length // whole for x in tables]
            kwargs[str(self.model.rotary)] = tuple(x[:n] for x, n in zip(tables, rows, strict=True))

    def _note_naive(self, forwards: int) -> None:
        times = forwards * (2 if self.model.splits and self.halves == 2 else 1)
        self.call.ledger.count("block forwards without sharing", times * self.blocks)
