"""Stand around the calls of a denoiser or model, by whichever of its wrappers it is called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from patchkit import compiled, instance
from patchkit.adapters.base import layers_of
from patchkit.errors import Conflict

if TYPE_CHECKING:
    from patchkit.installation import Installation


def enter(installation: Installation, component: str, module: Any) -> None:
    """Override the calls of ``module`` and of everything inside it that may be called in its stead.

    A wrapper of peft may call the forward of the model inside, past its ``__call__``, while ``generate`` calls the
    model itself; a compiled wrapper may be put around a model after it was patched. So each gets our call, and the
    outermost that runs counts. What has been entered already is left alone.
    """
    for part in layers_of(module):
        mark = instance.mark_of(part)
        if mark is installation.mark:
            continue
        other = alive(mark)
        if other is not None:
            raise Conflict(
                f"{component} ({type(part).__name__}) is already patched through {other.adapter.name}",
                installation.adapter.name,
                "remove that patch first: a model can only be patched through one of its holders at a time",
            )
        methods = _methods(installation, component, type(part))
        instance.override(installation.journal, installation, part, methods, installation.mark)


def alive(mark: Any) -> Installation | None:
    """The installation that a mark on an object belongs to, unless it is over."""
    found = mark() if callable(mark) else None
    return found if found is not None and not found.slot.closed else None


def _methods(installation: Installation, component: str, cls: type) -> dict[str, Callable[..., Any]]:
    found = {"__call__": _call(installation, component, cls.__call__, cls)}
    if hasattr(cls, "cache_context"):
        found["cache_context"] = _context(installation, component, cls.cache_context)
    if hasattr(cls, "get_compiled_call"):  # how generate() with a static cache calls the model
        found["get_compiled_call"] = _compiled_call(installation, component, cls.get_compiled_call)
    return found


def _call(installation: Installation, component: str, original: Callable[..., Any], inner: type) -> Callable[..., Any]:
    slot, tracked = installation.slot, installation.adapter.family != "transformers"
    names = compiled.parameters(inner) if tracked else ()

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        if slot.closed:
            return original(module, *args, **kwargs)
        if torch.compiler.is_compiling():
            # inside a compiled wrapper that was entered, the wrapper's own call has been here already
            if tracked and component not in installation.inside:
                args, kwargs = compiled.heard(installation.tensor, component, names, args, kwargs)
            return original(module, *args, **kwargs)
        return installation.denoise(component, original, module, args, kwargs)

    return call


def _context(installation: Installation, component: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def cache_context(module: Any, name: str, **kwargs: Any) -> Iterator[None]:
        with original(module, name, **kwargs), installation.tracker.context(component, name):
            yield

    return cache_context


def _compiled_call(installation: Installation, component: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def get_compiled_call(module: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        faster = original(module, *args, **kwargs)

        def inner(_: Any, *inner_args: Any, **inner_kwargs: Any) -> Any:
            return faster(*inner_args, **inner_kwargs)

        def call(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if installation.slot.closed:
                return faster(*inner_args, **inner_kwargs)
            return installation.denoise(component, inner, module, inner_args, inner_kwargs)

        return call

    return get_compiled_call
