"""Layers of transformers' cache that hold packed runs, and how they come into a model's cache.

They take the place of a ``DynamicCache``'s own layers while the patched model runs, so the cache that ``generate``
made, or that the user holds, is the one that shrinks. Imported only once a transformers model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from patchkit.context import DenoiseCall
from patchkit.errors import PatchkitError
from patchkit.recipes.deltallm.batch import attend_pasts, begin, expand, select
from patchkit.recipes.deltallm.filtered import WHERE, take_over
from patchkit.recipes.deltallm.runs import SPARE, Past, Rule
from patchkit.sites import Site


class RunLayer(DynamicLayer):
    """Whole keys and values up to ``min_tokens`` tokens; then packed runs, exact ones in the window, and sinks.

    It counts true tokens whatever it holds. Where the patch is gone, :meth:`update` writes the runs out as tokens
    again, so that the cache goes on as a dense one.

    Args:
        old: the dense layer whose place it takes, with what it holds.
        rule: what becomes a run at this layer.
        min_tokens: up to here everything stays dense.
    """

    is_croppable = False  # not by any number of tokens

    def __init__(self, old: DynamicLayer, rule: Rule, min_tokens: int) -> None:
        super().__init__()
        take_over(self, old)
        self.rule, self.min_tokens = rule, min_tokens
        self.live = False  # whether the patched model is running
        self.pasts: list[Past] | None = None
        self.columns = 0  # tokens with padding, while packed
        self.fresh: tuple[Tensor, Tensor] | None = None  # given to the model, to be taken in by its attention

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new tokens alone where attention will look up the rest here; else all of them."""
        self._settle()
        if not self.live:
            self.write_out()
        elif self.pasts is not None or self.get_seq_length() + key_states.shape[2] > self.min_tokens:
            if torch.compiler.is_compiling():
                raise PatchkitError(
                    "a packed cache cannot be compiled: its sizes depend on the data",
                    WHERE,
                    "run the model uncompiled, or patch with stages='prefill'",
                )
            self.fresh = key_states, value_states
            return key_states, value_states
        whole: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return whole

    def _settle(self) -> None:
        """Tokens that no attention took in, because something failed in between, were never there."""
        self.fresh = None

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keep the new tokens dense and return all of them; only while nothing is packed."""
        assert self.fresh is not None
        (k, v), self.fresh = self.fresh, None
        found: tuple[Tensor, Tensor] = super().update(k, v)
        return found

    def attend(self, q: Tensor, starts: list[int], scale: float | None) -> Tensor:
        """Attention from the new tokens; takes them in and packs what left the window."""
        assert self.fresh is not None
        (k, v), self.fresh = self.fresh, None
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if self.pasts is None:
            self.start(starts, k, v)
        assert self.pasts is not None
        out = attend_pasts(self.pasts, q, k, v, self.columns, self.rule, scale)
        self.columns += k.shape[2]
        return out

    def start(self, starts: list[int], k: Tensor, v: Tensor) -> None:
        """From now on packed; what is there is taken in at the next call, ``k`` and ``v`` only say the sizes."""
        known = self.get_seq_length()
        keys, values = k[:, :, :0], v[:, :, :0]
        if known and self.keys is not None and self.values is not None:
            keys, values = self.keys, self.values
        self.pasts, self.columns = begin(starts, keys, values, k.shape[2] + SPARE), known
        self.keys = self.values = None

    def pack(self) -> None:
        """Pack what lies outside of the window already."""
        for past in self.pasts or ():
            past.prompt = past.prompt or past.tokens
            border = self.rule.border.exact_from(past.tokens // self.rule.chunk, past.prompt)
            if border > past.border:
                past.pack(border, self.rule)
            past.forget(self.rule)

    def write_out(self) -> None:
        """Every token gets a key and a value again, those of its run; from now on dense."""
        if self.pasts is not None:
            self.keys, self.values = expand(self.pasts, self.columns)
            self.pasts, self.columns = None, 0

    # --- what callers of a cache ask --------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens that were given in, padding included."""
        return self.columns if self.pasts is not None else super().get_seq_length()

    def reset(self) -> None:
        self.pasts, self.columns, self.fresh = None, 0, None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back. A packed layer does so exactly, at least up to 32 of them, or refuses."""
        if self.pasts is None or tokens_to_remove >= 0:
            super().crop(tokens_to_remove)  # which refuses positive numbers
            return
        count = -tokens_to_remove
        if not all(past.can_crop(count, self.rule) for past in self.pasts):
            raise PatchkitError(
                f"{count} tokens cannot be taken back: beyond {SPARE}, the exact keys that would be needed are gone",
                WHERE,
                "crop by less, copy the cache before you go on, or call reset() and give the tokens in again",
            )
        for past in self.pasts:
            past.crop(count, self.rule)
        self.columns -= count

    def _select(self, sources: list[int]) -> None:
        assert self.pasts is not None
        self.pasts = select(self.pasts, sources)

    def starts(self) -> list[int]:
        """Padding before each sample, while packed."""
        found = {sample: past.start for past in self.pasts or () for sample in past.samples}
        return [found[sample] for sample in range(len(found))]

    def _batch(self) -> int:
        return sum(len(past.samples) for past in self.pasts or ())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.pasts is None:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # says LongTensor, which is no class of tensors
        elif beam_idx.tolist() != list(range(self._batch())):
            self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pasts is None:
            super().batch_select_indices(indices)
        else:
            self._select(
                torch.arange(self._batch())[indices.cpu() if isinstance(indices, Tensor) else indices].tolist()
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pasts is None:
            super().batch_repeat_interleave(repeats)
        else:
            self._select([i for i in range(self._batch()) for _ in range(repeats)])

    def offload(self) -> None:
        """Packed layers stay where they are."""
        if self.pasts is None:
            super().offload()

    def prefetch(self) -> None:
        if self.pasts is None:
            super().prefetch()


def cache_of(call: DenoiseCall) -> tuple[DenoiseCall, Any]:
    """The cache of this forward, made here where the model would make it inside; None where there is none."""
    signature = inspect.signature(type(call.module).forward)
    try:
        given = signature.bind_partial(call.module, *call.args, **call.kwargs).arguments
    except TypeError:  # a wrong call: the model will say so
        return call, None
    if "past_key_values" not in signature.parameters:
        return call, None
    cache = given.get("past_key_values")
    if cache is not None or ("past_key_values" in given and "past_key_values" not in call.kwargs):
        return call, cache
    whole: Any = call.module.config
    config = whole.get_text_config(decoder=True)
    use = given.get("use_cache", given.get("kwargs", {}).get("use_cache"))
    use = config.use_cache if use is None else use
    if not use or call.module.training or getattr(whole, "is_encoder_decoder", False):
        return call, None
    cache = DynamicCache(config=config)
    return call.replace(kwargs={**call.kwargs, "past_key_values": cache}), cache


def layers_of(cache: Any, sites: Iterable[Site], make: Any) -> dict[str, Any]:
    """The layers of ours in a cache, by site, after those that can be replaced have been.

    Args:
        cache: anything; only a plain ``DynamicCache`` that does not offload has layers that can be replaced.
        sites: the recipe's.
        make: (site, old layer) -> new one, or None to leave it.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return {}
    found = {}
    for site in sites:
        number: Any = site.module.layer_idx
        while cache.layer_class_to_replicate is not None and len(cache.layers) <= number:
            cache.layers.append(cache.layer_class_to_replicate())
        if number >= len(cache.layers):
            continue
        old = cache.layers[number]
        new = make(site, old)
        if new is not None:
            cache.layers[number] = found[site.name] = new
    return found
