"""Which adapters there are, and their types as adapter files name them.

Which ones is data: ``tuners.json`` beside the recipes, and the entry-point group ``patchkit.tuners``.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from enum import Enum

logger = logging.getLogger(__name__)

GROUP = "patchkit.tuners"  # entry-point group; the name is the adapter's type, the value names a Tuner


@dataclass(frozen=True)
class Tuner:
    """One kind of adapter: where its classes are, and how names of its parameters begin."""

    config: str  # "module:class"
    tuner: str
    prefix: str


def tuners() -> dict[str, Tuner]:
    """Every kind of adapter by its type; imports none of their classes."""
    from importlib.metadata import entry_points
    from importlib.resources import files

    found: dict[str, Tuner] = {}
    shipped = files("patchkit.recipes") / "tuners.json"
    if shipped.is_file():
        found = {name: Tuner(**entry) for name, entry in json.loads(shipped.read_text(encoding="utf-8")).items()}
    for point in entry_points(group=GROUP):
        try:
            other = point.load()
        except Exception as error:  # somebody else's package must not take ours down
            logger.warning("tuner %r (%s) could not be loaded: %s", point.name, point.value, error)
            continue
        if isinstance(other, Tuner) and point.name not in found:
            found[point.name] = other
    return found


TunerType = Enum("TunerType", {name: name for name in tuners()}, type=str, module=__name__)  # type: ignore[misc]
