"""SoftPAG as a guider of diffusers' modular pipelines, beside classifier-free guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from patchkit import api
from patchkit.context import DenoiseCall
from patchkit.patch import Patch
from patchkit.recipes.headhunter import weak
from patchkit.recipes.headhunter.perturb import Scope, Target
from patchkit.recipes.headhunter.softpag import Head, SoftPAG


class SoftPAGGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance (none with ``guidance_scale=1``) and SoftPAG: ``pipe.update_components(guider=...)``.

    Around each conditional pass of the loop the denoiser carries a patch that makes the weak pass, from the first
    perturbed block on; w (eps_cond - eps_weak) is added to what classifier-free guidance gives, whatever its scale.

    Paper: Where and How to Perturb, arXiv 2506.10978.

    Args:
        heads: as in :class:`SoftPAG`, and so are ``strength``, ``scale``, ``scope`` and ``target``.
        strength: u.
        scale: w.
        scope: of the perturbation.
        target: of the perturbation.
        perturbed_start: share of the steps from which on the weak pass is made.
        perturbed_stop: share of the steps at which it ends.
        guidance_scale: and all that follows: as in diffusers' ``ClassifierFreeGuidance``.

    Raises:
        InvalidOption: options that :class:`SoftPAG` does not take.
    """

    @register_to_config
    def __init__(
        self,
        heads: list[Head] | str = (),  # type: ignore[assignment]
        strength: float = 0.5,
        scale: float = 3.0,
        scope: Scope = "all",
        target: Target = "identity",
        perturbed_start: float = 0.0,
        perturbed_stop: float = 1.0,
        guidance_scale: float = 7.5,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(
            guidance_scale=guidance_scale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        given: Any = heads if isinstance(heads, str) else [tuple(head) for head in heads]
        self._recipe = _Apart(heads=given, strength=strength, scale=scale, scope=scope, target=target)
        self._window = (perturbed_start, perturbed_stop)
        self._patch: Patch | None = None

    def prepare_models(self, denoiser: Any) -> None:
        """Before each pass; the first of a step is the conditional one."""
        super().prepare_models(denoiser)
        self._recipe.found.clear()
        if self.is_conditional and self._perturbs():
            self._patch = api.apply(denoiser, self._recipe)

    def cleanup_models(self, denoiser: Any) -> None:
        """After each pass."""
        super().cleanup_models(denoiser)
        if self._patch is not None:
            self._patch.remove()
            self._patch = None
            self._delta = self._recipe.found.pop()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        """The guided prediction of a step."""
        found = super().forward(pred_cond, pred_uncond)
        delta, self._delta = self._delta, None
        if delta is not None:
            found.pred = found.pred + delta
        return found

    _delta: Tensor | None = None

    def _perturbs(self) -> bool:
        if not self._enabled or self._recipe.idle:
            return False
        if not self._num_inference_steps:
            return True
        start, stop = (int(share * self._num_inference_steps) for share in self._window)
        return start <= int(self._step or 0) < stop


@dataclass(frozen=True, kw_only=True)
class _Apart(SoftPAG):
    """SoftPAG that leaves the prediction as it is and hands out what it would add."""

    found: list[Any] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        weak.check(self, call)
        out, delta = weak.both(self, call, next)
        self.found.append(delta)
        return out
