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
        key = (site.component, site.name, moment.branch, call.index)
        ledger = bound.ledger(key)
        ledger.calls += 1
        given = call.replace(state=bound.state(key), shared=bound.shared, ledger=ledger, prepared=bound.prepared)
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
        key = (component, "", call.branch, 0)
        ledger = bound.ledger(key)
        ledger.calls += 1
        given = call.replace(sites=bound.sites, state=bound.state(key), shared=bound.shared, ledger=ledger)
        return bound.recipe.denoise(given, inner)

    return denoise


def around_block(bound: Bound, inner: AroundBlock) -> AroundBlock:
    """One recipe around a transformer block."""

    def block(call: BlockCall) -> Any:
        moment = call.moment
        if not bound.window.contains(moment.step, moment.total):
            return inner(call)
        key = (call.block.component, call.block.name, moment.branch, 0)
        ours = {"state": bound.state(key), "shared": bound.shared, "ledger": bound.ledger(key)}
        return bound.recipe.block(call.replace(**ours, prepared=bound.prepared), inner)

    return block


def enter_block(bound: Bound, call: BlockInput) -> None:
    """Show one recipe what enters a transformer block."""
    if bound.window.contains(call.step, call.total):
        key = (call.block.component, call.block.name, call.branch, 0)
        ours: dict[str, Any] = {"state": bound.state(key), "shared": bound.shared, "ledger": bound.ledger(key)}
        bound.recipe.enter(dataclasses.replace(call, **ours, prepared=bound.prepared))


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
        given = call.replace(options=options, state=bound.state(key), shared=bound.shared, ledger=ledger)
        return bound.recipe.run(given, inner)

    return run
