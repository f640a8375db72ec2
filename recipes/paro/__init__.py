"""PAROAttention: each head reads the tokens in the order in which its attention is local, and skips what it can."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, InstanceOf, WithJsonSchema
from torch import Tensor

from patchkit import kernels
from patchkit.adapters.base import unwrap
from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption
from patchkit.kernels.reorder import NAMES
from patchkit.recipe_base import Recipe
from patchkit.recipes.paro import runtime
from patchkit.recipes.paro.buckets import bucket_of
from patchkit.recipes.paro.calibration import calibrate
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.official import import_plan
from patchkit.recipes.paro.plan import Facts, PermutePlan, PlanError
from patchkit.registry import recipe
from patchkit.selection import Indices, StepWindow
from patchkit.sites import Site

__all__ = ["Facts", "Paro", "PermutePlan", "PlanError", "calibrate", "import_plan"]

Next = Callable[[AttentionCall], Tensor]
MOST = 4  # layouts of a module at a time: branches can have text of two lengths, each with its padding
Object = Annotated[InstanceOf[PermutePlan], WithJsonSchema({"type": "string"})]


@recipe("paro")
@dataclass(frozen=True, kw_only=True)
class Paro(Recipe):
    """Block-sparse attention with masks made beforehand, every head in its own order of tokens, in 16, 8 or 4 bits.

    The heads of a visual transformer look along different axes of the latent grid. A plan, made once for a model,
    size and number of steps, gives each head the order of axes in which its attention is local, and the blocks of the
    reordered map that it computes in each part of the run. Text, and the ragged end of the sequence, are always
    computed. Make a plan with :func:`calibrate` or ``patchkit calibrate paro FILE``.

    Paper: PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation
    Models, arXiv 2506.16054. The calibration was never published; what the paper leaves open is marked *ours* there.

    Args:
        plan: a plan, or the file of one.
        qk: numbers of the product of queries and keys: ``"none"`` (as the model has them), ``"int8"``, ``"int4"``
            (rounded as INT4, multiplied as INT8). Rounding is simulated where there are no Triton kernels.
        pv: the same for probabilities and values, or ``"fp8"``.
        warmup_steps: dense steps at the start, as a share of the run (float) or their number (int); 0 as in the paper.
        dense_below: heads that keep less than this share of their mass run dense (*ours*; 0.9 is a careful choice).
        skip_text_quant: what touches text is not rounded, as in the authors' simulation: image queries attend to text
            and image apart, and the two are joined. Text is here every block that holds some.
        skip_empty: heads whose image tokens hardly attend to image tokens compute text only; needs text.
    """

    plan: Object | str | None = None
    qk: Literal["none", "int8", "int4"] = "none"
    pv: Literal["none", "int8", "int4", "fp8"] = "none"
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = 0
    dense_below: Annotated[float, Field(ge=0, le=1)] = 0.0
    skip_text_quant: bool = False
    skip_empty: bool = False

    summary: ClassVar[str] = "reorders the tokens of each head and skips blocks by a plan made once; 16, 8 or 4 bits"
    paper: ClassVar[str] = "Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention (arXiv 2506.16054)"
    effect: ClassVar[Literal["replaces", "adjusts"]] = "replaces"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    families: ClassVar[tuple[str, ...]] = ("diffusers",)
    models: ClassVar[tuple[str, ...]] = ("hunyuanvideo", "cogvideox", "wan", "mochi", "ltx", "flux", "sd3")
    uses_heads: ClassVar[bool] = True

    def validate(self) -> None:
        """Nothing is spared where nothing is rounded."""
        if self.skip_text_quant and not self._rounds:
            raise InvalidOption(
                "nothing is rounded, so text cannot be spared",
                f"recipe {self.name!r}, option 'skip_text_quant'",
                "give qk or pv, or leave it off",
            )

    @property
    def _rounds(self) -> bool:
        return self.qk != "none" or self.pv != "none"

    # --- options ----------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> PermutePlan:
        """The plan, read from its file where a file was given."""
        if self.plan is None:
            raise InvalidOption(
                "a plan is missing",
                f"recipe {self.name!r}, option 'plan'",
                "give plan=FILE; make one with `patchkit calibrate paro FILE` or patchkit.recipes.paro.calibrate",
            )
        return PermutePlan.load(self.plan) if isinstance(self.plan, str) else self.plan

    def options(self, *, defaults: bool = False) -> dict[str, Any]:
        """The options by name; a plan is named by its file."""
        found = super().options(defaults=defaults)
        if isinstance(self.plan, PermutePlan):
            found["plan"] = self.plan.path or "a plan without a file: call plan.save(path)"
        return found

    def accepts(self, site: Site) -> str | None:
        """Every self- and joint attention that has a row in the plan."""
        plan = self.table
        if plan.row_of(site.full_name, site.layer) is None:
            made = ", ".join(sorted(set(plan.facts.models.values())))
            return f"the plan (for {plan.order.shape[0]} sites of {made}) has no row for it"
        if plan.order.shape[1] != site.heads:
            return f"the plan has {plan.order.shape[1]} heads, not {site.heads}"
        if not Indices.parse(self.heads, "heads").resolve(site.heads):
            return f"none of the heads {self.heads} among its {site.heads}"
        return None

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """Refuse a plan that was made for another model or scheduler."""
        scheduler = getattr(target, "scheduler", None)
        blocks = {site.component: site.layers for site in sites}
        models = {name: (type(unwrap(getattr(target, name, target))).__name__, n) for name, n in blocks.items()}
        self.table.check_target(models, None if scheduler is None else type(scheduler).__name__)
        if self.skip_empty and not all(self.table.facts.text):
            raise InvalidOption(
                "without text, a head without image keys has nothing to attend to",
                f"recipe {self.name!r}, option 'skip_empty'",
                "leave it off for this model",
            )
        if self.skip_text_quant and not any(n is None or n for n in self.table.facts.text):
            raise InvalidOption(
                "there is no text among the tokens of these attentions",
                f"recipe {self.name!r}, option 'skip_text_quant'",
                "leave it off for this model",
            )

    def attention_cost(self, tokens: int, total: int) -> float:
        """Dense warm-up, then the plan's mean density over image blocks; text is ignored."""
        if self.plan is None or total < 1:
            return 1.0
        window, plan = StepWindow.parse(self.steps, "steps"), self.table
        warm, each = self._warm_up(total), plan.density.mean((-1, -2))
        cost = 0.0
        for step in range(total):
            sparse = step >= warm and window.contains(step, total)
            cost += float(each[plan.facts.masks[bucket_of(step, total, plan.buckets)]]) if sparse else 1.0
        return cost / total

    def _warm_up(self, total: int) -> int:
        """Dense steps of a run of ``total``."""
        if isinstance(self.warmup_steps, float):
            return math.floor(round(self.warmup_steps * total, 6) + 0.5)
        return self.warmup_steps

    # --- one attention op -------------------------------------------------------------------------------------

    def attend(self, call: AttentionCall, next: Next) -> Tensor:
        """Dense in the warm-up and where the op is not the plan's; else the kept blocks in each head's order."""
        plan, site = self.table, call.site
        row = plan.row_of(site.full_name, site.layer)
        assert row is not None
        reason = runtime.obstacle(call)
        if reason is not None:
            return _dense(call, next, reason)
        assert call.step is not None
        geometry = Geometry.of(call, plan.facts.block)
        if isinstance(geometry, str):
            return _dense(call, next, geometry)
        plan.check_call(geometry, row, call.total, site.full_name)
        total = call.total or plan.facts.steps
        if total is None:
            return _dense(call, next, "length of the run unknown, and the plan does not say it")
        if call.step < self._warm_up(total):
            return _dense(call, next, "warm-up")
        valid = runtime.lengths(call)
        if isinstance(valid, str):
            return _dense(call, next, valid)
        codes, layouts = self._layout(call, plan, row, bucket_of(call.step, total, plan.buckets), geometry, valid)
        call.ledger.count("sparse")
        with call.ledger.time("sparse", call.q.device):
            return runtime.attend(call, codes, geometry, layouts, self.qk, self.pv)

    def _layout(
        self,
        call: AttentionCall,
        plan: PermutePlan,
        row: int,
        bucket: int,
        geometry: Geometry,
        valid: tuple[int, ...] | None,
    ) -> tuple[tuple[int, ...], runtime.Layouts]:
        """Orders and layouts of this call; both guidance branches share them until the bucket's mask changes."""
        number = plan.facts.masks[bucket]
        key = (number, geometry, valid, call.q.device)
        known = call.shared.setdefault((call.site.component, call.site.name), {})
        if key not in known:
            for old in [k for k in known if k[0] != number or len(known) >= MOST]:
                del known[old]
            heads = self.head_numbers().resolve(call.q.shape[1])
            choice = runtime.choice_of(plan, row, bucket, heads, self.dense_below, self.skip_empty)
            layouts = runtime.make_layouts(choice, geometry, valid, call.q.device, self.skip_text_quant)
            known[key] = choice, layouts, int(choice.keep.flatten(1).all(-1).sum())
        choice, layouts, dense = known[key]
        layout = layouts.whole
        if call.state.get("key") != key:
            call.state["key"] = key
            call.ledger.note(
                density=choice.keep.float().mean((-1, -2)),
                actual_density=layout.listed.sum(-1) / (layout.n_q * layout.n_k),
                kept_mass=plan.kept_mass[number, row].masked_fill(choice.keep.flatten(1).all(-1), 1.0),
                orders=orders_text(choice.codes),
                dense_heads=dense,
            )
            self._say_path(call, layout)
        return choice.codes, layouts

    def _say_path(self, call: AttentionCall, layout: kernels.BlockLayout) -> None:
        """Note which kernels are used, and warn where they are not expected to pay."""
        if self._rounds:
            form = kernels.Format(self.qk, self.pv)
            name, reason = kernels.quantised.quantised_path(call.q, layout, form)
            call.ledger.note(path=f"{name}: {reason}")
            call.ledger.caution("slower than dense expected", reason if name == "blocked" else "")
            return
        path = kernels.choose_path(layout, call.q.shape[-1], call.q.dtype, call.q.device)
        call.ledger.note(path=f"{path.name}: {path.reason}")
        loses = path.name != "dense" and not path.pays
        call.ledger.caution("slower than dense expected", path.reason if loses else "")


def orders_text(codes: tuple[int, ...]) -> str:
    """How many heads have which order: ``"FHW 3, HWF 1"``."""
    return ", ".join(f"{NAMES[code]} {codes.count(code)}" for code in sorted(set(codes)))


def _dense(call: AttentionCall, next: Next, reason: str) -> Tensor:
    """The rest of the chain, with the reason written down."""
    call.ledger.ran_dense(reason)
    with call.ledger.time("dense", call.q.device):
        return next(call)
