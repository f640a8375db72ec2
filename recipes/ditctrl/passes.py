"""Inside one call of the denoiser: a forward for each clip, what one clip leaves for the next, what is computed once.

A *clip* is a segment of a long video, or one of the two videos of an edit. It is forwarded in the role of the *source*,
with its own keys, and, where keys are shared, in that of the *target*, with the keys of the clip before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from patchkit.adapters.diffusers import hook_names
from patchkit.context import AttentionCall, BlockCall, DenoiseCall, Moment
from patchkit.errors import Conflict, PatchkitError
from patchkit.recipes.ditctrl import maps, reweighting, sharing
from patchkit.recipes.ditctrl.maps import RunningMap
from patchkit.recipes.ditctrl.sharing import Source

if TYPE_CHECKING:
    from patchkit.recipes.ditctrl import DiTCtrl

Role = Literal["source", "target"]
OpKey = tuple[str, str, int]  # guidance pass, attention module, op call of it
NOW = "now"  # where the running pass is found by the wrappers further inside
CACHES = ("cache", "fbc", "pyramid_attention", "taylorseer")  # in the names of diffusers' hooks
COMPUTES = ("cond", "single", "batched")  # passes whose maps say where the object is; the others take their bits


@dataclass(frozen=True)
class Clip:
    """One clip, as attention and blocks need to know it.

    Attributes:
        number: of the clip.
        tokens: places of the object's tokens in its text, None without masks.
        scales: place of a token -> factor, where words are reweighted.
    """

    number: int
    tokens: tuple[int, ...] | None = None
    scales: tuple[tuple[int, float], ...] = ()


@dataclass
class Prefix:
    """What both roles of a clip have in common: the blocks before the first one that shares keys."""

    outputs: dict[tuple[str, str], Any] = field(default_factory=dict)  # by guidance pass and list of the block
    map: RunningMap | None = None


@dataclass
class Pass:
    """The forward that is running.

    Attributes:
        clip: which one.
        role: source or target.
        layers: blocks in which keys are shared; empty outside the window of steps.
        leaves: filled with what the next clip will need; None if none comes.
        takes: what the clip before has left.
        prefix: filled by the source (``replays`` is off), handed out by the target.
        replays: whether blocks of the prefix are left out.
        sample: which sample of the batch is the conditional one.
        store: (clip, role, op) -> object's bits of this step, for the guidance passes that follow.
        everywhere: keys are shared in all blocks (the first steps of a reweighted video).
    """

    clip: Clip
    role: Role
    layers: frozenset[int]
    sample: int
    store: dict[Any, Tensor]
    leaves: dict[OpKey, Source] | None = None
    takes: dict[OpKey, Source] | None = None
    prefix: Prefix | None = None
    replays: bool = False
    everywhere: bool = False
    map: RunningMap = field(default_factory=RunningMap)
    used: set[int] = field(default_factory=set)  # layers whose keys were left or taken

    @property
    def first(self) -> int:
        """The first block that shares keys."""
        return min(self.layers, default=-1)

    def shares(self, layer: int) -> bool:
        """Whether keys are shared in a block."""
        return self.everywhere or layer in self.layers


def forward(recipe: DiTCtrl, call: DenoiseCall, next: Callable[[DenoiseCall], Any], now: Pass) -> Any:
    """One forward of one clip; gives what the denoiser returns."""
    part = f"{now.clip.number}-{now.role}" if now.role == "target" else str(now.clip.number)
    moment = call.moment
    given = call.replace(moment=Moment(moment.step, moment.total, moment.branch, part))
    call.shared[NOW] = now
    call.ledger.count("forwards")
    try:
        out = next(given)
    finally:
        del call.shared[NOW]
    if now.takes is not None or now.leaves is not None:
        _check_used(recipe, call, now)
    return out


def _check_used(recipe: DiTCtrl, call: DenoiseCall, now: Pass) -> None:
    """Attention that nobody led here would leave the clips apart without a word."""
    missing = sorted(now.layers - now.used)
    if missing and call.moment.branch in (*COMPUTES, "uncond"):
        raise PatchkitError(
            f"the attention of blocks {missing} did not come by, so no keys were shared there",
            f"{call.component}, step {call.step}",
            "something replaced its processors after the patch (patch.report() names it), or the model is compiled "
            f"whole: apply {recipe.name} last, or undo that",
        )


def refuse_caches(call: DenoiseCall, recipe: DiTCtrl) -> None:
    """Raise :class:`Conflict` where a step cache of diffusers stands: it skips blocks by what one call before did."""
    key = ("no caches", call.component)
    if key not in call.shared:
        found = sorted(name for name in hook_names(call.module) if any(word in name for word in CACHES))
        if found:
            raise Conflict(
                f"a step cache ({', '.join(found)}) reuses what the call before left, and {recipe.name} makes a call "
                "for each segment",
                call.component,
                f"{call.component}.disable_cache()",
            )
        call.shared[key] = True


def around_block(call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
    """Blocks before the first that shares keys run once for both roles of a clip."""
    now: Pass | None = call.shared.get(NOW)
    if now is None:
        return next(call)
    prefix = now.prefix
    name = (call.branch, call.block.stack if call.block.chained else call.block.name)
    if prefix is None or now.everywhere or call.layer >= now.first:
        return _counted(call, next)
    if now.replays:
        if name not in prefix.outputs:
            return _counted(call, next)
        call.ledger.count("shared blocks")
        return prefix.outputs[name]
    out = _counted(call, next)
    if call.block.must_run is None:
        prefix.outputs[name] = out
    return out


def _counted(call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
    call.ledger.count("block forwards")
    return next(call)


def around_attention(recipe: DiTCtrl, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
    """One attention op of the running pass."""
    now: Pass | None = call.shared.get(NOW)
    if now is None:
        return next(call)
    if now.clip.scales:
        return _reweighted(recipe, now, call, next)
    if not now.layers and not now.everywhere:
        return next(call)
    computes = now.clip.tokens is not None and call.moment.branch in COMPUTES
    # a cross-attention comes after the attention of its block that shares keys
    last = max(now.layers, default=-1) - (call.site.kind == "cross")
    maps_here = computes and call.site.layer <= last and call.site.kind != "self"
    if call.site.kind == "cross":
        out, lse = maps.own_attention(call, next, now.sample) if maps_here else (next(call), None)
        if lse is not None:
            _add_map(recipe, now, call, lse)
        return out
    if not now.shares(call.site.layer):
        out, lse = maps.own_attention(call, next, now.sample) if maps_here else (next(call), None)
        if lse is not None:
            _add_map(recipe, now, call, lse)
        return out
    now.used.add(call.site.layer)
    return _sharing(recipe, now, call, next, maps_here)


def _sharing(
    recipe: DiTCtrl, now: Pass, call: AttentionCall, next: Callable[[AttentionCall], Tensor], maps_here: bool
) -> Tensor:
    """An op at which keys are shared: leave one's own, or take those of the clip before."""
    op = (call.branch, call.site.name, call.index)
    _go_on_from_prefix(now)
    if now.role == "source":
        out, lse = maps.own_attention(call, next, now.sample) if maps_here else (next(call), None)
        bits = _bits(recipe, now, call, lse)
        if now.leaves is not None:
            now.leaves[op] = Source(call.k.clone(), call.v.clone(), call.mask, bits)  # a compiled graph reuses them
        return out
    assert now.takes is not None
    lse = maps.lse_of(call, now.sample) if maps_here else None
    bits = _bits(recipe, now, call, lse)
    source = now.takes[op]
    call.ledger.count("shared ops")
    if bits is None:
        return sharing.shared(call, source, next)
    call.ledger.count("guided ops")
    assert source.bits is not None
    call.ledger.average(object_share=(bits.float().mean(), 1), source_object_share=(source.bits.float().mean(), 1))
    return sharing.guided(call, source, bits, next)


def _add_map(recipe: DiTCtrl, now: Pass, call: AttentionCall, lse: Tensor) -> None:
    """Count the map of a layer in."""
    assert now.clip.tokens is not None
    now.map.add(maps.word_map(call, lse, now.sample, now.clip.tokens, recipe.map))
    if now.prefix is not None and not now.replays and call.site.layer < now.first:
        now.prefix.map = now.map.copy()


def _go_on_from_prefix(now: Pass) -> None:
    """After a replayed prefix, which calls no attention, the map goes on from where the prefix ended."""
    if now.replays and not now.map.layers and now.prefix is not None and now.prefix.map is not None:
        now.map = now.prefix.map.copy()


def _bits(recipe: DiTCtrl, now: Pass, call: AttentionCall, lse: Tensor | None) -> Tensor | None:
    """The object's bits at an op: from the running map, or those that the conditional pass found."""
    if now.clip.tokens is None:
        return None
    key = (now.clip.number, now.role, call.site.layer)
    if call.moment.branch in COMPUTES:
        if lse is not None:
            _add_map(recipe, now, call, lse)
        if call.grid is None:
            raise PatchkitError(
                "nobody tells the shape of the video tokens here",
                call.site.full_name,
                "mask_guided=False shares keys without it",
            )
        now.store[key] = now.map.bits(call.grid, recipe.threshold)
    elif key not in now.store:
        raise PatchkitError(
            "this guidance pass runs before the conditional one, whose masks it needs",
            f"{call.site.full_name}, pass {call.branch!r}",
            "mask_guided=False shares keys without masks",
        )
    return now.store[key]


def _reweighted(recipe: DiTCtrl, now: Pass, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
    """An op of the video whose words are reweighted."""
    if now.everywhere and call.site.kind != "cross":
        assert now.takes is not None
        source = now.takes[call.branch, call.site.name, call.index]
        call = call.replace(k=source.k, v=source.v, mask=source.mask)
        call.ledger.count("shared ops")
    if call.site.kind != "self":
        call.ledger.count("reweighted ops")
    return reweighting.reweighted(call, now.clip.scales, recipe.reweight_by, next)
