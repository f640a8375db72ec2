"""One recipe at work: tied to the sites it selected, with what it keeps and what it wrote down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from patchkit.ledger import Ledger
from patchkit.recipe_base import Recipe
from patchkit.selection import StepWindow
from patchkit.sites import Site

Key = tuple[str, str, str, int]  # component, site, branch (states: and part), op index


class Attachment(Protocol):
    """What a recipe has put on a model; see :meth:`patchkit.Recipe.attach`."""

    def switch(self, on: bool) -> None:
        """Let it work, or not; the patch is enabled or disabled."""

    def remove(self) -> None:
        """Take it off, exactly. Called once, after everything else is gone."""


@dataclass(eq=False)
class Bound:
    """One recipe of one patch on its sites."""

    recipe: Recipe
    owner: object
    sites: list[Site]
    enabled: bool = True
    prepared: Any = None  # what the recipe found when it looked at the model
    attachment: Attachment | None = None
    window: StepWindow = field(init=False)
    states: dict[Key, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)  # for all calls at all levels
    carried: dict[Any, Any] = field(default_factory=dict)  # from the pipeline's call to those of the denoiser
    ledgers: dict[Key, Ledger] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.window = StepWindow.parse(self.recipe.steps, "steps")

    def state(self, key: Key) -> dict[str, Any]:
        """What the recipe keeps there until the run ends."""
        return self.states.setdefault(key, {})

    def clear(self) -> None:
        """Drop what the recipe keeps until a run ends."""
        self.states.clear()
        self.shared.clear()

    def ledger(self, key: Key) -> Ledger:
        """What the recipe writes down there."""
        if key not in self.ledgers:
            self.ledgers[key] = Ledger()
        return self.ledgers[key]

    def heads(self, site: Site) -> frozenset[int]:
        """The heads that the option ``heads`` selects at a site."""
        return self.recipe.head_numbers().resolve(site.heads)

    def enters(self, component: str, layer: int) -> bool:
        """Whether the recipe looks at what enters a block: where it has selected sites."""
        return self.recipe.wraps("enter") and any(s.component == component and s.layer == layer for s in self.sites)

    def let_go(self) -> None:
        """Hold nothing of the model any more: the handle of a removed patch may live on."""
        attached, self.attachment = self.attachment, None
        if attached is not None:
            attached.remove()
        self.sites = []
        self.clear()
        self.carried.clear()
        self.ledgers.clear()

    def covers(self, component: str) -> bool:
        """Whether it stands around the calls of a denoiser: of all, or of those in which it selected sites."""
        if not self.recipe.wraps("attend") and not self.recipe.selects():
            return True
        return any(site.component == component for site in self.sites)
