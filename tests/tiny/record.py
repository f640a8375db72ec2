"""Watch which attention operations a model calls, by wrapping the two library functions for a while.

It knows nothing of patchkit, so what it sees can be held against what patchkit's adapters claim.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

Answer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Op:
    """One call of an attention operation. Shapes are (B, H, N, D), whichever way the library passes them."""

    component: str
    call: int  # of the component, counted from 0
    site: str  # the innermost module running
    route: str  # "direct" (F.scaled_dot_product_attention) or "dispatch" (diffusers' dispatch_attention_fn)
    q: tuple[int, ...]
    k: tuple[int, ...]
    mask: torch.Tensor | None
    query: torch.Tensor
    causal: bool

    @property
    def mask_kind(self) -> str:
        """``none``, ``bool_key`` (one row for all queries), ``bool`` (a row for each query) or ``additive``."""
        if self.mask is None:
            return "none"
        if self.mask.dtype != torch.bool:
            return "additive"
        return "bool_key" if self.mask.ndim == 2 or self.mask.shape[-2] == 1 else "bool"


class _Recorder:
    def __init__(self, answer: Answer | None) -> None:
        self.ops: list[Op] = []
        self.answer = answer
        self.calls: dict[str, int] = {}
        self.running: list[tuple[str, str]] = []  # (component, module) from the outside in
        self.dispatching = False

    def watch(self, component: str, model: torch.nn.Module) -> Iterator[Any]:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(functools.partial(self._enter, component, name))
            yield module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, component: str, name: str, *_: Any) -> None:
        if not name:
            self.calls[component] = self.calls.get(component, -1) + 1
        self.running.append((component, name))

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def direct(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def call(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.dispatching or not self.running:
                return original(query, key, value, attn_mask, *args, **kwargs)
            causal = bool(kwargs.get("is_causal", args[1] if len(args) > 1 else False))
            self._note("direct", query, key, attn_mask, causal)
            if self.answer is not None:
                return self.answer(query, key, value)
            return original(query, key, value, attn_mask, *args, **kwargs)

        return call

    def dispatch(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def call(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
            heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
            if self.running:
                self._note("dispatch", *heads_first[:2], attn_mask, bool(kwargs.get("is_causal", False)))
            if self.running and self.answer is not None:
                return self.answer(*heads_first).transpose(1, 2)
            self.dispatching = True
            try:
                return original(query, key, value, attn_mask, *args, **kwargs)
            finally:
                self.dispatching = False

        return call

    def _note(self, route: str, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> None:
        component, site = self.running[-1]
        op = Op(component, self.calls[component], site, route, tuple(q.shape), tuple(k.shape), mask, q, causal)
        self.ops.append(op)


@contextmanager
def record(models: Mapping[str, torch.nn.Module], answer: Answer | None = None) -> Iterator[list[Op]]:
    """Note every attention operation inside ``models`` while the block runs; ``answer`` may replace its result."""
    recorder = _Recorder(answer)
    with ExitStack() as undo:
        for component, model in models.items():
            for handle in recorder.watch(component, model):
                undo.callback(handle.remove)
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and "dispatch_attention_fn" in vars(module):
                original = module.dispatch_attention_fn
                undo.enter_context(mock.patch.object(module, "dispatch_attention_fn", recorder.dispatch(original)))
        direct = recorder.direct(F.scaled_dot_product_attention)
        undo.enter_context(mock.patch.object(F, "scaled_dot_product_attention", direct))
        yield recorder.ops
