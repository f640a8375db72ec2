"""What a language model costs and how well it predicts: perplexity, tokens a second, bytes of its cache.

They call the model as it is, so they measure a patched one as well as an unpatched one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit.adapters.base import unwrap
from patchkit.compiled import parameters
from patchkit.errors import InvalidOption


@dataclass(frozen=True)
class Perplexity:
    """How well a text is predicted.

    Attributes:
        value: exp of the mean negative log-likelihood per token.
        tokens: how many tokens were predicted.
        error: standard error of ``value``, from the spread of the tokens' likelihoods.
    """

    value: float
    tokens: int
    error: float


def perplexity(model: Any, tokenizer: Any, text: str, window: int = 1024, stride: int = 512) -> Perplexity:
    """Perplexity of a text under a causal language model.

    The text is cut into windows of ``window`` tokens that begin ``stride`` tokens apart. A token counts once, in the
    first window that holds it, so all but those of the first window are predicted from at least ``window - stride``
    tokens. A tokenizer's BOS token stands before every window, since models with one were trained so.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        text: what is predicted.
        window: tokens of a forward call, the BOS token not counted.
        stride: tokens between the beginnings of two windows.

    Raises:
        InvalidOption: the window or the stride do not fit, or there are fewer than two tokens.
    """
    if not 0 < stride <= window:
        raise InvalidOption(f"stride {stride} of a window of {window} tokens", "perplexity", "use 1 to the window")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    start = tokenizer.bos_token_id
    if start is None and stride == window:
        raise InvalidOption(
            "windows that do not overlap", "perplexity", "without a BOS token the stride must be less than the window"
        )
    if len(ids) < 2:
        raise InvalidOption(f"the text has {len(ids)} tokens", "perplexity", "give it at least two")
    found: list[Tensor] = []
    known = 0 if start is not None else 1  # without a BOS token nothing predicts the first token
    begin = 0
    while known < len(ids):
        part = ids[begin : begin + window]
        fresh = begin + len(part) - known
        found.append(_losses(model, part, start, fresh))
        known, begin = begin + len(part), begin + stride
    every = torch.cat(found).double()
    value = math.exp(float(every.mean()))
    spread = float(every.std()) / math.sqrt(len(every)) if len(every) > 1 else math.nan
    return Perplexity(value, len(every), value * spread)


def _losses(model: Any, ids: Tensor, start: int | None, count: int) -> Tensor:
    """Negative log-likelihoods of the last ``count`` tokens, each of which has one before it."""
    if start is not None:
        ids = torch.cat([ids.new_tensor([start]), ids])
    ids = ids.to(model.device)
    # logits of the others would cost as much as a small model itself, where the vocabulary is large
    some = {"logits_to_keep": count + 1} if "logits_to_keep" in parameters(type(unwrap(model))) else {}
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False, **some).logits[0, -count - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[-count:], reduction="none").cpu()


@dataclass(frozen=True)
class Speed:
    """Cost of generation.

    Attributes:
        prompt: tokens of the prompt.
        generated: tokens that were generated one by one.
        prefill_tokens_s: tokens of the prompt a second, until the first logits are there.
        decode_tokens_s: generated tokens a second, the first one not counted.
        cache_bytes: of the keys and values that are held at the end (None: the model keeps no cache).
    """

    prompt: int
    generated: int
    prefill_tokens_s: float
    decode_tokens_s: float
    cache_bytes: int | None


def speed(model: Any, ids: Tensor, generated: int = 32) -> Speed:
    """Prefill ``ids`` (B, N) and go on greedily, token by token, with the model's own cache.

    The model is called as ``generate`` calls it: the prompt at once, then one token a call. Neither sampling nor the
    search for end tokens is timed. Call it once before, so that first-time costs are not in it.
    """
    if ids.dim() != 2 or ids.shape[1] < 1 or generated < 2:
        raise InvalidOption(
            f"token ids {tuple(ids.shape)}, {generated} to generate", "speed", "give it (B, N) ids and at least 2"
        )
    ids = ids.to(model.device)
    with torch.no_grad():
        begun = _now(model)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        first = _now(model)
        for _ in range(generated):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        last = _now(model)
    tokens = ids.numel()
    rate = ids.shape[0] * generated / (last - first)
    return Speed(ids.shape[1], generated, tokens / (first - begun), rate, cache_bytes(out.past_key_values))


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int | None:
    """Bytes of memory that a cache holds, each memory counted once; None without a cache.

    All tensors of its layers count (transformers' ``Cache``, its subclasses, nested lists and tuples), so a method that
    keeps indices or counts beside keys and values pays for them here, and a view pays for what it keeps alive.
    """
    if cache is None:
        return None
    seen: dict[int, int] = {}
    pending, known = [cache], set()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item
        elif hasattr(item, "__dict__") and id(item) not in known and not isinstance(item, torch.nn.Module | type):
            known.add(id(item))
            pending += vars(item).values()
    return sum(seen.values())
