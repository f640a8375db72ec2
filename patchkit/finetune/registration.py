"""peft learns of our adapters when it is imported (:mod:`patchkit.waiting`).

``peft.utils.register_peft_method`` takes only names of peft's own closed enum, so ours go straight into its tables, as
members of an enum of ours. They are looked up there by equality with text, and transformers reads their ``value``.

Which adapters there are is data: ``tuners.json`` beside the recipes, and the entry-point group ``patchkit.tuners``.
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass
from typing import Any

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


def register() -> None:
    """Write our adapters into peft's tables; writing them twice does nothing."""
    from peft import mapping

    from patchkit.finetune.types import TunerType

    for name, tuner in tuners().items():
        kind: Any = TunerType[name]
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = _load(tuner.config)
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = _load(tuner.tuner)
        # Not under the type itself: an adapter of ours may carry LoRA layers as well, and transformers renames the
        # parameters of a type with a prefix by that one only, of a type without by all that there are.
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[f"{name}_PARAMETERS"] = tuner.prefix  # type: ignore[index]


def _load(value: str) -> Any:
    module, _, name = value.partition(":")
    return getattr(importlib.import_module(module), name)


def try_to_register() -> None:
    """:func:`register`; what goes wrong is logged."""
    try:
        register()
    except Exception as error:  # an import of peft must not fail because of us
        logger.warning("patchkit's adapters could not be made known to peft: %s: %s", type(error).__name__, error)
