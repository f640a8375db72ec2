"""SoftPAG: guidance away from a pass in which the attention of a few heads is perturbed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from patchkit import guidance
from patchkit.context import AttentionCall, BlockCall, DenoiseCall, RunCall
from patchkit.errors import InvalidOption
from patchkit.recipe_base import Recipe
from patchkit.recipes.headhunter import presets, weak
from patchkit.recipes.headhunter.perturb import Form, Scope, Target
from patchkit.registry import recipe
from patchkit.selection import Indices
from patchkit.sites import Site

Head = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


@recipe("softpag")
@dataclass(frozen=True, kw_only=True)
class SoftPAG(Recipe):
    """Guidance by heads: steers away from a weak prediction, for which a few heads' attention was perturbed.

    Each step computes a second, weak prediction with the conditional prompt, in which the attention maps of the chosen
    heads are pushed toward another map, (1 - u) A + u I. The guided prediction is eps + w (eps_cond - eps_weak), on
    top of any classifier-free guidance and without one. Which heads are good for what is found by
    :func:`patchkit.recipes.headhunter.hunt`.

    Only closed forms are used, no N x N map. The weak pass begins at the first perturbed block: what comes before is
    the same in both passes (*ours*; bit-equal).

    Paper: Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models, arXiv
    2506.10978.

    Args:
        heads: ``[(layer, head), ...]``; layers count in the order in which blocks run (FLUX: double blocks, then single
            ones). Or a preset: its name, or the path of its file.
        strength: u, how far the maps are pushed, 0 to 1; 1 is PAG.
        scale: w, how far the result is steered away from the weak one. Independent of the guidance scale.
        scope: ``"all"``, the paper's: the map of the whole sequence, text included. ``"image"``: image queries lose the
            other image keys before the softmax (PAG in diffusers). ``"image_renorm"``: their mass moves to the own key.
            Heads that were found with one scope mean nothing in another.
        target: what the map becomes: ``"identity"``, ``"uniform"``, or that of the ``"mean_query"``; the last two with
            the scope ``"all"`` only.
    """

    heads: list[Head] | str = dataclasses.field(default_factory=list)  # type: ignore[assignment]
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: Annotated[float, Field(ge=0)] = 3.0
    scope: Scope = "all"
    target: Target = "identity"

    summary: ClassVar[str] = "guides away from a pass in which a few attention heads are perturbed"
    paper: ClassVar[str] = "Where and How to Perturb (HeadHunter and SoftPAG, arXiv 2506.10978)"
    effect: ClassVar[Literal["replaces", "adjusts"]] = "adjusts"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    families: ClassVar[tuple[str, ...]] = ("diffusers",)
    models: ClassVar[tuple[str, ...]] = (
        *("sd3", "flux", "qwenimage", "sd", "pixart"),
        *("cogvideox", "hunyuanvideo", "wan", "ltx", "mochi"),
    )
    uses_heads: ClassVar[bool] = True

    named: ClassVar[presets.Preset | None]  # the preset that `heads` names
    pairs: ClassVar[tuple[tuple[int, int], ...]]  # the heads, by (layer, head)

    # --- options ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Targets other than the identity are maps of the whole sequence."""
        if self.target != "identity" and self.scope != "all":
            raise InvalidOption(
                f"the target {self.target!r} with the scope {self.scope!r}",
                f"recipe {self.name!r}, option 'target'",
                'use scope="all", or target="identity"',
            )
        preset = presets.load(self.heads) if isinstance(self.heads, str) else None
        # beside the options, which stay as they were given
        object.__setattr__(self, "named", preset)
        object.__setattr__(self, "pairs", tuple(sorted(set(preset.heads if preset else self.heads))))
        if self.layers is not None:
            raise InvalidOption(
                "layers are part of the heads here", f"recipe {self.name!r}, option 'layers'", "leave it out"
            )

    def head_numbers(self, where: str = "heads") -> Indices:
        """Heads are named with their layer; see :attr:`gates`."""
        return Indices.parse(None, where)

    @property
    def form(self) -> Form:
        """Which map the heads are pushed to."""
        return Form(self.scope, self.target)

    @property
    def first(self) -> int | None:
        """The first perturbed layer; None without heads."""
        return self.pairs[0][0] if self.pairs else None

    @property
    def idle(self) -> bool:
        """Whether nothing is guided: no second pass is made then."""
        return not self.pairs or self.strength == 0 or self.scale == 0

    def accepts(self, site: Site) -> str | None:
        """The first attention of a block that has one of the heads; others (SD3.5's ``attn2``) if ``targets`` ask."""
        if site.order > 0 and self.targets is None:
            return "not the first attention of its block (name it in targets)"
        if self.named is None and self.pairs and all(layer != site.layer for layer, _ in self.pairs):
            return "none of the heads is in this layer"
        return None

    def prepare(self, target: Any, sites: list[Site]) -> None:
        """Every head must be there, and a preset must be of this model."""
        if self.named is not None:
            self.named.check(self.scope, self.target, presets.model_of(target, sites))
        for layer, head in self.pairs:
            found = [site for site in sites if site.layer == layer]
            if not found or any(head >= site.heads > 0 for site in found):
                there = (
                    f"{max((s.heads for s in found), default=0)} heads" if found else "no attention that it perturbs"
                )
                raise InvalidOption(
                    f"there is no head {head} in layer {layer}: it has {there}",
                    f"recipe {self.name!r}, option 'heads'",
                    f"layers 0 to {sites[0].layers - 1}; print(patchkit.plan(pipe, ...)) lists them",
                )

    def check_call(self, call: RunCall) -> None:
        """Guidance of other kinds in the same run would change what this one adds."""
        if not self.idle:
            guidance.refuse_other_guidance(call, self.name)

    def gate(self, call: AttentionCall) -> Tensor:
        """(1 or B, H) strengths of the heads of a call, 0 where a head is left alone; on the CPU, for decisions."""
        gate = torch.zeros(1, call.q.shape[1])
        gate[0, sorted({head for layer, head in self.pairs if layer == call.site.layer})] = self.strength
        return gate

    def added_forwards(self, sites: list[Site]) -> float:
        """(L - l0) / L: the weak pass begins at the first perturbed block."""
        return 0.0 if self.idle or self.first is None else 1 - self.first / sites[0].layers

    def figures(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Where the weak pass begins, and what it cost: predicted, in blocks, in time; one forward = one sample's."""
        seconds, counts, means = totals["seconds"], totals["counts"], totals["means"]
        base = seconds.get("conditional pass", 0.0) + seconds.get("batched pass", 0.0) / 2
        if self.idle or not base or "blocks" not in means:
            return {}
        # with a recipe inside that forwards tiles, a pass has more block forwards than the model has blocks
        blocks = counts.get("conditional block forwards", 0) or counts.get("weak passes", 0) * means["blocks"]
        return {
            "first perturbed block": means["first_block"],
            "extra forwards a step, predicted": 1 - means["first_block"] / means["blocks"],
            "extra forwards a step, in blocks": counts.get("weak block forwards", 0) / blocks,
            "extra forwards a step, in time": seconds.get("weak pass", 0.0) / base,
        }

    # --- the three places --------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        """The prediction, moved away from the weak one on every guidance pass."""
        return next(call) if self.idle else weak.guided(self, call, next)

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        """Remember what comes before the first perturbed block; in the weak pass give it back."""
        return next(call) if self.idle else weak.shared_prefix(self, call, next)

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        """In the weak pass, push the chosen heads."""
        return next(call) if self.idle else weak.perturbed(self, call, next)
