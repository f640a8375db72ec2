"""Guidance passes of a denoiser: the conditional half of a batch, the prediction in what a denoiser returns, and what
stands in the way of a pass of one's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor

from patchkit.adapters.diffusers import hook_names
from patchkit.context import DenoiseCall, RunCall
from patchkit.errors import Conflict, UnsupportedModel

# diffusers' step caches that count forwards instead of keeping a state for each named pass
_COUNTING = {
    "faster_cache_denoiser": "FasterCache",
    "faster_cache_block": "FasterCache",
    "pyramid_attention_broadcast": "Pyramid Attention Broadcast",
    "sea_cache_root": "SeaCache",
}
# arguments of pipelines that guide by other passes, or change what a guidance pass adds -> what they do, the remedy
_OTHER_GUIDANCE = {
    "guidance_rescale": ("rescales the guided prediction by the conditional one", "call it with guidance_rescale=0.0"),
    "skip_guidance_layers": ("guides by a pass with skipped layers", "call it without skip_guidance_layers"),
    "pag_scale": ("guides by a perturbed pass in the same batch", "call it with pag_scale=0.0"),
    "image_guidance_scale": ("guides by three passes in one batch", "use a pipeline with one guidance scale"),
}


def refuse_other_guidance(call: RunCall, who: str) -> None:
    """Raise :class:`Conflict` where the arguments of a run ask for guidance that ``who`` cannot be added to."""
    signature = inspect.signature(type(call.pipeline).__call__)
    try:
        given = signature.bind_partial(call.pipeline, *call.args, **call.kwargs)
    except TypeError:  # the pipeline will say so better than we can
        return
    given.apply_defaults()
    for name, (what, remedy) in _OTHER_GUIDANCE.items():
        if given.arguments.get(name):
            raise Conflict(
                f"{name}={given.arguments[name]!r} {what}, which {who} cannot be added to",
                f"{type(call.pipeline).__name__}, argument {name!r}",
                remedy,
            )


def refuse_counting_caches(call: DenoiseCall, who: str) -> None:
    """Raise :class:`Conflict` where a step cache counts forwards: one more forward in a step puts it out of step.

    Caches that keep a state for each name given to ``cache_context`` are fine if the pass has a name of its own.
    """
    found = sorted({_COUNTING[name] for name in hook_names(call.module) & _COUNTING.keys()})
    if found:
        raise Conflict(
            f"{', '.join(found)} counts the denoiser's forwards, and {who} makes one more in every step",
            call.component,
            f"{call.component}.disable_cache(), or a cache that keeps a state for each pass (FirstBlockCache)",
        )


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
