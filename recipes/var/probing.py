"""Find the sink channels of a model, and judge whether the method means anything there.

Sinks inherit the channels of the language model that a vision-language model is built on: the first token is nearly
always one. So its hidden state tells the channels, and images tell whether visual tokens use the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import patchkit
from patchkit.errors import InvalidOption, UnsupportedModel
from patchkit.recipes.var.channels import Identity, remember
from patchkit.recipes.var.watch import FAR_BELOW, FirstTokens, Judging, Watcher

PROMPTS = 16  # at least, half of them with images
AT_LEAST_LAYERS = 0.5  # share of layers in which a channel has to reach tau
MOST = 0.75  # of all tokens have to stay far below tau
BETWEEN = 0.05  # of all tokens may lie between far below tau and tau
SEVERAL = 3.0  # times the mean attention of visual tokens, for sinks among them


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Attributes:
        prompts: how many there were, and ``with_images`` of these.
        layers: numbers of the layers that were looked at.
        medians: channel -> median of |x| / RMS at the first token, one a layer; of the ten strongest channels.
        first_fires: share of (prompt, layer) in which the first token is a sink.
        far_below: share of tokens whose phi is below tau / 2.
        between: share of tokens whose phi lies between tau / 2 and tau.
        visual_sinks: mean number of sinks among the visual tokens of a prompt with images, a layer.
        prompts_with_visual_sinks: share of prompts with images that have one in some layer.
        attention_ratio: attention to a visual sink as a multiple of that to a visual token, mean over layers; None
            without visual sinks.
    """

    prompts: int
    with_images: int
    layers: list[int]
    medians: dict[int, list[float]]
    first_fires: float = 0.0
    far_below: float = 1.0
    between: float = 0.0
    visual_sinks: float = 0.0
    prompts_with_visual_sinks: float = 0.0
    attention_ratio: float | None = None


@dataclass(frozen=True)
class Probe:
    """The result of :func:`probe`.

    Attributes:
        sink_dims: the channels; empty if they were refused.
        candidates: the channels that were judged.
        reasons: why they were refused; empty if they are accepted.
        evidence: what was seen.
        identity: what they are filed under.
        tau: threshold that they were judged with.
    """

    sink_dims: list[int]
    candidates: list[int]
    reasons: list[str]
    evidence: Evidence
    identity: Identity
    tau: float

    @property
    def accepted(self) -> bool:
        """Whether the channels can be used."""
        return not self.reasons

    def check(self) -> Probe:
        """Raise :class:`UnsupportedModel` with the reasons if the channels were refused; return the probe itself."""
        if self.reasons:
            raise UnsupportedModel(
                f"no sink channels were found in {self.identity}: {'; '.join(self.reasons)}",
                "patchkit.recipes.var.probe",
                "VAR is not for this model, unless you know better and give sink_dims=[...]",
            )
        return self

    def save(self, path: Path | None = None) -> Path:
        """File the channels in the user's registry (:func:`patchkit.recipes.var.channels.user_file`), if accepted."""
        self.check()
        seen = self.evidence
        source = f"probed with {seen.prompts} prompts, {seen.with_images} of them with images, at tau {self.tau:g}"
        return remember(self.identity, self.sink_dims, source, path)


def probe(
    model: Any,
    inputs_list: Sequence[dict[str, Any]],
    *,
    tau: float = 20.0,
    layers: str | int | list[int] | None = "2:-1",
    least: int = PROMPTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probe:
    """Find the sink channels of a vision-language model by looking at it read prompts.

    The hidden state of the first token, in units of its RMS, is taken before each block; channels whose median over
    prompts reaches ``tau`` in half of the layers are candidates. They are accepted if the first token fires, if most
    tokens stay far below ``tau`` with few between, and if images have sinks among their tokens that draw several times
    the attention of a visual token.

    Args:
        model: the whole model; it is called twice a prompt.
        inputs_list: arguments of ``model(...)``, one prompt (or a batch of them) each; half with images.
        tau: threshold on |x| / RMS(x).
        layers: which layers are looked at.
        least: how many prompts it takes to accept.
        progress: is told how many calls are done, of how many.

    Raises:
        InvalidOption: there are no prompts.
        UnsupportedModel: a model the method is not for.
    """
    if not inputs_list:
        raise InvalidOption("there are no prompts", "patchkit.recipes.var.probe", f"give {PROMPTS}, half with images")
    first = FirstTokens(layers=layers)
    calls = 2 * len(inputs_list)
    _read(model, inputs_list, first, lambda done: progress(done, calls))
    if not first.rows:
        raise InvalidOption(
            "the prompts do not tell where the images are", "patchkit.recipes.var.probe", "give input_ids"
        )
    table = torch.stack(first.rows).median(0).values  # (layers, channels)
    strong = (table >= tau).float().mean(0) >= AT_LEAST_LAYERS
    candidates = strong.nonzero()[:, 0].tolist()
    shown = sorted({*candidates, *table.amax(0).topk(min(10, table.shape[1])).indices.tolist()})
    medians = {c: [round(v, 3) for v in table[:, c].tolist()] for c in shown}
    evidence = Evidence(len(first.rows), first.images, first.numbers, medians)
    if candidates:
        judging = Judging(layers=layers, dims=tuple(candidates), tau=tau)
        _read(model, inputs_list, judging, lambda done: progress(calls // 2 + done, calls))
        evidence = _weighed(evidence, judging)
    reasons = _reasons(evidence, candidates, tau, least)
    return Probe([] if reasons else candidates, candidates, reasons, evidence, first.identity, tau)


def _reasons(seen: Evidence, candidates: list[int], tau: float, least: int) -> list[str]:
    found = []
    if seen.prompts < least or seen.with_images * 2 < min(least, seen.prompts):
        found.append(f"{seen.prompts} prompts, {seen.with_images} with images; {least} are needed, half with images")
    if not candidates:
        best = max((max(v) for v in seen.medians.values()), default=0.0)
        return [*found, f"no channel of the first token reaches {tau:g} in half of the layers (largest: {best:.1f})"]
    if seen.first_fires < AT_LEAST_LAYERS:
        found.append(f"the first token is a sink in {seen.first_fires:.0%} of prompts and layers only")
    if seen.far_below < MOST or seen.between > BETWEEN:
        found.append(
            f"there are no two clear modes: {seen.far_below:.0%} of tokens are below {tau * FAR_BELOW:g}, "
            f"{seen.between:.0%} between that and {tau:g}"
        )
    if not seen.with_images:
        return found
    if seen.attention_ratio is None or seen.prompts_with_visual_sinks < 0.5:
        found.append(f"{seen.prompts_with_visual_sinks:.0%} of the prompts with images have a sink among visual tokens")
    elif seen.attention_ratio < SEVERAL:
        found.append(f"visual sinks draw {seen.attention_ratio:.1f} times the attention of a visual token, not several")
    return found


def _weighed(seen: Evidence, judging: Judging) -> Evidence:
    n = judging.tokens
    return dataclasses.replace(
        seen,
        first_fires=n["fires"] / n["first"],
        far_below=n["far_below"] / n["all"],
        between=n["between"] / n["all"],
        visual_sinks=n["visual"] / max(1.0, n["places"]),
        prompts_with_visual_sinks=n["with_sinks"] / max(1.0, n["images"]),
        attention_ratio=sum(judging.ratios) / len(judging.ratios) if judging.ratios else None,
    )


@torch.no_grad()
def _read(model: Any, inputs_list: Sequence[dict[str, Any]], watcher: Watcher, progress: Callable[[int], None]) -> None:
    with patchkit.apply(model, watcher):
        for done, inputs in enumerate(inputs_list, 1):
            watcher.begin()
            model(**inputs, use_cache=False)
            watcher.end()
            progress(done)
