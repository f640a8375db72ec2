"""VAR: what attention sinks of a vision-language model soak up goes to the image instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor

from patchkit.context import AttentionCall, BlockInput
from patchkit.recipe_base import Recipe
from patchkit.recipes.var import models, pictures
from patchkit.recipes.var.channels import Channels
from patchkit.recipes.var.edit import Strength, edit, fused
from patchkit.recipes.var.pictures import sink_map, sink_picture
from patchkit.recipes.var.probing import Probe, probe
from patchkit.recipes.var.sinks import KeyMap, Marks, classified, key_map
from patchkit.registry import recipe
from patchkit.sites import Site

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Probe", "Var", "probe", "sink_map", "sink_picture"]

Share = Annotated[float, Field(ge=0, le=1)]

UNSEEN = "the beginning of this sequence went by unseen (before the patch, or in a copy of its cache)"
UNPLACED = "where the images are is not known (give input_ids or mm_token_type_ids)"


class Prepared(NamedTuple):
    """What was found out about the model."""

    channels: Channels


@recipe("var")
@dataclass(frozen=True, kw_only=True)
class Var(Recipe):
    """Visual attention redistribution: attention goes from sinks to the image, in heads that look at the image.

    Some tokens, most of them background patches or the first token, draw attention whatever is asked. They are told by
    a few channels of the hidden state that are huge there. For each text query, heads that look at the image, and not
    mostly at sinks, give a share of the attention they spend on all sinks to the other image tokens. Rows still sum to
    1; image queries, other heads and what is cached stay as they are, to the bit.

    Paper: See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025, arXiv 2503.03321. The
    released code counts two options the other way round (its ``p`` is 1 - ``recycle``, its ``rho`` 1 - ``rho``) and
    compares with > where the paper has >=; a ``tau`` larger by a hair says the same.

    The presets are ``"paper"`` (rho 0.8, recycle 0.6) and ``"repo"``, what the released configuration does (rho 0.5,
    recycle 0.4). Reported gains are small and reproductions differ: compare with and without.

    Args:
        tau: a token is a sink from this |x| / RMS(x) on, in one of the sink channels. At most sqrt(width), so that 20
            never happens on models 400 wide or less; the same number is a larger share of a narrower model's energy.
        rho: heads are edited if at least this share of their visual attention lies outside the sinks. The paper has
            0.8 in general, 0.5 against hallucination, 0.9 for vision-centric tasks. Above 1 nothing is edited.
        recycle: share of the attention to sinks that is moved.
        min_visual: heads are edited if at least this much of their attention goes to visual tokens.
        sink_dims: sink channels; None = those known of this model (``patchkit.recipes.var.probe`` finds them).
        require_visual_sink: leave a layer alone in which no visual token is a sink, as the released code does. Off:
            attention to text sinks, such as the first token, is moved there as well.
        track_generated: generated tokens can be sinks as well; off: only those of the prompt.
        preset: ``"paper"`` or ``"repo"``; other options win over it.
    """

    layers: str | int | list[int] | None = "2:-1"
    tau: Annotated[float, Field(gt=0)] = 20.0
    rho: Annotated[float, Field(ge=0)] = 0.5
    recycle: Share = 0.6
    min_visual: Share = 0.2
    sink_dims: list[Annotated[int, Field(ge=0)]] | None = None
    require_visual_sink: bool = True
    track_generated: bool = False

    summary: ClassVar[str] = "moves attention from sinks to the image, in the heads that look at it"
    paper: ClassVar[str] = "See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv 2503.03321)"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    families: ClassVar[tuple[str, ...]] = ("transformers",)
    models: ClassVar[tuple[str, ...]] = ("llava", "qwenvl", "internvl", "idefics3", "paligemma", "gemma3")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"rho": 0.8, "recycle": 0.6},
        "repo": {"rho": 0.5, "recycle": 0.4},
    }

    def accepts(self, site: Site) -> str | None:
        """Self-attention of the language model."""
        return "the vision tower is never touched" if site.component == "vision" else None

    def prepare(self, target: Any, sites: list[Site]) -> Prepared:
        """Check that the method means something on this model, and find its sink channels."""
        where = f"recipe {self.name!r} on {type(target).__name__}"
        models.check(target, sites, where)
        return Prepared(models.channels(target, sites, self.sink_dims, where))

    @classmethod
    def pictures(cls, account: Mapping[str, Any]) -> dict[str, Image]:
        """Where the sinks lie in each image; see :func:`sink_picture`."""
        return pictures.all_pictures(account)

    # --- while the model runs ---------------------------------------------------------------------------------

    def enter(self, call: BlockInput) -> None:
        """Find the sinks of a layer in what enters it."""
        known: dict[int, Marks | None] = call.shared.setdefault("marks", {})
        known[call.layer] = classified(
            known.get(call.layer),
            call.hidden,
            call.past or 0,
            call.prepared.channels.dims,
            self.tau,
            self.track_generated,
        )

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        """The model's own op, then the edit of its text rows."""
        channels: Channels = call.prepared.channels
        if channels.status == "candidate":
            call.ledger.caution(
                "unverified sink channels", f"{channels.source}; patchkit.recipes.var.probe checks them"
            )
        keys = self._keys(call)
        if isinstance(keys, str):
            call.ledger.ran_dense(keys)
            return next(call)
        if keys.edits is None or not channels.dims or self.recycle == 0 or self.rho > 1:
            call.ledger.count("calls with nothing to move")
            return next(call)
        strength = Strength(self.recycle, self.rho, self.min_visual)
        call.ledger.count("calls edited")
        out = fused(call, keys, strength) if next is call.site.terminal else None
        return edit(call, next(call), keys, strength) if out is None else out

    def _keys(self, call: AttentionCall) -> KeyMap | str:
        """What each key is, or why that is not known."""
        if call.unreadable_mask is not None:
            return call.unreadable_mask
        marks: Marks | None = call.shared.get("marks", {}).get(call.site.layer)
        if call.visual is None or call.real is None or call.first is None:
            return UNSEEN if call.first or call.dropped else UNPLACED
        if marks is None or {call.visual.shape[0], marks.sink.shape[0]} != {call.q.shape[0]}:
            return UNSEEN
        known: KeyMap | None = call.state.get("keys")
        if known is not None and not self.track_generated and known.goes_on(call):
            keys = known.with_one_more(call.k.shape[2])
        else:
            keys = key_map(call, marks, self.require_visual_sink)
            if call.q.shape[2] > 1:
                call.ledger.note(**pictures.counts(keys))
        call.state["keys"] = keys
        return keys
