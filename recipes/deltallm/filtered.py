"""Layers of a cache that keep filtered keys beside the true ones. Imported once a transformers model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from patchkit import kernels
from patchkit.errors import PatchkitError

WHERE = "the cache of recipe 'deltallm'"
_OWN = ("rule", "min_tokens", "live", "pasts", "columns", "fresh", "hat", "kept", "scanned", "prompt", "starts")


def take_over(new: Any, old: Any) -> None:
    """What a layer of transformers holds, and nothing that a layer of ours adds to it."""
    if hasattr(old, "write_out"):
        old.write_out()
    vars(new).update({name: value for name, value in vars(old).items() if name not in _OWN})


class _Filtered:
    """Beside the keys, the same keys after the dead band; a mixin over either kind of dynamic layer."""

    keys: Any

    def adopt(self, old: Any) -> None:
        """Take over what ``old`` holds."""
        take_over(self, old)
        self.hat: Tensor | None = None  # of as many tokens as there are keys, once scanned
        self.kept: Tensor | None = None  # elements that changed so far, (B, Hkv)
        self.scanned = 0  # tokens that were scanned
        self.prompt = 0  # tokens of the last call that had several
        self.starts: list[int] | None = None
        self.fresh: list[Tensor] = []  # keys that were not scanned yet
        self.live = False  # whether the patched model is running

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise PatchkitError("filtered keys cannot be compiled", WHERE, "run the model uncompiled")
        if not self.live:
            self._drop()
        elif self.hat is None and not self.fresh and self.keys is not None and self.keys.numel():
            self.fresh = [self.keys]  # it held these before, or went on without its patch
        out = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if self.live:
            self.fresh.append(key_states)
        return out

    def _drop(self) -> None:
        self.hat = self.kept = self.starts = None
        self.fresh, self.scanned = [], 0

    def scan(self, keys: Tensor, theta: float, starts: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The filtered form of ``keys``, which :meth:`update` has returned.

        Returns:
            (B, Hkv, T, D); elements that changed, (B, Hkv); tokens that were scanned.
        """
        k = torch.cat(self.fresh, 2)
        self.fresh = []
        if self.hat is None:
            hat, kept = kernels.dead_band(k, theta, start=starts)
        else:
            more, kept = kernels.dead_band(k, theta, reference=self.hat[:, :, -1])
            hat = torch.cat([self.hat, more], 2)
        self.kept = kept.sum(-1) if self.kept is None else self.kept + kept.sum(-1)
        self.scanned += k.shape[2]
        self.hat = hat[:, :, -self.keys.shape[2] :]
        return hat[:, :, -keys.shape[2] :], self.kept, self.scanned

    def reset(self) -> None:
        self._drop()
        super().reset()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        before = self.keys.shape[2] if self.keys is not None else 0
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.hat is None or not before:
            return
        removed = abs(tokens_to_remove)
        self.hat = self.hat[:, :, : before - removed][:, :, -self.keys.shape[2] :]
        if removed:  # how much of it had changed is not known any more: as much as on average
            assert self.kept is not None
            self.kept = (self.kept * (self.scanned - removed)) // max(1, self.scanned)
            self.scanned -= removed

    def _pick(self, index: Any) -> None:
        self.fresh = [k[index] for k in self.fresh]
        if self.hat is not None and self.kept is not None and self.starts is not None:
            self.hat, self.kept = self.hat[index], self.kept[index]
            self.starts = torch.tensor(self.starts)[index.cpu()].tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self.keys.shape[0] if self.keys is not None else 0
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._pick(torch.arange(batch).repeat_interleave(repeats))


class FilteredLayer(_Filtered, DynamicLayer):
    """A dynamic layer with filtered keys beside its keys."""

    def __init__(self, old: DynamicLayer) -> None:
        super().__init__()
        self.adopt(old)


class FilteredSlidingLayer(_Filtered, DynamicSlidingWindowLayer):
    """A sliding layer with filtered keys beside its keys."""

    def __init__(self, old: DynamicSlidingWindowLayer) -> None:
        super().__init__(old.sliding_window)
        self.adopt(old)
