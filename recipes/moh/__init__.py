"""MoH: each token uses some of the attention heads, the same few for all tokens and the others by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit.adapters.base import unwrap
from patchkit.context import AttentionCall, DenoiseCall
from patchkit.errors import InvalidOption
from patchkit.listening import What
from patchkit.recipe_base import Recipe
from patchkit.recipes.moh import compute
from patchkit.recipes.moh.balance import (
    BETA,
    Collector,
    add_to,
    auxiliary_loss,
    collectors,
    imbalance,
    shifts_labels,
    warn_if_missed,
)
from patchkit.recipes.moh.gates import Gate, by_length
from patchkit.recipes.moh.options import budget_of, check_budgets, needs, note, why_not
from patchkit.registry import recipe
from patchkit.sites import Site

if TYPE_CHECKING:
    from patchkit.bound import Attachment
    from patchkit.recipes.moh.tuning import MoHConfig

__all__ = ["MoH", "MoHConfig", "auxiliary_loss"]

Next = Callable[[AttentionCall], Tensor]
Amount = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)]
GAINS = 1024  # queries from which leaving heads out gains on a CPU, for predictions
ADAPTERS_OWN = ("shared", "active", "router", "gate", "shared_per_layer", "active_per_layer")


@recipe("moh")
@dataclass(frozen=True, kw_only=True)
class MoH(Recipe):
    """Mixture-of-head attention: shared heads for every token, and for each token the routed heads that it chooses.

    Each head's output is multiplied by its gate before the output projection. Keys and values of all heads are
    computed for all tokens, so caches stay as large as they are. With few queries (decoding, short texts) nothing is
    saved.

    ``mode="preview"`` shows what an untrained model does with some of its heads off: a token chooses those whose
    queries are longest. Quality is lost (the paper's 8B model at 75 % active: MMLU about 63 of 66) until the model has
    been tuned with it, which is what :class:`MoHConfig` is for: ``peft.get_peft_model(model, MoHConfig(...))``.
    ``mode="train"`` is the same with straight-through gates and the load-balance loss, for who trains the model's own
    weights in a loop of their own.

    Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842.

    Args:
        shared: heads that are on for every token, the first ones: a share (float) or a number (int).
        active: heads that are on in all, shared ones included: a share or a number. Shares are rounded down.
        router: how a token chooses. ``"qnorm"``: by the length of its queries, no parameters. ``"linear"``: by weights
            that ``patchkit train`` and ``MoHConfig`` learn; an untrained one is refused.
        gate: ``"binary"``: heads are on or off, the default with qnorm. ``"weighted"``: chosen heads weigh their
            probability, scaled to mean 1.
        mode: ``"preview"``: run an untuned model. ``"train"``: train its own weights in a loop of your own.
        shared_per_layer: ``shared`` of every block, in place of one for all.
        active_per_layer: ``active`` of every block.
        min_tokens: queries from which on only the active heads are computed; with fewer all are, and then gated.
            None: wherever that is known to be faster (*ours*).
        adapter: folder of a trained adapter (`patchkit train` writes one), which is put on the model for as long as the
            patch is on. It brings shared, active, router, gate and min_tokens with it.
    """

    shared: Amount = 0.5
    active: Amount = 0.75
    router: Literal["qnorm", "linear"] = "qnorm"
    gate: Gate | None = None
    mode: Literal["preview", "train"] = "preview"
    shared_per_layer: list[Amount] | None = None
    active_per_layer: list[Amount] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    adapter: str | None = None

    summary: ClassVar[str] = (
        "each token uses the attention heads that it chooses; a preview, and the way to tune for it"
    )
    paper: ClassVar[str] = "MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv 2410.11842)"
    effect: ClassVar[Literal["replaces", "adjusts"]] = "replaces"
    kinds: ClassVar[tuple[str, ...]] = ("self",)
    models: ClassVar[tuple[str, ...]] = ("dit", "llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "bert", "vit")

    # --- options ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """A budget that any number of heads can have, and a router that can be had here."""
        where = f"recipe {self.name!r}, option "
        if self.adapter is not None:
            for name in self.options():
                if name in (*ADAPTERS_OWN, "min_tokens", "mode", "layers", "targets", "exclude"):
                    raise InvalidOption(
                        f"{name} beside an adapter, which has its own", f"{where}{name!r}", "leave it out"
                    )
            return
        if self.gate is None:
            object.__setattr__(self, "gate", "binary" if self.router == "qnorm" else "weighted")
        check_budgets(self, where)

    def accepts(self, site: Site) -> str | None:
        """Self-attention of several heads, whose queries can be seen as they were projected."""
        return why_not(site, self.router)

    def prepare(self, target: Any, sites: list[Site]) -> Collector:
        """Budgets of all layers; where the layers' imbalances are gathered."""
        if self.adapter is not None:
            from patchkit.recipes.moh import attaching

            attaching.check(self.adapter, target)
            return Collector()
        if self.router == "linear":
            raise InvalidOption(
                "an untrained linear router chooses by chance",
                f"recipe {self.name!r}, option 'router'",
                "train one (peft.get_peft_model(model, MoHConfig(router='linear')), or `patchkit train`), and give its "
                "folder as `adapter`",
            )
        for site in sites:
            budget_of(self, site)
        # a model has one for all patches: a plan, or a patch that is refused, must not cut off the one that is on
        return collectors.setdefault(unwrap(target), Collector()) if self.mode == "train" else Collector()

    def attach(self, target: Any, sites: list[Site]) -> Attachment | None:
        """The trained adapter, if one is asked for; in training, what forgets the loss with the patch."""
        if self.adapter is None:
            return collectors[unwrap(target)] if self.mode == "train" else None
        from patchkit.recipes.moh import attaching

        return attaching.attach(target, self.adapter)

    def tuning(self, lora: dict[str, Any] | None) -> Any:
        """The adapter with this recipe's options."""
        from patchkit.finetune import require

        require()
        from patchkit.recipes.moh.tuning import MoHConfig

        own = {name: getattr(self, name) for name in (*ADAPTERS_OWN, "min_tokens")}
        return MoHConfig(**own, lora=lora)

    def listens(self, site: Site) -> frozenset[What]:
        return frozenset() if self.adapter is not None else needs(site, self.router)

    def attention_cost(self, tokens: int, total: int) -> float:
        """The share of heads that is on, where only those are computed."""
        least = GAINS if self.min_tokens is None else self.min_tokens
        if self.adapter is not None or self.mode == "train" or tokens < least:
            return 1.0
        return self.active if isinstance(self.active, float) else 1.0

    def figures(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """The measured share of heads that were on, averaged over layers."""
        means = totals["means"]
        return {"share of heads active": means["active"]} if "active" in means else {}

    # --- a forward --------------------------------------------------------------------------------------------

    def wraps(self, level: str) -> bool:
        return super().wraps(level) and (level != "denoise" or self.mode == "train")

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        """In training, gather the layers' imbalances and add them to the model's loss."""
        collector = collectors.get(call.module) if self.mode == "train" else None
        if collector is None or collector.gathers:  # another patch with other layers gathers for both
            return next(call)
        if not torch.is_grad_enabled():
            collector.remove()
            return next(call)
        collector.begin(call.kwargs)
        try:
            output = next(call)
        finally:
            loss = collector.end()
        if call.module.training:
            warn_if_missed(collector)
        weight = BETA if call.module.training else 0.0
        return add_to(output, loss, weight, call.kwargs, shifts_labels(call.module))

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """Route, and compute."""
        if self.adapter is not None:
            from patchkit.recipes.moh import attaching

            return attaching.attend(call, next)
        queries = call.queries if call.queries is not None else call.q
        if call.queries is None and "queries" in self.listens(call.site):
            call.ledger.ran_dense("its queries could not be seen before their norm")
            return next(call)
        budget = budget_of(self, call.site)
        train = self.mode == "train" and torch.is_grad_enabled()
        gates = by_length(queries, budget, self.gate or "binary", train)
        note(call, gates)
        collector: Collector = call.prepared
        if self.mode == "train" and budget.chosen and not train:
            collector.miss()
        elif train and gates.scores is not None:
            counted = collector.tokens(call.q.shape[0], call.q.shape[2])
            collector.add(imbalance(gates.scores, gates.active[:, budget.shared :], counted), BETA)
        return compute.attend(call, next, gates, budget, self.min_tokens)


def __getattr__(name: str) -> Any:
    if name == "MoHConfig":  # peft is an extra
        from patchkit.finetune import require

        require()
        from patchkit.recipes.moh.tuning import MoHConfig

        return MoHConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
