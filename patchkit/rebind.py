"""Diffusers attention: rebind a processor instance so that only its attention op is ours.

The instance's ``__call__`` is upstream's own code object, run with a private copy of its globals in which
``F.scaled_dot_product_attention`` and ``dispatch_attention_fn`` lead to the site. Projections, norms, rotary
embeddings, masks and splitting stay upstream's, at whatever version is installed.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import instance
from patchkit.context import AttentionCall
from patchkit.errors import UnsupportedModel
from patchkit.op import attend
from patchkit.sites import Site

DISPATCH = "dispatch_attention_fn"
DIRECT = "scaled_dot_product_attention"


def probe(processor: Any) -> str | None:
    """Why this processor's op cannot be reached, or None if it can."""
    fn = _call_function(processor)
    name = type(processor).__name__
    if fn is None:
        return f"{name}.__call__ is no plain function"
    names = fn.__code__.co_names
    if DISPATCH in names or ("F" in names and DIRECT in names):
        return None
    if "Linear" in name or "linear" in name:
        return f"{name} is linear attention: it has no softmax op"
    return f"{name} calls neither F.{DIRECT} nor {DISPATCH}"


def _own_class(processor: Any) -> type:
    """Its class; for a processor that somebody kept beyond its patch, the class it had before."""
    slot = instance.mark_of(processor)
    return instance.original_class(processor) if isinstance(slot, Slot) and slot.closed else type(processor)


def _call_function(processor: Any) -> types.FunctionType | None:
    fn = inspect.getattr_static(_own_class(processor), "__call__", None)
    if not isinstance(fn, types.FunctionType) or hasattr(fn, "__wrapped__"):
        return None
    return None if fn.__qualname__.startswith("Module.") else fn


class Slot:
    """Which processor is running, for one installation; and whether the installation is over.

    Args:
        opaque: whether the op is one opaque node of compiled graphs, which run the chain at run time. Otherwise the
            chain is traced, as it must be if gradients shall reach its own parameters.
    """

    def __init__(self, opaque: bool = True) -> None:
        self.opaque = opaque
        self.current: Any = None
        self.index = 0
        self.closed = False
        self.classes: dict[type, type] = {}


def rebound(processor: Any, site: Site, slot: Slot) -> Any:
    """A copy of ``processor`` whose attention op is the chain of ``site``; shares the original's attributes."""
    reason = probe(processor)
    if reason:
        raise UnsupportedModel(reason, site.full_name, "exclude this site")
    original = _own_class(processor)
    if original not in slot.classes:
        slot.classes[original] = _make_class(original, slot)
    new = copy.copy(processor)
    new.__class__ = slot.classes[original]
    # past nn.Module's own __setattr__: neither may become a buffer or a submodule
    object.__setattr__(new, "_patchkit_site", site)
    object.__setattr__(new, "_patchkit_number", site.tensor)
    return new


def _make_class(original: type, slot: Slot) -> type:
    fn = inspect.getattr_static(original, "__call__")
    scope = {name: value for name, value in fn.__globals__.items() if name != "__name__"}
    # without "__name__", because the compiler would read the real module's globals instead of these
    scope["F"] = types.SimpleNamespace(**{**vars(F), DIRECT: _direct_op(slot)})
    upstream = fn.__globals__.get(DISPATCH)
    if upstream is not None:
        scope[DISPATCH] = _dispatch_op(slot, upstream)
    inner = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    inner.__kwdefaults__ = fn.__kwdefaults__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if slot.closed:  # somebody kept this processor beyond the patch and put it back
            return fn(self, *args, **kwargs)
        slot.current = self
        slot.index = 0
        return inner(self, *args, **kwargs)

    return instance.subclass(original, {"__call__": call}, slot)


def _direct_op(slot: Slot) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        index, slot.index = slot.index, slot.index + 1
        processor = slot.current
        if slot.opaque and torch.compiler.is_compiling():
            number = processor._patchkit_number
            out = attend(
                query, key, value, attn_mask, number, index, scale, is_causal, enable_gqa, dropout_p, None, None
            )
            return out.transpose(1, 2)
        extra: dict[str, Any] = {"dropout": dropout_p, "grouped": enable_gqa}
        return processor._patchkit_site.run(query, key, value, attn_mask, scale, is_causal, index, extra)

    return scaled_dot_product_attention


def _dispatch_op(slot: Slot, upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        index, slot.index = slot.index, slot.index + 1
        processor = slot.current
        if parallel_config is not None:
            raise UnsupportedModel(
                "context parallelism splits the sequence over devices, a patch would see a part of it",
                processor._patchkit_site.full_name,
                "remove the patch, or run without context parallelism",
            )
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if slot.opaque and torch.compiler.is_compiling() and not attention_kwargs:
            mask = _four_dimensional(attn_mask)
            number = processor._patchkit_number
            return attend(q, k, v, mask, number, index, scale, is_causal, enable_gqa, dropout_p, None, None)
        extra: dict[str, Any] = {"dropout": dropout_p, "grouped": enable_gqa, "given_mask": attn_mask}
        if attention_kwargs:
            extra["attention_kwargs"] = attention_kwargs
        mask = extra["mask"] = _four_dimensional(attn_mask)
        return processor._patchkit_site.run(q, k, v, mask, scale, is_causal, index, extra).transpose(1, 2)

    dispatch_attention_fn.upstream = upstream  # type: ignore[attr-defined]
    return dispatch_attention_fn


def _four_dimensional(mask: Tensor | None) -> Tensor | None:
    """(B, Nk), which dispatch allows, as (B, 1, 1, Nk)."""
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask


def terminal(site: Site, processor: Any) -> Callable[[AttentionCall], Tensor]:
    """The op that upstream would have called, on a call whose inputs recipes may have changed."""
    fn = _call_function(processor)
    assert fn is not None
    upstream = fn.__globals__.get(DISPATCH) if DISPATCH in fn.__code__.co_names else None

    def direct(call: AttentionCall) -> Tensor:
        return F.scaled_dot_product_attention(
            call.q,
            call.k,
            call.v,
            attn_mask=call.mask,
            dropout_p=call.extra.get("dropout", 0.0),
            is_causal=call.causal,
            scale=call.scale,
            enable_gqa=call.extra.get("grouped", False),
        )

    def dispatched(call: AttentionCall) -> Tensor:
        mask = call.mask
        if "given_mask" in call.extra and mask is call.extra["mask"]:
            mask = call.extra["given_mask"]  # unchanged: some backends want it two-dimensional
        current = site.module.processor
        out = upstream(  # type: ignore[misc]
            call.q.transpose(1, 2),
            call.k.transpose(1, 2),
            call.v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=call.extra.get("dropout", 0.0),
            is_causal=call.causal,
            scale=call.scale,
            enable_gqa=call.extra.get("grouped", False),
            attention_kwargs=call.extra.get("attention_kwargs"),
            backend=getattr(current, "_attention_backend", None),
            parallel_config=None,
        )
        return out.transpose(1, 2)

    return dispatched if upstream is not None else direct
