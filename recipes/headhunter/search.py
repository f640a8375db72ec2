"""HeadHunter: which heads to perturb for an objective, found greedily (arXiv 2506.10978, algorithm 1)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchkit import api
from patchkit.context import AttentionCall
from patchkit.errors import InvalidOption, PatchkitError
from patchkit.recipes.headhunter import presets
from patchkit.recipes.headhunter.objectives import LEAST, Objective, rank
from patchkit.recipes.headhunter.presets import Preset
from patchkit.recipes.headhunter.softpag import SoftPAG
from patchkit.recipes.headhunter.store import Head, Store, text_of
from patchkit.selection import Indices

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a hunt is; ``left`` is in seconds, None before anything was measured."""

    round: int
    rounds: int
    done: int
    total: int
    left: float | None


@dataclass(frozen=True)
class Hunt:
    """What a hunt found.

    Attributes:
        heads: (layer, head) in order of selection; a beginning of it is a weaker preset.
        scores: for each round the mean score of every head that was tried, with the heads of earlier rounds.
        terms: everything that the scores depend on.
    """

    heads: list[Head]
    scores: list[dict[Head, float]]
    terms: dict[str, Any] = field(repr=False)

    def save_preset(self, name_or_path: str | Path, about: str = "", first: int | None = None) -> Path:
        """Write the heads as a preset that ``SoftPAG(heads=...)`` takes by this name or path.

        Args:
            name_or_path: a path ends in ``.json``; a name is kept among the user's presets.
            about: what the heads are good for, in words; by default the objective's name.
            first: only so many heads, in order of selection.
        """
        heads = self.heads[:first]
        best = {text_of(head): scores[head] for head, scores in zip(heads, self._rounds_of(heads), strict=True)}
        found = {name: self.terms[name] for name in ("prompts", "seeds", "top_k", "call", "objective")}
        recipe = self.terms["recipe"]
        found |= {"scale": recipe["scale"], "strength": recipe["strength"], "scores": best}
        about = about or str(self.terms["objective"])
        preset = Preset(heads, self.terms["model"], recipe["scope"], recipe["target"], about, found)
        return preset.save(presets.place(str(name_or_path)))

    def _rounds_of(self, heads: list[Head]) -> list[dict[Head, float]]:
        """The scores of the round in which each head was chosen: the last in which it was tried."""
        return [next(scores for scores in reversed(self.scores) if head in scores) for head in heads]


@dataclass(frozen=True)
class Question:
    """What is asked: everything but the model and the objective's code."""

    prompts: list[str]
    seeds: list[int]
    top_k: int
    rounds: int
    batch: int
    recipe: SoftPAG
    call: dict[str, Any]


def candidates(pipe: Any, recipe: SoftPAG, layers: Any) -> list[Head]:
    """All heads that can be perturbed, by (layer, head)."""
    sites = api.plan(pipe, recipe).selections[0].matched
    wanted = Indices.parse(layers, "option 'layers'").resolve(max(site.layers for site in sites))
    found = {(site.layer, head) for site in sites if site.layer in wanted for head in range(site.heads)}
    if not found:
        raise InvalidOption(f"the layers {layers!r} have no attention that can be perturbed", "hunt", "widen layers")
    return sorted(found)


def search(
    pipe: Any,
    objective: Objective,
    question: Question,
    pool: list[Head],
    store: Store,
    progress: Callable[[Progress], None],
) -> Hunt:
    """Round by round: the heads whose images score best, each together with the heads chosen before, join these.

    Images are scored in groups of heads whose composition depends on the round alone, so that a hunt that was stopped
    ends with the same result.
    """
    chosen: list[Head] = []
    scores: list[dict[Head, float]] = []
    clock = _Clock(question, len(pool))
    for number in range(question.rounds):
        rest = [head for head in pool if head not in chosen]
        if not rest:
            break
        for start in range(0, len(rest), question.batch):
            group = rest[start : start + question.batch]
            known = store.scores(number)
            if all(len(known.get(text_of(head), ())) == len(question.prompts) for head in group):
                clock.skip(len(group))
                continue
            progress(clock.progress(number))
            store.add(number, _measure(pipe, objective, question, chosen, group))
            clock.done(len(group))
        means = {head: rank(objective, store.scores(number)[text_of(head)]) for head in rest}
        scores.append(means)
        # ties go to the lower (layer, head): sorted is stable and the pool is in that order
        best = [head for head in sorted(rest, key=lambda head: -means[head]) if means[head] > LEAST][: question.top_k]
        if not best:
            raise PatchkitError(
                f"no head of round {number + 1} may be taken",
                f"objective {store.terms['objective']!r}",
                "lower its floors, or hunt with fewer rounds",
            )
        if number >= len(store.selected):
            store.finish(best)
        chosen += best
        logger.info("round %d: %s", number + 1, ", ".join(f"{text_of(h)} {means[h]:.4f}" for h in best))
    return Hunt(chosen, scores, store.terms)


def _measure(
    pipe: Any, objective: Objective, question: Question, chosen: Sequence[Head], group: Sequence[Head]
) -> dict[Head, list[Any]]:
    """Scores of each head of a group, with those chosen before: one image a head, pair by pair, in one batch."""
    rows = [[*chosen, head] for head in group]
    options = question.recipe.options(defaults=True) | {"heads": sorted({h for row in rows for h in row})}
    recipe = Candidates(**options, rows=rows)
    found: dict[Head, list[Any]] = {head: [] for head in group}
    with api.apply(pipe, recipe):
        for prompt, seed in zip(question.prompts, question.seeds, strict=True):
            generators = [torch.Generator().manual_seed(seed) for _ in group]
            out = pipe(prompt=[prompt] * len(group), generator=generators, **question.call)
            results = out.images if hasattr(out, "images") else out.frames
            for head, result in zip(group, results, strict=True):
                score = objective(result, prompt)
                several = isinstance(score, Mapping)
                found[head].append({n: _number(s, head) for n, s in score.items()} if several else _number(score, head))
    return found


def _number(score: Any, head: Head) -> float:
    value = float(score)
    if value != value:  # NaN would sort anywhere
        raise InvalidOption(f"the objective gave NaN for {text_of(head)}", "hunt", "return a number")
    return value


@dataclass(frozen=True, kw_only=True)
class Candidates(SoftPAG):
    """SoftPAG with heads of its own for every sample of a batch: several candidates share a forward.

    Args:
        rows: the heads of each sample; ``heads`` has all of them.
    """

    rows: list[list[Head]] = field(default_factory=list)

    def gate(self, call: AttentionCall) -> Tensor:
        """(B, H) strengths, a row a sample."""
        gate = torch.zeros(len(self.rows), call.q.shape[1])
        for row, heads in zip(gate, self.rows, strict=True):
            row[sorted({head for layer, head in heads if layer == call.site.layer})] = self.strength
        if call.q.shape[0] == len(self.rows):
            return gate
        if call.q.shape[0] == 1:  # the model calls the op sample by sample
            return gate[call.index : call.index + 1]
        raise PatchkitError(
            f"{call.q.shape[0]} samples in the weak pass, {len(self.rows)} candidates",
            call.site.full_name,
            "hunt with one image a prompt",
        )


class _Clock:
    """How much is left, by the time that the last measurements took."""

    def __init__(self, question: Question, pool: int) -> None:
        self.rounds = question.rounds
        sizes = [max(0, pool - question.top_k * r) for r in range(question.rounds)]
        self.total, self.finished = sum(sizes), 0
        self._begun: float | None = None
        self._measured = 0

    def progress(self, number: int) -> Progress:
        now = time.monotonic()
        self._begun = self._begun or now
        rate = (now - self._begun) / self._measured if self._measured else None
        left = None if rate is None else rate * (self.total - self.finished)
        return Progress(number + 1, self.rounds, self.finished, self.total, left)

    def skip(self, count: int) -> None:
        self.finished += count

    def done(self, count: int) -> None:
        self.finished += count
        self._measured += count
