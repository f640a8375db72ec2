"""What the recipe and the adapter share: budgets from their options, and what a site and its router need."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption
from patchkit.listening import What, has_query_norm, projection_name
from patchkit.recipes.moh.budget import Budget
from patchkit.recipes.moh.gates import Gates
from patchkit.sites import Site


def check_budgets(options: Any, where: str) -> None:
    """Refuse what no number of heads can have; raises :class:`InvalidOption`."""
    lists = [options.shared_per_layer, options.active_per_layer]
    for name, values in zip(("shared_per_layer", "active_per_layer"), lists, strict=True):
        if values is not None and not values:
            raise InvalidOption("the list is empty", f"{where}{name!r}", "give one entry for each block")
    if None not in lists and len(lists[0]) != len(lists[1]):
        raise InvalidOption(
            f"{len(lists[0])} shared and {len(lists[1])} active", f"{where}'active_per_layer'", "give as many of both"
        )
    count = max((len(values) for values in lists if values is not None), default=1)
    for layer in range(count):
        shared, active = amounts(options, layer)
        if isinstance(shared, float) == isinstance(active, float) and active < shared:
            raise InvalidOption(
                f"active {active} is less than shared {shared}",
                f"{where}'active'",
                "active counts the shared heads too: raise it, or lower shared",
            )
        if not active:
            raise InvalidOption("no head would be on", f"{where}'active'", "give more than 0")


def amounts(options: Any, layer: int) -> tuple[Any, Any]:
    """``shared`` and ``active`` of a block."""
    shared, active = options.shared_per_layer, options.active_per_layer
    return shared[layer] if shared else options.shared, active[layer] if active else options.active


def budget_of(options: Any, site: Site) -> Budget:
    """The heads of a site; raises :class:`InvalidOption` where the options do not fit it."""
    for name in ("shared_per_layer", "active_per_layer"):
        values = getattr(options, name)
        if values is not None and len(values) != site.layers:
            raise InvalidOption(
                f"{len(values)} entries for {site.layers} blocks", f"recipe 'moh', option {name!r}", "give one a block"
            )
    return Budget.of(site.heads, *amounts(options, site.layer), where=f"{site.full_name}, recipe 'moh'")


def why_not(site: Site, router: str) -> str | None:
    """Why a site cannot have a router, or None if it can."""
    if site.heads < 2:
        return f"{site.heads or 'an unknown number of'} heads: there is nothing to choose from"
    if router == "qnorm" and has_query_norm(site.module) and projection_name(site.module) is None:
        return "its queries are normalised, and what projects them could not be found"
    return None


def needs(site: Site, router: str) -> frozenset[What]:
    """What a router needs of a site's module besides the op's inputs.

    The linear one its input; the other its queries as projected, where a norm takes their length away.
    """
    if router == "linear":
        return frozenset(("hidden",))
    return frozenset(("queries",)) if has_query_norm(site.module) else frozenset()


def note(call: AttentionCall, gates: Gates) -> None:
    """For the report: the share of tokens for which each head was on."""
    on = gates.active.detach()
    call.ledger.average(active=(on.sum((0, 2)), torch.full((on.shape[1],), on.shape[0] * on.shape[2])))
