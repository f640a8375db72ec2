"""Where the sinks lie: figures for the report, and maps over the image grid."""

from __future__ import annotations

from typing import Any

from patchkit.kernels.redistribute import TEXT_SINK, VISUAL_SINK
from patchkit.recipes.var.sinks import KeyMap


def counts(keys: KeyMap) -> dict[str, Any]:
    """Sinks a sample, and which visual tokens they are (numbered among the visual tokens of their sample)."""
    text, visual = (keys.classes == kind for kind in (TEXT_SINK, VISUAL_SINK))
    return {"text_sinks": text.sum(1), "visual_sinks": visual.sum(1)}
