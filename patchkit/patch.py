"""The handle that ``apply`` returns."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from patchkit.bound import Bound
from patchkit.errors import PatchkitError
from patchkit.installation import Installation
from patchkit.matching import Selection
from patchkit.report import Report, make_report, no_report

if TYPE_CHECKING:
    from patchkit.recipe_base import Recipe

logger = logging.getLogger(__name__)


class Patch:
    """One or more recipes on one pipeline or model. Leaving its ``with`` block removes it, also on an error."""

    def __init__(self, installation: Installation, selections: list[Selection]) -> None:
        self._installation: Installation | None = installation
        self._bounds = [Bound(s.recipe, self, s.matched, prepared=s.prepared) for s in selections]
        self._left = [s.reasons() for s in selections]
        self._last: Report | None = None
        fresh = not installation.bound
        before = installation.present()
        try:
            if fresh:
                installation.open()
            installation.add(self._bounds)
        except BaseException:
            # what was there stays, what came goes
            installation.withdraw(self, keep=before, everything=fresh)
            for bound in self._bounds:
                bound.let_go()
            raise

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes, outermost first as given."""
        return [b.recipe for b in self._bounds]

    @property
    def active(self) -> bool:
        """Whether it is applied (it may be disabled)."""
        return self._installation is not None

    @property
    def enabled(self) -> bool:
        """Whether it takes part in runs."""
        return self.active and all(b.enabled for b in self._bounds)

    def _live(self) -> Installation:
        if self._installation is None:
            raise PatchkitError("this patch has been removed", remedy="apply it again")
        return self._installation

    def disable(self) -> None:
        """Let runs go past it; everything stays in place."""
        self._switch(False)

    def enable(self) -> None:
        """Undo :meth:`disable`."""
        self._switch(True)

    def _switch(self, on: bool) -> None:
        installation = self._live()
        for bound in self._bounds:
            bound.enabled = on
            if bound.attachment is not None:
                bound.attachment.switch(on)
            bound.clear()
        installation.rebuild()

    def report(self) -> Report:
        """What the recipes did in the last run; after :meth:`remove`, what they had done until then."""
        if self._installation is None:
            assert self._last is not None
            return self._last
        return make_report(self._installation, self._bounds, self._left, self.enabled)

    def remove(self) -> list[str]:
        """Take everything back. Returns what could not be, because others had replaced it meanwhile (also logged).

        Removing twice does nothing.
        """
        if self._installation is None:
            return []
        installation = self._installation
        try:
            self._last = self.report()
        except Exception as error:  # reading figures off a broken device must not keep the model patched
            self._last = no_report(installation.adapter.name, f"the report could not be made: {error}")
        self._installation = None
        drift = installation.leave(self)
        for bound in self._bounds:
            bound.let_go()
        for what in drift:
            logger.warning("while removing the patch: %s", what)
        return drift

    def save(self, path: str | Path) -> Path:
        """Write the recipes and their options as a recipe file that ``apply`` and ``patchkit run`` read."""
        from patchkit.recipe_files.files import save_recipes

        return save_recipes(self.recipes, Path(path))

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def __repr__(self) -> str:
        names = ", ".join(r.name for r in self.recipes)
        if self._installation is None:
            return f"<Patch {names} (removed)>"
        return f"<Patch {names} on {self._installation.adapter.name}{'' if self.enabled else ' (disabled)'}>"

    def __reduce__(self) -> Any:
        raise PatchkitError("a patch cannot be pickled", remedy="write its recipes with patch.save(path)")
