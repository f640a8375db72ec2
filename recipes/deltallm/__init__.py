"""DeltaLLM: keys of neighbouring tokens are alike, so keys become changes, or runs that share one key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.context import AttentionCall, DenoiseCall
from patchkit.errors import InvalidOption, PatchkitError
from patchkit.recipe_base import Recipe
from patchkit.recipes.deltallm import batch, elements, runs
from patchkit.recipes.deltallm.calibration import calibrate
from patchkit.recipes.deltallm.masks import starts_of
from patchkit.recipes.deltallm.windows import Border, Window
from patchkit.registry import recipe
from patchkit.sites import Site

__all__ = ["DeltaLLM", "calibrate"]

Next = Callable[[AttentionCall], Tensor]
Tokens = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

THETA = 0.6  # the authors' code's for BitNet b1.58 2B
WORTH_IT = 4096  # tokens up to which everything stays dense by default
NEXT_TO_NOTHING = 0.02  # share of rows that must be removed, or the report says that it is not


@recipe("deltallm")
@dataclass(frozen=True, kw_only=True)
class DeltaLLM(Recipe):
    """Temporal sparsity of the keys of a language model, in prefill and decoding.

    ``mode="runs"`` (the token-level form): neighbouring tokens whose keys are alike become a run, with one key, the
    mean of their values and a count. Given that keys are shared this is exact: a run of c tokens weighs c e^s. The
    tokens of a window before each query, and the first ``sink`` ones, stay exact. Prefill makes no N x N tensor, and
    the cache that ``generate`` uses holds packed rows, so it shrinks. Time and memory are saved from some thousands of
    tokens on.

    ``mode="elements"`` (the paper's form): each element of a key keeps its last value until it has moved by more than
    ``theta``. The scores are what hardware that skips zeros would compute, and the report gives the paper's sparsity.
    It saves nothing on CPUs and GPUs: it is a simulator.

    Paper: DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference,
    arXiv 2507.19608. Its body and code are not public; elements mode follows the authors' evaluation code, runs mode
    is *ours* after a follow-up's idea.

    Keys are taken after RoPE, per key-value head. Thresholds depend on the model: :func:`calibrate` finds them.
    Layers with a sliding window of their own are left dense in runs mode: it bounds their cache already.

    Args:
        mode: see above.
        theta: threshold, one for all layers or a list with one a layer. Element mode and ``metric="max"``: of a
            key's difference in each element; ``"euclidean"``: of its distance; ``"cosine"``: the least cosine.
            None: 0.6, the authors' value for BitNet; 0.83 for cosines.
        metric: how runs mode measures likeness.
        window: exact tokens before each query: a number (int) or a share of the tokens (float), then at least 16 when
            sliding. Runs mode rounds up to whole chunks, and a sliding share is one of the tokens up to the query.
        window_kind: ``"sliding"``, or ``"block"`` as in the authors' code: the query's own block of ``window`` tokens.
        sink: first tokens, which stay exact.
        stages: where it works: prefill (calls with several queries), decoding (one query), or both. Runs mode packs
            the cache only where it decodes.
        chunk: runs mode: runs end at its multiples.
        run_key: runs mode: a run's key is its first one, which bounds the error of each key, or their mean, which is
            nearer on average (*ours*).
        min_tokens: runs mode: the first so many tokens stay dense, as does a cache that holds no more. None: 4096.
    """

    mode: Literal["runs", "elements"] = "runs"
    theta: float | list[float] | None = None
    metric: Literal["max", "euclidean", "cosine"] = "max"
    window: Tokens | Share = 0.05
    window_kind: Literal["sliding", "block"] = "sliding"
    sink: Tokens = 4
    stages: Literal["both", "prefill", "decode"] = "both"
    chunk: Annotated[int, Field(ge=2, le=4096)] = 128
    run_key: Literal["first", "mean"] = "first"
    min_tokens: Tokens | None = None

    summary: ClassVar[str] = "neighbouring tokens whose keys are alike share one key, and the cache shrinks"
    paper: ClassVar[str] = (
        "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference "
        "(arXiv 2507.19608)"
    )
    effect: ClassVar[Literal["replaces", "adjusts"]] = "replaces"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    families: ClassVar[tuple[str, ...]] = ("transformers",)
    models: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3", "bitnet", "gemma3", "gpt2", "llava")

    # --- options ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Thresholds in the range of their measure; no option of the other mode."""
        where = f"recipe {self.name!r}, option "
        thetas = self.theta if isinstance(self.theta, list) else [self.theta] if self.theta is not None else []
        low, high = (-1.0, 1.0) if self.metric == "cosine" else (0.0, float("inf"))
        for theta in thetas:
            if not low <= theta <= high:
                raise InvalidOption(
                    f"{theta} is no threshold for {self.metric!r}", f"{where}'theta'", f"use {low:g} to {high:g}"
                )
        if isinstance(self.theta, list) and not self.theta:
            raise InvalidOption("the list of thresholds is empty", f"{where}'theta'", "give one a layer")
        if self.mode == "elements":
            idle = {"metric": "max", "chunk": 128, "run_key": "first", "min_tokens": None}
            for name, default in idle.items():
                if getattr(self, name) != default:
                    raise InvalidOption("elements mode has no such option", f"{where}{name!r}", "leave it out")

    def accepts(self, site: Site) -> str | None:
        """Causal self-attention with plain softmax; in runs mode over all earlier tokens."""
        module: Any = site.module
        if not getattr(module, "is_causal", True):
            return "attention that is not causal"
        if getattr(module, "layer_idx", None) is None:
            return "an attention module without a layer number"
        if getattr(module, "attn_logit_softcapping", None) is not None:
            return "capped logits"
        if getattr(module, "sinks", None) is not None:
            return "learned sinks"
        holder = module if hasattr(module, "sliding_window") else module.config
        window = getattr(holder, "sliding_window", None)
        if self.mode == "runs" and window is not None:
            return f"a sliding window of {window} tokens of its own, which bounds its cache already"
        return None

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """A list of thresholds must have one for each layer."""
        layers = max((site.layers for site in sites), default=0)
        if isinstance(self.theta, list) and len(self.theta) != layers:
            raise InvalidOption(
                f"{len(self.theta)} thresholds for {layers} layers",
                f"recipe {self.name!r}, option 'theta'",
                "give one number for all layers or one a layer; calibrate() makes such a list",
            )

    @property
    def dense_tokens(self) -> int:
        """``min_tokens`` or its default."""
        return WORTH_IT if self.min_tokens is None else self.min_tokens

    def threshold(self, site: Site) -> float:
        """``theta`` at a site."""
        if self.theta is None:
            return 0.83 if self.metric == "cosine" else THETA
        return self.theta[site.layer] if isinstance(self.theta, list) else self.theta

    def rule(self, site: Site) -> runs.Rule:
        """What becomes a run at a site."""
        border = Border(Window(self.window, self.window_kind), self.chunk, self.dense_tokens)
        return runs.Rule(self.threshold(site), self.metric, self.sink, self.run_key == "mean", border)

    # --- the model's forward: whose cache packs ------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        """Lead the layers of the cache, which is made here if nobody has, to the ops that will read them."""
        if self.stages == "prefill":
            return next(call)
        from patchkit.recipes.deltallm import cache as caching

        call, cache = caching.cache_of(call)
        layers = caching.layers_of(cache, call.sites, self._layer)
        call.shared["layers"] = layers
        try:
            for layer in layers.values():
                layer.live = True
            return next(call)
        finally:
            for layer in layers.values():
                layer.live = False
            call.shared.pop("layers", None)

    def _layer(self, site: Site, old: Any) -> Any:
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        from patchkit.recipes.deltallm.cache import RunLayer
        from patchkit.recipes.deltallm.filtered import FilteredLayer, FilteredSlidingLayer

        if self.mode == "runs":
            rule = self.rule(site)
            if isinstance(old, RunLayer) and (old.rule, old.min_tokens) == (rule, self.dense_tokens):
                return old
            takes = type(old) in (DynamicLayer, RunLayer, FilteredLayer)
            return RunLayer(old, rule, self.dense_tokens) if takes else None
        if isinstance(old, FilteredLayer | FilteredSlidingLayer):
            return old
        if type(old) in (DynamicLayer, RunLayer):
            return FilteredLayer(old)
        return FilteredSlidingLayer(old) if type(old) is DynamicSlidingWindowLayer else None

    # --- one attention op -------------------------------------------------------------------------------------

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """Approximate, or dense with a reason."""
        layer = call.shared.get("layers", {}).get(call.site.name)
        if self.mode == "elements":
            return self._elements(call, next, layer)
        if layer is not None and layer.fresh is not None:
            return self._cached(call, next, layer)
        reason = self._why_dense(call)
        if layer is not None:
            reason = reason or f"no more than {self.dense_tokens} tokens (min_tokens)"
        elif reason is None and call.q.shape[2] == 1:
            reason = "decoding without a cache that can be packed"
        elif reason is None and call.k.shape[2] <= self.dense_tokens:
            reason = f"no more than {self.dense_tokens} tokens (min_tokens)"
        if reason is not None:
            return _dense(call, next, reason)
        starts = starts_of(call, call.k.shape[2])
        if isinstance(starts, str) or max(starts) >= call.k.shape[2]:
            return _dense(call, next, starts if isinstance(starts, str) else "a sample of padding alone")
        with call.ledger.time("runs", call.q.device):
            out, pasts = batch.attend_at_once(call.q, call.k, call.v, starts, self.rule(call.site), call.scale)
        call.ledger.count("two-phase prefill")
        _note(call, pasts)
        return out

    def _elements(self, call: AttentionCall, next: Next, layer: Any) -> Tensor:
        reason = self._why_dense(call)
        if reason is None and layer is None and call.q.shape[2] == 1 < call.k.shape[2]:
            reason = "decoding without a cache that can hold filtered keys"
        if reason is None and call.mask is None and not call.causal and call.q.shape[2] > 1:
            reason = "attention that is not causal"
        if reason is not None:
            return _dense(call, next, reason)
        window = Window(self.window, self.window_kind)
        call.ledger.count("simulated")
        with call.ledger.time("simulation", call.q.device):
            return elements.compute(call, layer, self.threshold(call.site), window, self.sink)

    def _cached(self, call: AttentionCall, next: Next, layer: Any) -> Tensor:
        """New tokens on a packed cache, or on one that is to be packed now."""
        columns = layer.get_seq_length() + call.k.shape[2]
        starts = starts_of(call, columns)
        reason = self._why_dense(call, stage=False)
        if isinstance(starts, str):
            reason, starts = reason or starts, []
        elif reason is None and max(starts) >= columns:
            reason = "a sample of padding alone"
        if layer.pasts is not None and reason is None and starts != layer.starts():
            reason = "a mask that leaves out other tokens than before"
        if layer.pasts is not None and reason is not None:
            raise PatchkitError(
                f"a packed cache cannot go on with {reason}",
                f"{call.site.full_name}, recipe {self.name!r}",
                "begin with a new cache, or set min_tokens above its length",
            )
        if reason is None and layer.pasts is None and call.q.shape[2] > 1 and self.stages == "decode":
            k, v = layer.whole()
            out = _dense(call.replace(k=k, v=v), next, "prefill (stages='decode')")
            layer.start(starts, k, v)
            layer.pack()
        elif reason is not None:
            k, v = layer.whole()
            return _dense(call.replace(k=k, v=v), next, reason)
        else:
            with call.ledger.time("runs", call.q.device):
                out = layer.attend(call.q, starts, call.scale)
            call.ledger.count("packed decoding" if call.q.shape[2] == 1 else "two-phase prefill")
        _note(call, layer.pasts)
        return out

    def _why_dense(self, call: AttentionCall, stage: bool = True) -> str | None:
        """What stands in the way of any approximation of this call."""
        if stage and self.stages == "prefill" and call.q.shape[2] == 1:
            return "decoding (stages='prefill')"
        if stage and self.stages == "decode" and call.q.shape[2] > 1:
            return "prefill (stages='decode')"
        if call.extra.get("dropout"):
            return "dropout"
        if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
            return "recorded gradients"
        if call.extra.get("softcap") or dict(call.extra.get("kwargs", ())).get("softcap"):
            return "capped logits"
        return None


def _dense(call: AttentionCall, next: Next, reason: str) -> Tensor:
    """The rest of the chain, with the reason written down."""
    call.ledger.ran_dense(reason)
    with call.ledger.time("dense", call.q.device):
        return next(call)


def _note(call: AttentionCall, pasts: list[runs.Past]) -> None:
    """How many rows packing removed; noted anew only when the border has moved."""
    border = max(past.border for past in pasts)
    if call.ledger.values.get("packed_tokens") == border:
        return
    shares = [share for past in pasts if (share := past.removed()) is not None]
    call.ledger.note(packed_tokens=border, exact_tokens=max(past.tokens - past.border for past in pasts))
    if not shares:
        return
    call.ledger.note(removed=[float(share.mean()) for share in shares])
    little = max(float(share.max()) for share in shares) < NEXT_TO_NOTHING
    why = "hardly two neighbouring keys are within theta: patchkit calibrate deltallm finds a better one"
    call.ledger.caution("next to nothing removed", why if little else "")
