"""In which order recipes stand around a call, and which cannot stand together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchkit.errors import Conflict

if TYPE_CHECKING:
    from patchkit.bound import Bound
    from patchkit.recipe_base import Recipe


def ordered(bounds: list[Bound]) -> list[Bound]:
    """Outermost first: the order of applying, changed only where ``before`` or ``after`` ask for it.

    A recipe that replaces the op never calls ``next`` at its sparse steps, so adjusting ones stand outside it.
    """
    waiting = sorted(bounds, key=lambda b: b.recipe.effect == "replaces")  # stable
    out: list[Bound] = []
    while waiting:
        for candidate in waiting:
            if not any(_outside(other, candidate) for other in waiting if other is not candidate):
                out.append(candidate)
                waiting.remove(candidate)
                break
        else:
            names = ", ".join(repr(b.recipe.name) for b in waiting)
            raise Conflict(f"the recipes {names} each ask to stand outside another of them", remedy="apply fewer")
    return out


def _outside(a: Bound, b: Bound) -> bool:
    """Whether ``a`` must stand outside ``b``."""
    return b.recipe.name in a.recipe.before or a.recipe.name in b.recipe.after


def conflicts(present: list[Bound], coming: list[Bound]) -> list[str]:
    """Why the recipes that come cannot join those present (or each other)."""
    found = []
    for i, new in enumerate(coming):
        for old in [*present, *coming[:i]]:
            a, b = old.recipe, new.recipe
            if b.name in a.conflicts or a.name in b.conflicts:
                found.append(f"{a.name!r} and {b.name!r} do not work together{_why(a, b)}")
                continue
            if a.effect != "replaces" or b.effect != "replaces" or not old.window.overlaps(new.window):
                continue
            shared = [s for s in new.sites if s in set(old.sites)]
            if shared:
                names = ", ".join(s.full_name for s in shared[:3]) + (", ..." if len(shared) > 3 else "")
                found.append(f"{a.name!r} and {b.name!r} both replace the op of {len(shared)} sites ({names})")
    return found


def _why(a: Recipe, b: Recipe) -> str:
    """The reason, where one of them gives one."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one.conflicts, dict) and other.name in one.conflicts:
            return f": {one.conflicts[other.name]}"
    return ""
