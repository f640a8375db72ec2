"""INT8: dense attention with 8- or 4-bit products, a drop-in for any diffusers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption
from patchkit.kernels.quantised import quantised_path
from patchkit.kernels.quantised.dense import dense_layout
from patchkit.recipe_base import Recipe
from patchkit.registry import recipe

Next = Callable[[AttentionCall], Tensor]


@recipe("int8")
@dataclass(frozen=True, kw_only=True)
class Int8(Recipe):
    """Dense attention whose products are rounded to 8 or 4 bits, block by block.

    Queries are rounded in groups of 32 tokens, keys in blocks of 64 less their mean, probabilities in blocks of 64 x 64
    and values by channel; softmax and sums stay fp32. Padding masks are honoured. Where there are no Triton kernels
    (CPU) the rounding is simulated: the picture is that of a GPU, the time is not.

    Papers: SageAttention, arXiv 2410.02367 and 2411.10958; the block scales of probabilities: PAROAttention,
    arXiv 2506.16054.

    Args:
        qk: numbers of the product of queries and keys; ``"int4"`` is rounded as INT4 and multiplied as INT8.
        pv: numbers of the product of probabilities and values; ``"fp8"`` needs a card that has it.
        smooth_k: take the mean over tokens off the keys before they are rounded.
        smooth_v: the same of the values, added to the output again.
        p_scale: one scale for a block of probabilities, or one for each of its rows (closer, a little slower).
    """

    qk: Literal["none", "int8", "int4"] = "int8"
    pv: Literal["none", "int8", "int4", "fp8"] = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    p_scale: Literal["block", "row"] = "block"

    summary: ClassVar[str] = "dense attention with 8- or 4-bit products, on any diffusers model"
    paper: ClassVar[str] = "SageAttention (arXiv 2410.02367), PAROAttention (arXiv 2506.16054)"
    effect: ClassVar[Literal["replaces", "adjusts"]] = "replaces"
    families: ClassVar[tuple[str, ...]] = ("diffusers",)
    models: ClassVar[tuple[str, ...]] = (
        "hunyuanvideo", "cogvideox", "wan", "mochi", "ltx", "flux", "sd3", "qwenimage", "sd", "pixart", "sana",
    )  # fmt: skip

    def validate(self) -> None:
        """Something has to be rounded."""
        if self.qk == self.pv == "none":
            raise InvalidOption("nothing is quantised", f"recipe {self.name!r}", "give qk or pv another value")

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """The quantised op, or the model's own where it cannot stand in for it."""
        form = kernels.Format(self.qk, self.pv, self.smooth_k, self.smooth_v, self.p_scale)
        reason = _obstacle(call)
        packed = None if reason else packed_keys(call)
        if isinstance(packed, str):
            reason = packed
        if reason is not None:
            call.ledger.ran_dense(reason)
            with call.ledger.time("dense", call.q.device):
                return next(call)
        assert packed is not None
        assert not isinstance(packed, str)
        k, v, lens = packed
        if "path" not in call.state:
            name, why = quantised_path(call.q, dense_layout(call.q, k, lens), form)
            call.state["path"] = name
            call.ledger.note(path=f"{name}: {why}")
            call.ledger.caution("slower than dense expected", why if name == "blocked" else "")
        call.ledger.count("quantised")
        with call.ledger.time("quantised", call.q.device):
            return kernels.quantised_attention(
                call.q,
                k,
                v,
                qk=form.qk,
                pv=form.pv,
                smooth_k=form.smooth_k,
                smooth_v=form.smooth_v,
                p_scale=form.p_scale,
                scale=call.scale,
                kv_lens=lens,
            )


def _obstacle(call: AttentionCall) -> str | None:
    if call.causal:
        return "causal attention"
    if call.v.shape[-1] != call.q.shape[-1]:
        return "values of another head size"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        return "gradients are asked for: rounding has none"
    return None


def packed_keys(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None] | str:
    """Keys and values with the valid ones in front and their numbers (B,), or why the mask allows no such thing.

    Attention does not depend on the order of its keys, so padding can stand anywhere.
    """
    if call.mask is None:
        return call.k, call.v, None
    valid = call.key_padding()
    if valid is None:
        return "mask is not key padding"
    valid = valid.expand(call.q.shape[0], -1)
    counts = valid.sum(-1, dtype=torch.int32)
    least, behind = int(counts.min()), valid.to(torch.int8).diff(dim=-1).gt(0).any()
    if least == valid.shape[1]:
        return call.k, call.v, None
    if not bool(behind):
        return call.k, call.v, counts
    order = valid.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
    place = order[:, None, :, None].expand(-1, call.k.shape[1], -1, call.k.shape[-1])
    return call.k.gather(2, place), call.v.gather(2, place), counts
