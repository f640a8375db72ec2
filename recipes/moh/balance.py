"""The load-balance loss: it keeps tokens from all choosing the same heads."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from patchkit.adapters.base import layers_of

IGNORED = -100  # label of a token that is not learned from
BETA = 0.01  # weight of the load-balance loss, everywhere in the paper and its code
REENTRANT = (
    "MoH's load-balance loss is missing from this loss: reentrant checkpointing calls the layers without gradients. "
    'Give gradient_checkpointing_kwargs={"use_reentrant": False}.'
)


def imbalance(scores: Tensor, active: Tensor, counted: Tensor | None) -> Tensor:
    """E^2 mean_i(P_i f_i) of one layer, a scalar; K if all heads are chosen equally often, and more otherwise.

    P_i is the mean probability of routed head i, f_i the share of tokens that chose it. Only P has a gradient.

    Args:
        scores: p (B, E, N).
        active: bool (B, E, N), the routed heads that are on.
        counted: bool (B, N), the tokens that count: no padding, no prompt. None = all.
    """
    heads = scores.shape[1]
    chosen = active.detach().to(scores.dtype)
    if counted is None:
        p, f = scores.mean((0, 2)), chosen.mean((0, 2))
    else:
        weight = counted.to(scores.device, scores.dtype)[:, None]
        total = weight.sum().clamp_min(1.0)
        p, f = (scores * weight).sum((0, 2)) / total, (chosen * weight).sum((0, 2)) / total
    return heads * heads * (p * f).mean()


def counted_tokens(attention_mask: Any, labels: Any) -> Tensor | None:
    """Bool (B, N): tokens that are neither padding nor, where labels are given, unlabelled; None = nobody tells."""
    real = attention_mask.bool() if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return real
    learned = labels != IGNORED
    if real is None:
        return learned
    return real[:, -labels.shape[1] :] & learned if real.shape[1] >= labels.shape[1] else learned


class Collector:
    """Gathers the layers' imbalances during one forward of a model, and nothing after it.

    Gradient checkpointing calls attention again in the backward pass: those calls see the same ``counted`` but add
    nothing. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.counted: Tensor | None = None
        self.latest: Tensor | None = None
        self.weight = 0.0
        self.missed = False  # whether layers were called without gradients in a forward that has them
        self._found: list[Tensor] | None = None

    @property
    def gathers(self) -> bool:
        """Whether a forward is under way."""
        return self._found is not None

    def switch(self, on: bool) -> None:
        """The patch it gathers for is enabled or disabled: what is known is from before."""
        self.remove()

    def remove(self) -> None:
        """Forget the latest loss, and with it the graph behind it."""
        self.latest = self.counted = None

    def begin(self, arguments: dict[str, Any]) -> None:
        """A forward begins; ``arguments`` are the model's."""
        self.counted = counted_tokens(arguments.get("attention_mask"), arguments.get("labels"))
        self.latest, self._found, self.missed = None, [], False

    def tokens(self, batch: int, count: int) -> Tensor | None:
        """Which of the layer's tokens count: (B, N) bool, or None."""
        known = self.counted
        if known is None or known.shape[0] != batch or known.shape[1] < count:
            return None
        return known[:, known.shape[1] - count :]

    def add(self, loss: Tensor, weight: float) -> None:
        """What one layer found, and the weight that the mean over layers shall have."""
        if self._found is not None:
            self._found.append(loss)
            self.weight = weight

    def miss(self) -> None:
        """A layer was called that records no gradient."""
        if self._found is not None:
            self.missed = True

    def end(self) -> Tensor | None:
        """The mean over the layers that route, also kept as ``latest``; None if none did."""
        found, self._found = self._found, None
        if found:
            self.latest = torch.stack([loss.to(found[0].device) for loss in found]).mean()
        return self.latest

    def __getstate__(self) -> dict[str, Any]:
        return {"counted": None, "latest": None, "weight": 0.0, "missed": False, "_found": None}


# of models patched with mode="train"
collectors: weakref.WeakKeyDictionary[Any, Collector] = weakref.WeakKeyDictionary()


def warn_if_missed(collector: Collector) -> None:
    """A forward with gradients has ended: say so if the layers had none, and so no load-balance loss."""
    if collector.missed and collector.latest is None and not torch.compiler.is_compiling():
        warnings.warn(REENTRANT, stacklevel=2)


def add_to(output: Any, loss: Tensor | None, weight: float, arguments: dict[str, Any], shifts: bool) -> Any:
    """Add ``weight`` times the load-balance loss to the loss in a model's output, where it has one.

    With ``num_items_in_batch`` among the arguments, as transformers' Trainer gives it, the model's loss is a sum over
    this part of a batch, over the labels of the whole batch: the part's weight is its share of those labels, so that
    the parts of an accumulated batch add up to a mean. Otherwise both are means. ``shifts``: whether the model's loss
    leaves out the first label of each row, as those of causal language models do.
    """
    if loss is None or not weight:
        return output
    own = _loss_of(output)
    if own is None:
        return output
    share: Any = 1.0
    whole, labels = arguments.get("num_items_in_batch"), arguments.get("shift_labels")
    if labels is None and isinstance(arguments.get("labels"), Tensor):
        labels = arguments["labels"][..., 1:] if shifts else arguments["labels"]
    if whole is not None and isinstance(labels, Tensor):
        whole = whole.to(own.device) if isinstance(whole, Tensor) else whole
        share = (labels != IGNORED).sum().to(own.device) / whole
    total = own + weight * share * loss.to(own.device)
    if isinstance(output, tuple):
        return (total, *output[1:])
    output["loss"] = total
    return output


def _loss_of(output: Any) -> Tensor | None:
    found = output.get("loss") if isinstance(output, dict) else None
    if isinstance(output, tuple) and output:
        found = output[0] if isinstance(output[0], Tensor) and output[0].ndim == 0 else None
    return found if isinstance(found, Tensor) else None


def shifts_labels(model: Any) -> bool:
    """Whether a model's loss leaves out the first label of each row."""
    return str(getattr(model, "loss_type", "")) in ("ForCausalLM", "ForConditionalGeneration")


def auxiliary_loss(model: Any) -> Tensor | None:
    """The load-balance loss of the latest forward, a scalar with gradients, not yet weighted; None if there is none.

    In training it has been added to the loss in the model's output. This is for who computes a loss from logits.

    Args:
        model: a model with an adapter of :class:`MoHConfig`, or one patched with ``mode="train"``.
    """
    for part in _inward(model):
        passage = vars(part).get("_patchkit_passage")
        collector = getattr(passage, "collector", None) or _known(part)
        if collector is not None:
            found: Tensor | None = collector.latest
            return found
    return None


def _known(part: Any) -> Collector | None:
    try:
        return collectors.get(part)
    except TypeError:  # what cannot be held weakly was never patched
        return None


def _inward(model: Any) -> Any:
    """A model and what wrappers hold."""
    yield from layers_of(model)
    inner = getattr(model, "module", None)  # of DistributedDataParallel
    if inner is not None and inner is not model:
        yield from layers_of(inner)
