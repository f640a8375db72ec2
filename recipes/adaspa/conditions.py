"""What one attention call allows: why AdaSpa cannot work on it, where its text and padding are, when a mask is due."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from patchkit.context import AttentionCall
from patchkit.recipes.adaspa.schedule import Schedule
from patchkit.recipes.adaspa.selection import Geometry

logger = logging.getLogger(__name__)

FEW_STEPS = 10


def obstacle(call: AttentionCall, schedule: Schedule | None, min_tokens: int) -> str | None:
    """Why this op cannot be AdaSpa's at any step, as far as this can be said without waiting for the device."""
    tokens = call.q.shape[2]
    if call.step is None:
        reason = "no step clock: nobody tells which denoising step this is (patch the pipeline, not the model)"
    elif schedule is None:
        reason = "length of the run unknown: give warmup_steps and search_steps as step numbers"
    elif tokens != call.k.shape[2]:
        return "queries and keys differ in number"
    elif tokens < min_tokens:
        return f"below min_tokens: {tokens} < {min_tokens}"
    elif call.causal:
        return "causal attention"
    elif call.site.kind == "joint" and call.text is None:
        return "joint attention, but where the text stands is unknown"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        return "gradients are asked for: the search is not differentiable"
    else:
        return None
    warn_once(f"adaspa runs dense: {reason}")
    return reason


def geometry_of(call: AttentionCall, block: tuple[int, int]) -> Geometry | str:
    """Where text, video and padding are, or why AdaSpa cannot work on this sequence."""
    valid = call.key_padding()
    if call.mask is not None and valid is None:
        return "mask is not key padding"
    if valid is not None:
        valid = valid.expand(call.q.shape[0], -1)
    return Geometry.of(call.q.shape[2], block, call.text, valid)


def why_search(call: AttentionCall, geometry: Geometry, schedule: Schedule) -> str | None:
    """Why a fused search is due, or None if there is a mask for this very sequence."""
    if "layout" in call.state:
        return None if call.state["key"] == sequence(call, geometry) else "sequence changed: new search"
    if call.step != schedule.first:
        return "no mask yet in the sparse phase: first search"
    return "warm-up" if schedule.warm_up else "first search"


def sequence(call: AttentionCall, geometry: Geometry) -> tuple[Any, ...]:
    """What a layout is made for; it serves calls that are equal in this."""
    return (call.q.shape, call.k.shape, call.q.device, call.q.dtype, call.text, geometry)


def announce(call: AttentionCall, schedule: Schedule) -> None:
    """Once a run: say what the schedule cannot do."""
    total, left = schedule.total, schedule.sparse_steps
    if total is not None and left is not None and (total < FEW_STEPS or left == 0):
        text = (
            f"{total} steps leave {left} for sparse attention: warm-up and reuse of the mask need more "
            "(few-step distilled models gain little here)"
        )
        call.ledger.note(warning=text)
        warn_once(f"adaspa: {text}")
    if schedule.ignored:
        call.ledger.note(ignored_searches=str(list(schedule.ignored)))
        warn_once(f"adaspa: search steps {list(schedule.ignored)} are inside the warm-up or past the end: ignored")


@functools.lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Log the same sentence once, however many layers and steps have reason to."""
    logger.warning(text)
