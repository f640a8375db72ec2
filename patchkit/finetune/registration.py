"""peft learns of our adapters when it is imported (:mod:`patchkit.waiting`).

``peft.utils.register_peft_method`` takes only names of peft's own closed enum, so ours go straight into its tables, as
members of an enum of ours. They are looked up there by equality with text, and transformers reads their ``value``.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from patchkit.finetune.types import TunerType, tuners

logger = logging.getLogger(__name__)


def register() -> None:
    """Write our adapters into peft's tables; writing them twice does nothing."""
    from peft import mapping

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
