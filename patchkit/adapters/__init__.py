"""What patchkit knows about the libraries: one adapter for each, found by what an object is, never by import."""

from __future__ import annotations

from typing import Any

from patchkit.adapters.base import Adapter
from patchkit.errors import UnsupportedModel


def adapter_for(target: Any) -> Adapter:
    """The adapter of a loaded pipeline or model; raises :class:`UnsupportedModel`."""
    roots = {cls.__module__.partition(".")[0] for cls in type(target).__mro__}
    if "diffusers" in roots:
        from patchkit.adapters.diffusers import DiffusersAdapter

        return DiffusersAdapter(target)
    if "transformers" in roots:
        from patchkit.adapters.transformers import TransformersAdapter

        return TransformersAdapter(target)
    inner = _unwrapped(target)
    if inner is not None:
        return adapter_for(inner).within(target)
    raise UnsupportedModel(
        f"{type(target).__module__}.{type(target).__qualname__} is no diffusers pipeline and no model of diffusers "
        "or transformers",
        remedy="load it first and give the loaded object, for instance DiffusionPipeline.from_pretrained(...)",
    )


def _unwrapped(target: Any) -> Any:
    """What a wrapper of torch.compile or peft holds."""
    if hasattr(target, "_orig_mod"):
        return target._orig_mod
    if hasattr(target, "get_base_model"):
        return target.get_base_model()
    return None
