"""Guidance passes of a denoiser: the conditional half of a batch, and the prediction in what a denoiser returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from patchkit.context import DenoiseCall
from patchkit.errors import UnsupportedModel

# Arguments without a batch dimension, whose first one may happen to be as long as the batch.
_SHARED = ("rope", "rotary", "freqs", "img_ids", "txt_ids", "image_ids", "text_ids", "pos")


def conditional(call: DenoiseCall) -> DenoiseCall:
    """The call with the conditional (second) half of its batch, where both guidance passes are in one; else itself."""
    if call.branch != "batched":
        return call
    batch = batch_of(call)
    args = tuple(half(x, batch) for x in call.args)
    kwargs = {name: x if any(word in name for word in _SHARED) else half(x, batch) for name, x in call.kwargs.items()}
    return call.replace(args=args, kwargs=kwargs)


def batch_of(call: DenoiseCall) -> int:
    """Samples in a denoiser's call, all guidance passes together."""
    for name in ("hidden_states", "sample"):
        if isinstance(call.kwargs.get(name), Tensor):
            return int(call.kwargs[name].shape[0])
    if call.args and isinstance(call.args[0], Tensor):
        return int(call.args[0].shape[0])
    raise UnsupportedModel(
        f"{type(call.module).__name__} was called without latents that we know", call.component, "report this model"
    )


def half(x: Any, batch: int) -> Any:
    """The second half of every tensor of ``batch`` samples in ``x``, also inside lists, tuples and dictionaries."""
    if isinstance(x, Tensor):
        return x[batch // 2 :] if x.ndim and x.shape[0] == batch else x
    if isinstance(x, dict):
        return type(x)({name: half(value, batch) for name, value in x.items()})
    if isinstance(x, list | tuple) and type(x) in (list, tuple):
        return type(x)(half(value, batch) for value in x)
    return x


def prediction(out: Any, call: DenoiseCall) -> Tensor:
    """The predicted noise or velocity in what a denoiser returned."""
    found = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    if not isinstance(found, Tensor):
        raise UnsupportedModel(
            f"{type(call.module).__name__} returned {type(out).__name__}, in which we know no prediction",
            call.component,
            "this recipe needs denoisers that return a tuple or an output with `sample`",
        )
    return found


def with_prediction(out: Any, new: Tensor) -> Any:
    """What the denoiser returned, with another prediction."""
    if isinstance(out, tuple):
        return (new, *out[1:])
    if isinstance(out, Tensor):
        return new
    return dataclasses.replace(out, sample=new)


def add_to_all(out: Any, delta: Tensor, call: DenoiseCall) -> Any:
    """Add ``delta`` (samples of one pass) to the prediction of every guidance pass in ``out``.

    Guidance combines passes with weights that sum up to one, so whatever its scale, the result moves by ``delta``.
    """
    found = prediction(out, call)
    passes = found.shape[0] // delta.shape[0]
    return with_prediction(out, found + torch.cat([delta] * passes) if passes > 1 else found + delta)
