"""The weak pass of SoftPAG: which passes it is for, what it shares with the pass before it, what its heads give.

Within one step the conditional pass runs first and leaves behind, in ``call.shared``, what the weak pass need not
compute again: what the blocks before the first perturbed one return, and the attention output of that block. Both
passes get the same inputs up to there, so the result is that of a whole weak pass.

A recipe inside may cut both passes into parts (tiles of a long video), with other batches than the pipeline's; so what
is left behind is kept for each part, and which of its samples are conditional is told by the part's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.adapters.diffusers import hook_names
from patchkit.context import AttentionCall, BlockCall, DenoiseCall, Moment
from patchkit.errors import Conflict, PatchkitError
from patchkit.guidance import add_to_all, batch_of, conditional, half, prediction, refuse_counting_caches
from patchkit.recipes.headhunter.perturb import blend, pushed

if TYPE_CHECKING:
    from patchkit.recipes.headhunter.softpag import SoftPAG

WEAK = "weak"  # the branch of the pass: other recipes keep a state of its own for it
GUIDED = ("cond", "single", "batched")


def guided(recipe: SoftPAG, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
    """The denoiser's output with w (eps_cond - eps_weak) added to every guidance pass."""
    check(recipe, call)
    key = ("delta", call.component, call.moment.part)
    if call.branch == "uncond":
        if key not in call.shared or call.shared[key][0] != call.step:
            raise PatchkitError(
                "the unconditional pass runs before the conditional one",
                f"{call.component}, step {call.step}",
                f"this pipeline's order of guidance passes is not supported by {recipe.name}",
            )
        return add_to_all(next(call), call.shared[key][1], call)
    out, delta = both(recipe, call, next)
    if call.branch == "cond":
        call.shared[key] = (call.step, delta)
    return add_to_all(out, delta, call)


def both(recipe: SoftPAG, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> tuple[Any, Tensor]:
    """The denoiser's own output, and w (eps_cond - eps_weak) for the conditional samples."""
    batched = call.branch == "batched"
    call.shared["kept", call.component] = {"samples": batch_of(call)}
    device = _device(call)
    with call.ledger.time("batched pass" if batched else "conditional pass", device):
        out = next(call)
    whole = prediction(out, call)
    strong = whole[whole.shape[0] // 2 :] if batched else whole
    weak_call = conditional(call).replace(moment=Moment(call.step, call.total, WEAK, call.moment.part))
    try:
        with call.ledger.time("weak pass", device), _own_cache(call):
            faint = prediction(next(weak_call), call)
    finally:
        call.shared.pop(("kept", call.component), None)
    call.ledger.count("weak passes")
    return out, recipe.scale * (strong - faint)


def check(recipe: SoftPAG, call: DenoiseCall) -> None:
    """Refuse, once a run, what the weak pass would disturb; and passes that nobody names."""
    if call.branch not in (*GUIDED, "uncond"):
        raise PatchkitError(
            f"the denoiser is called as {call.branch!r}, and nobody says which guidance pass that is",
            f"{call.component}, step {call.step}",
            f"{recipe.name} knows passes in one batch, and passes named 'cond' and 'uncond' by cache_context",
        )
    if call.kwargs.get("skip_layers") is not None:
        raise Conflict(
            f"skip-layer guidance and {recipe.name} in the same run",
            call.component,
            f"call the pipeline without skip_guidance_layers, or remove {recipe.name}",
        )
    if ("hooked", call.component) not in call.shared:
        refuse_counting_caches(call, recipe.name)
        call.shared["hooked", call.component] = bool(hook_names(call.module))


def _device(call: DenoiseCall) -> torch.device:
    for x in (*call.args, *call.kwargs.values()):
        if isinstance(x, Tensor):
            return x.device
    return torch.device("cpu")


def _own_cache(call: DenoiseCall) -> contextlib.AbstractContextManager[Any]:
    """Step caches keep their state by the name of the pass."""
    name = getattr(call.module, "cache_context", None)
    if callable(name) and call.shared["hooked", call.component]:
        context: contextlib.AbstractContextManager[Any] = name(WEAK)
        return context
    return contextlib.nullcontext()


def shared_prefix(recipe: SoftPAG, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
    """Blocks before the first perturbed one run once a step; the weak pass gets what they returned."""
    kept = call.shared.get(("kept", call.block.component))
    first, part = recipe.first, call.moment.part
    if call.branch == WEAK:
        call.ledger.note(first_block=first, blocks=call.block.layers)
    elif kept is not None:
        kept["samples", part] = _batch_of_block(call)
    if kept is None or first is None or call.layer >= first:
        return _forward(call, next)
    # Where blocks hand their output to the next one only, the last of each list is enough.
    name = ("block", part, call.block.stack if call.block.chained else call.block.name)
    if call.branch == WEAK:
        if name not in kept:
            return _forward(call, next)
        call.ledger.count("shared blocks")
        return kept[name]
    out = _forward(call, next)
    if call.block.must_run is None and call.branch != "uncond":
        kept[name] = half(out, kept["samples", part]) if call.branch == "batched" else out
    return out


def _batch_of_block(call: BlockCall) -> int:
    """Samples in a block's input: those of the forward that runs it."""
    found = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
    return 0 if found is None else int(found.shape[0])


def _forward(call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
    call.ledger.count("weak block forwards" if call.branch == WEAK else "block forwards")
    if call.branch in GUIDED:
        call.ledger.count("conditional block forwards")
    return next(call)


def perturbed(recipe: SoftPAG, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
    """One op of a perturbed block: untouched in other passes, its chosen heads pushed in the weak one."""
    kept = call.shared.get(("kept", call.site.component))
    if call.branch != WEAK:
        out = next(call)
        if kept is not None and call.site.layer == recipe.first:
            _keep(kept, call, out)
        return out
    gate = recipe.gate(call)
    if not bool((gate > 0).any()):
        return next(call)  # a preset's recipe stands at every layer
    if call.index > 0 and call.q.shape[2] != call.k.shape[2]:
        call.ledger.count("ops of adapters left alone")  # IP-Adapter: the image queries attend to an image prompt
        return next(call)
    form, name = recipe.form, ("op", call.moment.part, call.site.name, call.index)
    # Up to the first module that is perturbed the passes are the same; a second one in that block may build on it.
    if kept is not None and name in kept and kept.setdefault("forked", call.site.name) == call.site.name:
        call.ledger.count("shared ops")
        out = kept.pop(name)
    elif form.ignores_queries and bool((gate == 1).all()):
        call.ledger.count("ops without attention")
        return pushed(call, None, form).to(call.q.dtype)
    else:
        out = next(call)
    chosen = gate.amax(0).nonzero()[:, 0].tolist()
    result = out.clone()
    own = gate[:, chosen].to(out.device)
    result[:, chosen] = blend(out[:, chosen], pushed(call, out, form)[:, chosen], own)
    return result


def _keep(kept: dict[Any, Any], call: AttentionCall, out: Tensor) -> None:
    """Keep the op's output of the conditional samples, as the weak pass will ask for it."""
    index, part = call.index, call.moment.part
    if call.branch == "uncond":  # of a part whose halves are forwarded one by one
        return
    if call.branch == "batched":
        # where no block came by (a model that is compiled whole), a part's op has the batch of its forward
        samples = kept.get(("samples", part)) or (out.shape[0] if part else kept["samples"])
        if out.shape[0] == samples:
            out = out[samples // 2 :]
        else:  # the model calls the op sample by sample (Mochi)
            index -= samples // 2
    if index >= 0:
        kept["op", part, call.site.name, index] = out
