"""Recipes that are tuned: their adapters are peft's, made, saved and loaded by peft's own calls.

    from patchkit.recipes.moh import MoHConfig
    model = peft.get_peft_model(model, MoHConfig(shared=0.5, active=0.75))

peft is an extra (``pip install "patchkit[finetune]"``) and is not imported before it is needed. After ``import
patchkit``, peft's and transformers' own loaders know these adapters (:mod:`patchkit.finetune.registration`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from patchkit.errors import MissingDependency

if TYPE_CHECKING:
    from patchkit.finetune.config import TunerConfig
    from patchkit.finetune.layer import AttentionLayer
    from patchkit.finetune.passage import Passage
    from patchkit.finetune.tuner import AttentionTuner

INSTALL = 'pip install "patchkit[finetune]"'
_HOMES = {
    "TunerConfig": "patchkit.finetune.config",
    "AttentionLayer": "patchkit.finetune.layer",
    "Passage": "patchkit.finetune.passage",
    "AttentionTuner": "patchkit.finetune.tuner",
}

__all__ = ["INSTALL", "AttentionLayer", "AttentionTuner", "Passage", "TunerConfig", "require"]


def require() -> None:
    """Raise :class:`patchkit.MissingDependency` unless peft is installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingDependency("peft is not installed, which tunes models", remedy=INSTALL)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        require()
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
