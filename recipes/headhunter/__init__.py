"""HeadHunter and SoftPAG: guidance away from perturbed attention heads, and the search for good ones.

"Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models", arXiv 2506.10978.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchkit import api
from patchkit.errors import InvalidOption
from patchkit.recipes.headhunter import search
from patchkit.recipes.headhunter.objectives import Objective, name_of
from patchkit.recipes.headhunter.perturb import Scope, Target
from patchkit.recipes.headhunter.presets import model_of
from patchkit.recipes.headhunter.search import Hunt, Progress, Question
from patchkit.recipes.headhunter.softpag import SoftPAG
from patchkit.recipes.headhunter.store import Store

__all__ = ["Hunt", "Objective", "Progress", "SoftPAG", "hunt"]


def hunt(
    pipe: Any,
    objective: Objective,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | None = None,
    top_k: int = 3,
    rounds: int = 5,
    scale: float = 3.0,
    strength: float = 1.0,
    layers: str | int | list[int] | None = None,
    store: str | Path | None = None,
    *,
    scope: Scope = "all",
    target: Target = "identity",
    batch: int = 4,
    progress: Callable[[Progress], None] = lambda progress: None,
    **call_kwargs: Any,
) -> Hunt:
    """Find the heads whose perturbation guides best toward an objective (greedy, round by round).

    In each round every head that is left is tried together with the heads chosen so far: one image for each pair of
    prompt and seed, scored by ``objective``. The ``top_k`` best join the chosen ones.

    Args:
        pipe: a loaded pipeline. It is left as it was.
        objective: ``objective(image, prompt) -> float``, more is better. Images are what the pipeline returns. Shipped
            ones are in :mod:`patchkit.recipes.headhunter.objectives` and ``scorers``.
        prompts: one or several.
        seeds: one for each prompt; by default 0, 1, 2 ... A single prompt is combined with every seed.
        top_k: heads that a round adds.
        rounds: how often.
        scale: see :class:`SoftPAG`.
        strength: see :class:`SoftPAG`. The paper searches with 1 for styles and 0.25 for quality; lowering it
            afterwards is cheaper than a new search.
        layers: which layers the heads come from; late ones make the weak pass cheap. None = all.
        store: a JSON file to which everything is written as soon as it is known. The same call goes on from it.
        scope: see :class:`SoftPAG`.
        target: see :class:`SoftPAG`.
        batch: candidates that share a forward.
        progress: is told before each group how far the hunt is.
        **call_kwargs: for the pipeline, such as ``num_inference_steps`` and ``guidance_scale``.

    Returns:
        The heads in order of selection, and all scores.

    Raises:
        InvalidOption: arguments that do not fit together, or a store of another hunt.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if seeds is None:
        seeds = list(range(len(prompts)))
    seeds = list(seeds)
    if len(prompts) == 1:
        prompts = prompts * len(seeds)
    if not prompts or len(prompts) != len(seeds):
        raise InvalidOption(
            f"{len(prompts)} prompts and {len(seeds)} seeds", "hunt", "give a seed for each prompt, or one prompt"
        )
    for name, value in (("top_k", top_k), ("rounds", rounds), ("batch", batch)):
        if value < 1:
            raise InvalidOption(f"{name} is {value}", "hunt", "give at least 1")
    recipe = SoftPAG(scale=scale, strength=strength, scope=scope, target=target)
    if scale == 0 or strength == 0:
        raise InvalidOption("a scale or strength of 0 guides nothing", "hunt", "give numbers above 0")
    question = Question(prompts, seeds, top_k, rounds, batch, recipe, call_kwargs)
    pool = search.candidates(pipe, recipe, layers)
    terms = {
        "model": model_of(pipe, api.plan(pipe, recipe).selections[0].matched),
        "objective": name_of(objective),
        **{n: getattr(question, n) for n in ("prompts", "seeds", "top_k", "batch")},
        "recipe": recipe.options(defaults=True),
        "pool": [list(head) for head in pool],
        "call": {name: repr(value) for name, value in sorted(call_kwargs.items())},
    }
    kept = Store(None if store is None else Path(store), terms)
    return search.search(pipe, objective, question, pool, kept, progress)
