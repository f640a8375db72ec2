"""What attention over classes of keys gives: the mass of each class, and the output inside any union of them."""

from __future__ import annotations

import abc

import torch
from torch import Tensor


class Parts(abc.ABC):
    """The softmax of each row, taken apart by class of key.

    Attributes:
        top: (B, H, q_len) fp32, the largest visible logit; 0 for rows that see nothing.
        sums: (B, H, q_len, classes) fp32, sum of exp(logit - top) over each class.
    """

    top: Tensor
    sums: Tensor

    @property
    def total(self) -> Tensor:
        """(B, H, q_len): sum over all classes; 0 for rows that see nothing."""
        return self.sums.sum(-1)

    def sum(self, *classes: int) -> Tensor:
        """(B, H, q_len): sum of exp(logit - top) over some classes."""
        first, *others = (self.sums[..., c] for c in classes)
        for other in others:
            first = first + other
        return first

    def share(self, *classes: int) -> Tensor:
        """(B, H, q_len): the attention that goes to some classes, in [0, 1]; 0 for rows that see nothing."""
        return self.sum(*classes) / self.total.clamp_min(torch.finfo(torch.float32).tiny)

    def lse(self, *classes: int) -> Tensor:
        """(B, H, q_len): natural-log sum of exp(logit) over some classes; -inf where they have no visible key."""
        return self.top + self.sum(*classes).log()

    @abc.abstractmethod
    def outputs(self, *unions: tuple[int, ...]) -> tuple[Tensor, ...]:
        """(B, H, q_len, D) fp32 for each union of classes: attention renormalised inside it; 0 where it is empty."""

    @abc.abstractmethod
    def mixed(self, coefficients: Tensor) -> Tensor:
        """(B, H, q_len, D) fp32: the sum over keys of coefficient x exp(logit - top) x value.

        Args:
            coefficients: (B, H, q_len, classes) fp32, one for all keys of a class. One pass over the values.
        """

    def output(self, *classes: int) -> Tensor:
        """(B, H, q_len, D) fp32: attention renormalised inside the union of some classes; 0 where it is empty."""
        return self.outputs(classes)[0]


class Weighted(Parts):
    """Parts that keep the weight of every key; outputs are computed when they are asked for.

    Args:
        weights: (B, H, q_len, kv_len) fp32, exp(logit - top); 0 for keys that a row does not see.
        members: (B, kv_len, classes) fp32, 1 where a key is of a class.
        v: (B, Hkv, kv_len, D) fp32.
    """

    def __init__(self, top: Tensor, sums: Tensor, weights: Tensor, members: Tensor, v: Tensor) -> None:
        self.top, self.sums = top, sums
        self._weights, self._members, self._v = weights, members, v

    def outputs(self, *unions: tuple[int, ...]) -> tuple[Tensor, ...]:
        """One pass over the values for all unions."""
        B, H, n, _ = self._weights.shape
        kv_heads = self._v.shape[1]
        chosen = [self._weights * self._members[..., list(u)].sum(-1)[:, None, None] for u in unions]
        rows = torch.stack(chosen, 2).view(B, kv_heads, -1, self._weights.shape[-1])  # (B, Hkv, group * unions * n, M)
        # A product of 0 and a value that is no number would spoil rows that do not see it: not expected of a model.
        made = (rows @ self._v).view(B, H, len(unions), n, -1)
        tiny = torch.finfo(torch.float32).tiny
        return tuple(made[:, :, i] / self.sum(*u).clamp_min(tiny)[..., None] for i, u in enumerate(unions))

    def mixed(self, coefficients: Tensor) -> Tensor:
        """With the weights of all keys scaled class by class."""
        B, H, n, keys = self._weights.shape
        scaled = self._weights * (coefficients @ self._members.transpose(-1, -2)[:, None])
        return (scaled.view(B, self._v.shape[1], -1, keys) @ self._v).view(B, H, n, -1)


class Accumulated(Parts):
    """Parts whose outputs have been computed class by class.

    Args:
        values: (B, H, q_len, classes, D) fp32, sum of exp(logit - top) * v over each class.
    """

    def __init__(self, top: Tensor, sums: Tensor, values: Tensor) -> None:
        self.top, self.sums, self._values = top, sums, values

    def outputs(self, *unions: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Sums of what is there."""
        tiny = torch.finfo(torch.float32).tiny
        return tuple(self._values[:, :, :, list(u)].sum(3) / self.sum(*u).clamp_min(tiny)[..., None] for u in unions)

    def mixed(self, coefficients: Tensor) -> Tensor:
        """Sums of what is there."""
        return (self._values * coefficients[..., None]).sum(3)
