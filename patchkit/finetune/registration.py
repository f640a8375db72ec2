"""peft learns of our adapters when it is imported (:mod:`patchkit.waiting`).

``peft.utils.register_peft_method`` takes only names of peft's own closed enum, so ours go straight into its tables, as
members of an enum of ours. They are looked up there by equality with text, and transformers reads their ``value``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from patchkit.finetune.types import TunerType, tuners

logger = logging.getLogger(__name__)


def register() -> None:
    """Write our adapters into peft's tables; writing them twice does nothing.

    The first import of peft may come from the very module that an adapter's classes are made in. Those that are not
    there yet enter themselves once they are (:func:`enter`).
    """
    for name, tuner in tuners().items():
        for value in (tuner.config, tuner.tuner):
            module, _, attribute = value.partition(":")
            try:
                _write(name, getattr(importlib.import_module(module), attribute))
            except (ImportError, AttributeError) as error:
                if not _begun():
                    raise
                logger.debug("%s is not there yet: %s", value, error)


def enter(cls: type) -> None:
    """Write a class of an adapter into peft's tables, if it is one of those that are known."""
    value = f"{cls.__module__}:{cls.__qualname__}"
    for name, tuner in tuners().items():
        if value in (tuner.config, tuner.tuner):
            _write(name, cls)


def _write(name: str, cls: Any) -> None:
    from peft import PeftConfig, mapping

    kind: Any = TunerType[name]
    if issubclass(cls, PeftConfig):
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = cls
    else:
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = cls
    # Not under the type itself: an adapter of ours may carry LoRA layers as well, and transformers renames the
    # parameters of a type with a prefix by that one only, of a type without by all that there are.
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[f"{name}_PARAMETERS"] = tuners()[name].prefix  # type: ignore[index]


def _begun() -> bool:
    """Whether one of the modules that make adapters is being imported at this moment."""
    homes = {value.partition(":")[0] for tuner in tuners().values() for value in (tuner.config, tuner.tuner)}
    names = [name for name in sys.modules if name in homes or name.startswith("patchkit.finetune.")]
    return any(getattr(sys.modules[name].__spec__, "_initializing", False) for name in names)


def try_to_register() -> None:
    """:func:`register`; what goes wrong is logged."""
    try:
        register()
    except Exception as error:  # an import of peft must not fail because of us
        logger.warning("patchkit's adapters could not be made known to peft: %s: %s", type(error).__name__, error)
