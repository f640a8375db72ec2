"""The links of a chain: one recipe around the rest of it, inside its window of steps, with its state and ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from patchkit.bound import Bound
from patchkit.context import (
    AroundBlock,
    Attend,
    AttentionCall,
    BlockCall,
    BlockInput,
    Denoise,
    DenoiseCall,
    Run,
    RunCall,
)
from patchkit.errors import PatchkitError
from patchkit.sites import Site


def attend_chain(site: Site, bounds: list[Bound]) -> Attend | None:
    """Around the op of one site, ``bounds`` outermost first; None where nothing stands around it."""
    chain: Attend | None = None
    for bound in reversed(bounds):
        assert site.terminal is not None
        chain = _around_attend(bound, chain or site.terminal)
    return chain


def _around_attend(bound: Bound, inner: Attend) -> Attend:
    recipe, window = bound.recipe, bound.window

    def attend(call: AttentionCall) -> Tensor:
        moment = call.moment
        if not window.contains(moment.step, moment.total):
            return inner(call)
        site = call.site
        ledger = bound.ledger((site.component, site.name, moment.branch, call.index))
        ledger.calls += 1
        state = bound.state((site.component, site.name, moment.place, call.index))
        given = call.replace(state=state, shared=bound.shared, ledger=ledger, prepared=bound.prepared)
        out = recipe.attend(given, inner)
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


def around_denoise(bound: Bound, component: str, inner: Denoise) -> Denoise:
    """One recipe around a denoiser's forward."""

    def denoise(call: DenoiseCall) -> Any:
        if not bound.window.contains(call.step, call.total):
            return inner(call)
        ledger = bound.ledger((component, "", call.branch, 0))
        ledger.calls += 1
        ours: dict[str, Any] = {"state": bound.state((component, "", call.moment.place, 0)), "shared": bound.shared}
        given = call.replace(sites=bound.sites, carried=bound.carried, ledger=ledger, **ours)
        return bound.recipe.denoise(given, inner)

    return denoise


def around_block(bound: Bound, inner: AroundBlock) -> AroundBlock:
    """One recipe around a transformer block."""

    def block(call: BlockCall) -> Any:
        moment = call.moment
        if not bound.window.contains(moment.step, moment.total):
            return inner(call)
        return bound.recipe.block(call.replace(**_of_block(bound, call), prepared=bound.prepared), inner)

    return block


def enter_block(bound: Bound, call: BlockInput) -> None:
    """Show one recipe what enters a transformer block."""
    if bound.window.contains(call.step, call.total):
        bound.recipe.enter(dataclasses.replace(call, **_of_block(bound, call), prepared=bound.prepared))


def _of_block(bound: Bound, call: BlockCall | BlockInput) -> dict[str, Any]:
    block, moment = call.block, call.moment
    return {
        "state": bound.state((block.component, block.name, moment.place, 0)),
        "shared": bound.shared,
        "ledger": bound.ledger((block.component, block.name, moment.branch, 0)),
    }


def run_chain(bounds: list[Bound], own: dict[int, dict[str, Any]], last: Callable[[RunCall], Any]) -> Run:
    """Around a pipeline's call; ``own`` holds the arguments that each recipe declared for itself."""
    chain: Run = last
    for bound in reversed(bounds):
        chain = _around_run(bound, own.get(id(bound), {}), chain)
    return chain


def _around_run(bound: Bound, options: dict[str, Any], inner: Run) -> Run:
    def run(call: RunCall) -> Any:
        key = ("pipeline", "", "", 0)
        ledger = bound.ledger(key)
        ledger.calls += 1
        ours: dict[str, Any] = {"state": bound.state(key), "shared": bound.shared, "carried": bound.carried}
        return bound.recipe.run(call.replace(options=options, ledger=ledger, **ours), inner)

    return run
