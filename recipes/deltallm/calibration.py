"""Thresholds for a model: per layer, so that each removes the same share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from patchkit import kernels
from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption
from patchkit.recipe_base import Recipe
from patchkit.sites import Site

if TYPE_CHECKING:
    from patchkit.recipes.deltallm import DeltaLLM

logger = logging.getLogger(__name__)

WHERE = "calibrate(model, texts, target_sparsity)"
STEPS = 18  # halvings of the range of theta


@dataclass(frozen=True, kw_only=True)
class _Watch(Recipe):
    """Hands the keys of every call to ``found``, by layer. Not registered: no user asks for it."""

    name: ClassVar[str] = "deltallm-calibration"
    families: ClassVar[tuple[str, ...]] = ("transformers",)
    found: Any = None
    accepted: Any = None

    def accepts(self, site: Site) -> str | None:
        reason: str | None = self.accepted(site)
        return reason

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        self.found.setdefault(call.site.layer, []).append(call.k.detach())
        self.found["layers"] = call.site.layers
        return next(call)


def calibrate(
    model: Any,
    texts_or_input_ids: str | Sequence[Any] | Tensor,
    target_sparsity: float = 0.5,
    *,
    tokenizer: Any = None,
    max_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Find a threshold for each layer at which it reaches ``target_sparsity`` on some text.

    The model runs dense over the text once, without a cache; the thresholds are then found by bisection over the keys
    it made, because sparsity grows with theta. Sparsity is, in runs mode, the share of rows that packing removes; in
    elements mode the paper's count: the share of changes that are 0, times the share of tokens outside the window.

    Args:
        model: a loaded transformers language model (or a text-generation pipeline), patched or not.
        texts_or_input_ids: one text or several (with ``tokenizer``, unless the pipeline has one), or token ids: a
            tensor (N,) or (B, N) without padding, or a list of such. Some thousand tokens of the kind that the model
            will read are enough.
        target_sparsity: what each layer is to reach, in (0, 1).
        tokenizer: for texts.
        max_tokens: longer texts are cut.
        progress: is told how many layers are done, of how many.
        options: of the recipe (``mode``, ``metric``, ``window``, ``chunk``, ``layers`` ...), all but ``theta``.

    Returns:
        Options for ``patchkit.apply(model, "deltallm", **options)``: those given, and ``theta`` as a list with one
        number a layer. Layers that the recipe leaves alone get 0.

    Raises:
        InvalidOption: no text, or a target that cannot be reached.
    """
    from patchkit.recipes.deltallm import DeltaLLM

    if not 0 < target_sparsity < 1:
        raise InvalidOption(f"target_sparsity is {target_sparsity}", WHERE, "use a number between 0 and 1")
    if "theta" in options:
        raise InvalidOption("theta is what is looked for", WHERE, "leave it out")
    recipe = DeltaLLM.build(options, WHERE)
    sequences = _sequences(model, texts_or_input_ids, tokenizer, max_tokens)
    thetas = thresholds(keys_of(model, sequences, recipe), recipe, target_sparsity, progress)
    return recipe.options() | {"mode": recipe.mode, "metric": recipe.metric, "theta": thetas}


def thresholds(
    keys: list[list[Tensor]],
    recipe: DeltaLLM,
    target: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """A threshold for each layer from its keys; 0 for layers without any."""
    found = []
    for layer, mine in enumerate(keys):
        if progress is not None:
            progress(layer, len(keys))
        found.append(_bisect(mine, recipe, target) if mine else 0.0)
        logger.info("layer %d: theta %.4g", layer, found[-1])
    return found


def sparsity(k: Tensor, recipe: DeltaLLM, theta: float) -> float:
    """What keys (B, Hkv, N, D) reach at a threshold; see :func:`calibrate` for what is counted."""
    if recipe.mode == "runs":
        begins = kernels.find_runs(k, theta, metric=recipe.metric, chunk=recipe.chunk, single=recipe.sink)
        return 1 - float(begins.float().mean())
    from patchkit.recipes.deltallm.windows import Window

    _, kept = kernels.dead_band(k, theta)
    outside = 1 - Window(recipe.window, recipe.window_kind).exact_share(k.shape[2])
    return (1 - float(kept.sum()) / k.numel()) * outside


def _bisect(keys: list[Tensor], recipe: DeltaLLM, target: float) -> float:
    """Theta at which some keys reach a sparsity on average over their tokens."""
    tokens = [k.shape[2] * k.shape[0] for k in keys]

    def reached(theta: float) -> float:
        return sum(sparsity(k, recipe, theta) * n for k, n in zip(keys, tokens, strict=True)) / sum(tokens)

    cosine = recipe.mode == "runs" and recipe.metric == "cosine"
    most = max(float(k.float().norm(dim=-1).max() if recipe.metric == "euclidean" else k.abs().max()) for k in keys)
    low, high = (1.0, -1.0) if cosine else (0.0, 2 * most)  # from nothing removed to all that can be
    if reached(high) < target:
        raise InvalidOption(
            f"a sparsity of {target} is out of reach: {reached(high):.3f} is the most with these options and texts",
            WHERE,
            "aim lower, give longer texts, or make the window smaller or the chunk larger",
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= target else (middle, high)
    return float(f"{high:.5g}")


def keys_of(model: Any, sequences: list[Tensor], recipe: DeltaLLM) -> list[list[Tensor]]:
    """Keys after RoPE, (B, Hkv, N, D) a sequence, of each layer; none of layers that the recipe leaves alone."""
    import patchkit

    found: dict[Any, Any] = {}
    inner: Any = getattr(model, "model", model) if not isinstance(model, torch.nn.Module) else model
    watch = _Watch(
        found=found, accepted=recipe.accepts, layers=recipe.layers, targets=recipe.targets, exclude=recipe.exclude
    )
    with patchkit.apply(model, watch), torch.no_grad():
        for ids in sequences:
            inner(input_ids=ids.to(inner.device), use_cache=False)
    return [found.get(layer, []) for layer in range(found["layers"])]


def _sequences(model: Any, given: Any, tokenizer: Any, max_tokens: int) -> list[Tensor]:
    """Token ids (1, N) or (B, N)."""
    if isinstance(given, str) or (isinstance(given, Tensor) and given.dim() <= 2) or _numbers(given):
        given = [given]
    found = []
    for one in given:
        if isinstance(one, str):
            read = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
            if read is None:
                raise InvalidOption(
                    "texts need a tokenizer", WHERE, "pass tokenizer=, or token ids, or a text-generation pipeline"
                )
            one = read(one, return_tensors="pt").input_ids
        ids = torch.as_tensor(one)
        if ids.is_floating_point() or ids.dim() not in (1, 2):
            raise InvalidOption(f"token ids {tuple(ids.shape)} {ids.dtype}", WHERE, "give integers (N,) or (B, N)")
        ids = (ids if ids.dim() == 2 else ids[None])[:, :max_tokens]
        if ids.shape[1] < 2:
            raise InvalidOption(f"a text of {ids.shape[1]} tokens", WHERE, "give some hundred tokens at least")
        found.append(ids)
    if not found:
        raise InvalidOption("no text was given", WHERE, "give a text or token ids")
    return found


def _numbers(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(isinstance(x, int) for x in given)
