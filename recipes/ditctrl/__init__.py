"""DiTCtrl: one long video from many prompts, and edits of a video by its words, without training.

"DiTCtrl: Exploring Attention Control in Multi-Modal Diffusion Transformer for Tuning-Free Multi-Prompt Longer Video
Generation", arXiv 2412.18597.

How the data flows in ``mode="longer"``::

    pipe(prompt=[p1, p2, ...], num_frames=<of one segment>)
      check_call  request.read: prompts, layout of the segments, tokens of the object; refuses what cannot be
      run         request.rewritten: a text for each segment, and a call for one video of F frames. The pipeline draws
                  its noise, and runs its own loop with its own scheduler and guidance, once.
      denoise     tiles.Step: the F frames are cut into segments. Each is forwarded on its own, as a video of L frames
                  whose positions begin at 0; the predictions are blended and given back as one of F frames.
                  The guidance halves of a segment stay together (or apart) as the pipeline has them.
      block       passes.around_block: up to the first block that shares keys a segment is the same as source and as
                  target, so it passes through these blocks once.
      attend      passes.around_attention: in the late blocks, in the window of steps, a target's queries look at the
                  keys and values of the segment before it: at all of them, or at the object's and at the rest apart.
                  Where the object is (maps.py) is read off the attention of the forward that is running.

An edit (``mode="swap"``, ``"reweight"``) is a batch of two videos from the same noise, the second of which takes keys
from the first; nothing is blended. What one forward needs to know is a ``passes.Pass``, which lies in ``call.shared``
while it runs. Nothing is carried from step to step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from patchkit.context import AttentionCall, BlockCall, DenoiseCall, RunCall
from patchkit.errors import InvalidOption, UnsupportedModel
from patchkit.recipe_base import Recipe
from patchkit.recipes.ditctrl import passes, progress, request
from patchkit.recipes.ditctrl.models import MODELS, model_of
from patchkit.recipes.ditctrl.tiles import Step
from patchkit.registry import recipe
from patchkit.selection import Indices, StepWindow
from patchkit.sites import Site

__all__ = ["DiTCtrl"]

logger = logging.getLogger(__name__)
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[int, Field(ge=0)]


@recipe("ditctrl")
@dataclass(frozen=True, kw_only=True)
class DiTCtrl(Recipe):
    """One long video from a list of prompts, or a video beside its edit by a changed or reweighted word.

    After :func:`patchkit.apply`, ``pipe(prompt=[first, second, ...], num_frames=...)`` gives one video, whose segments
    of ``num_frames`` frames overlap and are blended at every step; in late blocks each segment looks at the keys of the
    one before it. With ``mode="swap"``, ``pipe(prompt=[source, target])`` gives both videos from one noise, the second
    with the layout of the first. With ``mode="reweight"``, ``pipe(prompt)`` gives the video and one in which words
    count more or less. A single prompt in ``mode="longer"`` is the pipeline's own call.

    Paper: DiTCtrl: Exploring Attention Control in Multi-Modal Diffusion Transformer for Tuning-Free Multi-Prompt Longer
    Video Generation, arXiv 2412.18597. What goes beyond paper and official code is marked *ours*.

    Args:
        overlap: o, latent frames that neighbouring segments share. The paper has 6 of 13, the released code 9.
        transitions: n, segments between two prompts, whose text is a mixture of both. Paper 1, released code 2.
        extra_middle: e, further segments of each prompt between the first and the last.
        kv_layers: blocks in which keys are shared, as "25-29" or "-5-"; None = the last sixth.
        kv_steps: when keys are shared: fractions of the run (floats) or step numbers (ints), the end not included.
            None = never: blending only.
        mask_guided: share the object's keys with the object and the rest with the rest. Needs ``objects``; without
            them keys are shared as a whole, which the report says.
        threshold: from which value on, after stretching each frame's map to [0, 1], a token is the object's.
        objects: the object's word (or words in a row) in all prompts, or a list with one for each. ``pipe(...,
            objects=...)`` has precedence. Between prompts that are mixed it must stand at the same place.
        mode: ``"longer"``, ``"swap"`` or ``"reweight"``.
        reweight: word -> factor, for ``mode="reweight"``: 0 removes it, 0.5 weakens, above 1 strengthens.
        reweight_by: ``"prob"``: the factor multiplies the attention after the softmax, which is not normalised again.
            ``"logit"``: it is added before the softmax (0 changes nothing, -5 weakens): another function.
        map: where the object is: from the attention of the video to the word ("v2t"), or the mean of that and of the
            word's to the video ("avg").
        zero_uncond: put zeros in the place of the unconditional text, as the official code does. Only where the model
            was trained with them (CogVideoX); others take the pipeline's negative prompt in any case (*ours*).
    """

    overlap: Number = 6
    transitions: Number = 1
    extra_middle: Number = 0
    kv_layers: str | int | list[int] | None = None
    kv_steps: tuple[int | float, int | float] | None = (0.04, 0.5)
    mask_guided: bool = True
    threshold: float = 0.3
    objects: str | list[str] | None = None
    mode: Literal["longer", "swap", "reweight"] = "longer"
    reweight: dict[str, float] | None = None
    reweight_by: Literal["prob", "logit"] = "prob"
    map: Literal["v2t", "avg"] = "v2t"
    zero_uncond: bool = True

    summary: ClassVar[str] = "one long video from many prompts, and edits of a video by its words"
    paper: ClassVar[str] = (
        "DiTCtrl: Exploring Attention Control in Multi-Modal Diffusion Transformer for Tuning-Free Multi-Prompt Longer "
        "Video Generation (arXiv 2412.18597)"
    )
    effect: ClassVar[Literal["replaces", "adjusts"]] = "adjusts"
    families: ClassVar[tuple[str, ...]] = ("diffusers",)
    models: ClassVar[tuple[str, ...]] = tuple(model.name for model in MODELS.values())
    arguments: ClassVar[dict[str, str]] = {"objects": "the object's word in all prompts, or one for each"}
    # the weak pass is of the whole video, tile by tile; heads are pushed toward the clip's own values
    after: ClassVar[tuple[str, ...]] = ("softpag",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"overlap": 6, "transitions": 1},
        "released": {"overlap": 9, "transitions": 2, "mask_guided": False},
    }

    deduplicates: ClassVar[bool] = True  # tests compare with the pairs computed one by one

    # --- options ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Where and when keys are shared is said by options of its own: the tiling has to be there at every call."""
        for name in ("layers", "steps", "targets", "exclude"):
            if getattr(self, name) is not None:
                remedy = {"layers": "kv_layers", "steps": "kv_steps"}.get(name)
                raise InvalidOption(
                    "this recipe stands around every call of the denoiser",
                    f"recipe {self.name!r}, option {name!r}",
                    f"use {remedy}" if remedy else "leave it out",
                )
        Indices.parse(self.kv_layers, f"recipe {self.name!r}, option 'kv_layers'")
        StepWindow.parse(self.kv_steps, f"recipe {self.name!r}, option 'kv_steps'")
        if (self.mode == "reweight") != bool(self.reweight):
            raise InvalidOption(
                f'mode="{self.mode}" and reweight={self.reweight}',
                f"recipe {self.name!r}, option 'reweight'",
                'give mode="reweight" and reweight={word: factor}, or neither',
            )
        if self.reweight_by == "prob" and any(factor < 0 for factor in (self.reweight or {}).values()):
            raise InvalidOption(
                f"a negative factor in {self.reweight}",
                f"recipe {self.name!r}, option 'reweight'",
                'give factors from 0 on, or reweight_by="logit", which adds them to the logits',
            )

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """Refuse pipelines whose tiles or texts are not known, and layers that are not there."""
        model = model_of(target)
        if self.map == "avg" and model.maps == "cross":
            raise InvalidOption(
                f'map="avg": {type(target).__name__} has no attention from words to video',
                f"recipe {self.name!r}, option 'map'",
                'use map="v2t"',
            )
        for component, count in {s.component: s.layers for s in sites}.items():
            if model.maps == "cross" and self.mask_guided and 0 in self.shared_layers(count) and count > 1:
                raise InvalidOption(
                    "keys shared in block 0, before any attention to the words says where the object is",
                    f"recipe {self.name!r}, option 'kv_layers'",
                    "begin at block 1, or set mask_guided=False",
                )
            beyond = Indices.parse(self.kv_layers, "kv_layers").beyond(count)
            if beyond:
                raise InvalidOption(
                    f"{', '.join(beyond)} selects none of the {count} blocks of {component}",
                    f"recipe {self.name!r}, option 'kv_layers'",
                    f"0 to {count - 1}",
                )
            there = {s.layer for s in sites if s.component == component and s.kind != "cross"}
            missing = sorted(self.shared_layers(count) - there)
            if missing:
                raise UnsupportedModel(
                    f"the attention of blocks {missing} cannot be reached, so no keys could be shared there",
                    f"recipe {self.name!r} on {component}",
                    "print(patchkit.plan(pipe, 'ditctrl')) says why; or choose other kv_layers",
                )

    def shared_layers(self, count: int) -> frozenset[int]:
        """The blocks in which keys are shared, of ``count``: by default the last sixth."""
        if self.kv_layers is None:
            return frozenset(range(count - max(1, round(count / 6)), count))
        return Indices.parse(self.kv_layers, "kv_layers").resolve(count)

    def figures(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """What computing each segment once saves."""
        counts = totals["counts"]
        naive = counts.get("block forwards without sharing", 0)
        done = counts.get("block forwards", 0)
        return {"block forwards, share of those without sharing": done / naive} if naive and done else {}

    # --- the four places --------------------------------------------------------------------------------------

    def check_call(self, call: RunCall) -> None:
        """Everything that can be wrong with a call."""
        request.read(self, call)

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        """Make one call of the pipeline for all clips."""
        asked = request.read(self, call)
        if asked is None:
            return next(call)
        if asked.plain:
            call.ledger.note(segments=1)
            return next(call)
        guided = self.mask_guided and self.mode != "reweight" and self.kv_steps is not None
        if guided and asked.clips[0].tokens is None:
            why = "no objects were named (objects=...), so keys are shared as a whole"
            call.ledger.caution("sharing without masks", why)
            logger.warning("ditctrl: %s", why)
        kwargs, texts = request.rewritten(self, asked)
        if self.mode == "longer":
            call.ledger.note(segments=len(asked.clips), latent_frames=asked.layout.frames)
            if asked.model.remark:
                call.ledger.note(schedule=asked.model.remark)
        with progress.bar(call.pipeline, len(asked.clips)) as shown:
            call.carried.update(request=asked, texts=texts, progress=shown)
            return next(call.replace(args=(), kwargs=kwargs))

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        """The prediction of a long video, or of two videos, from those of its clips."""
        return Step(self, call, next).result() if "request" in call.carried else next(call)

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        """What both roles of a segment have in common is computed once."""
        return passes.around_block(call, next)

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        """Leave keys for the next clip, or take those of the one before."""
        return passes.around_attention(self, call, next)
