"""The operators of language models in the survey: filters and runs of keys, packed attention, classes of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import classes, deadband, packed, routed, runs
from ..classes.reference import class_attention_reference
from ..deadband.reference import dead_band_reference
from ..dense import dense_attention
from ..packed.reference import packed_attention_reference
from ..redistribute import OTHER, TARGET, decode_obstacle, redistribute, redistribute_decode
from ..redistribute.reference import CLASSES, redistribute_reference
from ..routed.plan import triton_obstacle as routed_obstacle
from ..routed.reference import routed_reference
from ..runs.reference import find_runs_reference, pack_runs_reference
from .problem import TOKENS, Operator, Problem, Tensors, Why, example

THETA = 0.5  # of changes of an element
NEAR = 1.0  # of distances: the keys of a run are equal, those of two runs about 11 apart
CHUNK, PAST = 64, 192
ROWS = 100  # queries that are edited
RULE: dict[str, Any] = {"recycle": 0.6, "rho": 0.5, "least": 0.2}


def operators(every: tuple[torch.dtype, ...]) -> dict[str, Operator]:
    """Operator -> (device -> (path, reason), dtypes, the operator, its reference)."""
    return {
        "dead_band": (_why(lambda p: deadband.triton_obstacle(p.k)), every, _dead_band, _dead_band_exact),
        "find_runs": (_why(lambda p: runs.triton_obstacle(p.k)), every, _find_runs, _find_runs_exact),
        "pack_runs": (_why(lambda p: runs.triton_obstacle(p.k, p.v)), every, _pack_runs, _pack_runs_exact),
        "packed_attention": (_why(lambda p: packed.triton_obstacle(p.q, p.k, CHUNK, 5)), every, _packed, _packed_exact),
        "class_attention": (_why(_class_obstacle), every, _classes, _classes_exact),
        "routed_attention": (_why(lambda p: routed_obstacle(p.q, p.k)), every, _routed, _routed_exact),
        "routed_attention, backward": (
            _why(lambda p: "weights are computed again in plain torch"),
            every,
            _routed_backward,
            _routed_backward_exact,
        ),
        "redistribute": (
            _why(lambda p: "only decoding has a Triton kernel"),
            every,
            _redistribute,
            _redistribute_exact,
        ),
        "redistribute, decoding": (_why(_decode_obstacle), every, _decode, _decode_exact),
    }


def _why(obstacle: Callable[[Problem], str | None]) -> Why:
    """Asked with the problem's own tensors: what a kernel does not take shows with its reason."""

    def path(device: torch.device) -> tuple[str, str]:
        missing = obstacle(example(torch.bfloat16 if device.type == "cuda" else torch.float32, device))
        return ("triton", "Triton kernel") if missing is None else ("blocked", missing)

    return path


def _back(p: Problem, *found: Tensor) -> Tensors:
    """What a reference on the CPU gave, on the device of the problem."""
    return tuple(x.to(p.q.device) for x in found)


# --- keys as changes, and as runs ----------------------------------------------------------------------------------


def _dead_band(p: Problem) -> Tensors:
    return (deadband.dead_band(p.k, THETA)[0],)


def _dead_band_exact(p: Problem) -> Tensors:
    return _back(p, dead_band_reference(p.here.k, THETA)[0].cumsum(2))


def _pairs(p: Problem) -> Tensor:
    """Keys of which two neighbours each are equal."""
    return p.k.repeat_interleave(2, 2)[:, :, :TOKENS]


def _find_runs(p: Problem) -> Tensors:
    return (runs.find_runs(_pairs(p), NEAR, metric="euclidean", chunk=CHUNK, single=4),)


def _find_runs_exact(p: Problem) -> Tensors:
    return _back(p, find_runs_reference(_pairs(p.here), NEAR, "euclidean", CHUNK, 4))


def _pack_runs(p: Problem) -> Tensors:
    made = runs.pack_runs(p.k, p.v, _find_runs(p)[0])
    return made.keys, made.values, made.counts


def _pack_runs_exact(p: Problem) -> Tensors:
    keys, values, counts = pack_runs_reference(p.here.k, p.here.v, _find_runs_exact(p.here)[0])
    return _back(p, keys[0][0][None, None], values[0][0][None, None], counts[0][0][None, None])


def _packed(p: Problem) -> Tensors:
    past, used, starts = _past(p)
    return (packed.packed_attention(p.q, past, used, p.k, p.v, starts, chunk=CHUNK, first=PAST),)


def _packed_exact(p: Problem) -> Tensors:
    past, used, starts = _past(p.here)
    q, k, v = p.here[:3]
    return _back(p, packed_attention_reference(q, past, used, k, v, starts, chunk=CHUNK, first=PAST))


def _past(p: Problem) -> tuple[runs.Packed, Tensor, list[int]]:
    """A past of 192 tokens in runs of two, before the tokens of the problem."""
    keys = _pairs(p)[:, :, :PAST]
    begins = runs.find_runs(keys, NEAR, metric="euclidean", chunk=CHUNK)
    made = runs.pack_runs(keys, p.v[:, :, :PAST], begins)
    return made, begins.sum(-1, dtype=torch.int32).expand(5, -1, -1).contiguous(), [PAST] * 5


# --- routed heads ----------------------------------------------------------------------------------------------------


def _routing(p: Problem) -> dict[str, Any]:
    """Half of the rows, gates, a causal diagonal and a little padding."""
    at = torch.arange(TOKENS, device=p.q.device)
    active = torch.stack([(at * 7 + h) % 5 < 2 + h for h in range(p.q.shape[1])])[None]
    gates = 0.5 + (at % 3).float().expand(1, p.q.shape[1], -1) / 2
    return {"active": active, "gates": gates, "causal": True, "mask": (at >= 9)[None, None, None]}


def _routed(p: Problem) -> Tensors:
    path: Any = "blocked" if routed_obstacle(p.q, p.k) else "triton"
    return (routed.routed_attention(p.q, p.k, p.v, **_routing(p), path=path),)


def _routed_exact(p: Problem) -> Tensors:
    return (routed_reference(p.q, p.k, p.v, **_routing(p)),)


def _routed_backward(p: Problem) -> Tensors:
    return _routed_gradients(p, routed.routed_attention)


def _routed_backward_exact(p: Problem) -> Tensors:
    return _routed_gradients(p, routed_reference)


def _routed_gradients(p: Problem, attend: Callable[..., Tensor]) -> Tensors:
    with torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out = attend(*leaves, **_routing(p))
        wave = torch.arange(out.numel(), device=out.device).view(out.shape).sin()
        return torch.autograd.grad(out, leaves, wave.to(out.dtype))


# --- classes of keys -------------------------------------------------------------------------------------------------


def _kinds(p: Problem) -> Tensor:
    """A few sinks of either kind, and image tokens between text."""
    at = torch.arange(TOKENS, device=p.q.device)
    kinds = torch.where((at >= 20) & (at < 220), TARGET, OTHER)
    kinds = torch.where(at % 37 == 0, torch.where(kinds == TARGET, 2, 1), kinds)
    return kinds.to(torch.uint8)[None]


def _class_obstacle(p: Problem) -> str | None:
    return classes.triton_obstacle(p.q[:, :, -1:], p.k, p.v, CLASSES)


def _classes(p: Problem) -> Tensors:
    made = classes.class_attention(p.q[:, :, -1:], p.k, p.v, _kinds(p), CLASSES)
    every = range(CLASSES)
    return torch.stack(made.outputs(*((c,) for c in every)), 3), torch.stack([made.share(c) for c in every], -1)


def _classes_exact(p: Problem) -> Tensors:
    outputs, lse = class_attention_reference(p.q[:, :, -1:], p.k, p.v, _kinds(p), CLASSES)
    return outputs, lse.softmax(-1)


def _several(p: Problem) -> str | None:
    return "several queries"


def _redistribute(p: Problem) -> Tensors:
    q = p.q[:, :, :ROWS]
    out = dense_attention(q, p.k, p.v, enable_gqa=True)
    made = redistribute(out, q, p.k, p.v, _kinds(p), **RULE)
    return made.out, made.selected


def _redistribute_exact(p: Problem) -> Tensors:
    return redistribute_reference(p.q[:, :, :ROWS], p.k, p.v, _kinds(p), **RULE)


def _decode_obstacle(p: Problem) -> str | None:
    return decode_obstacle(p.q[:, :, -1:], p.k, p.v)


def _decode(p: Problem) -> Tensors:
    q = p.q[:, :, -1:]
    if _decode_obstacle(p) is None:
        made = redistribute_decode(q, p.k, p.v, _kinds(p), **RULE)
    else:
        out = dense_attention(q, p.k, p.v, enable_gqa=True)
        made = redistribute(out, q, p.k, p.v, _kinds(p), **RULE)
    return made.out, made.selected


def _decode_exact(p: Problem) -> Tensors:
    return redistribute_reference(p.q[:, :, -1:], p.k, p.v, _kinds(p), **RULE)
