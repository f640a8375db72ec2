"""The tiles of a long video: how many, which text each has, where they lie, and how their predictions are blended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Text = Mapping[str, Tensor]  # what the denoiser is told of one prompt, by argument, each with a batch of one


@dataclass(frozen=True)
class Segment:
    """One tile: the words of prompt ``first``, moved by ``share`` towards those of the next prompt.

    Attributes:
        first: number of the prompt.
        share: 0 for a prompt's own segments; j / (n + 1) for the j-th of n segments between two prompts.
    """

    first: int
    share: float = 0.0

    @property
    def prompts(self) -> tuple[int, ...]:
        """The prompts that it takes its words from."""
        return (self.first, self.first + 1) if self.share else (self.first,)


def segments(prompts: int, transitions: int, extra_middle: int) -> tuple[Segment, ...]:
    """The segments of a video of P prompts, in order: S = P + n (P - 1) + e max(P - 2, 0) of them.

    Args:
        prompts: P.
        transitions: n, segments between two prompts.
        extra_middle: e, further segments of each prompt that is neither the first nor the last.
    """
    out = []
    for i in range(prompts):
        out += [Segment(i)] * (1 + (extra_middle if 0 < i < prompts - 1 else 0))
        if i < prompts - 1:
            out += [Segment(i, j / (transitions + 1)) for j in range(1, transitions + 1)]
    return tuple(out)


@dataclass(frozen=True)
class Layout:
    """Where the segments lie.

    Attributes:
        length: L, latent frames of a segment.
        overlap: o, latent frames that neighbours share.
        segments: S of them; segment k covers the latent frames [k (L - o), k (L - o) + L).
    """

    length: int
    overlap: int
    segments: tuple[Segment, ...]

    @property
    def stride(self) -> int:
        """Latent frames from one segment's start to the next one's."""
        return self.length - self.overlap

    @property
    def frames(self) -> int:
        """F = L + (S - 1)(L - o), latent frames of the whole video."""
        return self.length + (len(self.segments) - 1) * self.stride

    def span(self, number: int) -> slice:
        """The latent frames of a segment."""
        return slice(number * self.stride, number * self.stride + self.length)


def text_of(segment: Segment, texts: Sequence[Text]) -> dict[str, Tensor]:
    """What the denoiser is told in a segment: the prompt's embedding, between two prompts the mean of both by share.

    Masks of padding are joined: a place is real where it is in either prompt.
    """
    here = texts[segment.first]
    if not segment.share:
        return dict(here)
    there = texts[segment.first + 1]
    return {name: _between(here[name], there[name], segment.share) for name in here}


def _between(a: Tensor, b: Tensor, share: float) -> Tensor:
    if not a.is_floating_point():
        return torch.maximum(a, b) if a.dtype != torch.bool else a | b
    return (1 - share) * a + share * b


def weights(length: int) -> list[float]:
    """w_j of the L frames of a segment: a triangle that is highest in the middle and nowhere 0."""
    return [min((j + 0.5) * 2 / length, 2 - (j + 0.5) * 2 / length) for j in range(length)]


class Blend:
    """The weighted mean of the segments' predictions, frame by frame.

    Blending what the denoiser returns is the same as blending the guided estimates of the clean video: guidance and
    the conversion between them are linear, and overlapping segments start from the same noisy frames. Sums are kept
    in fp64 (fp32 where a device has none), so that a frame which all segments agree on stays as it is to the bit.

    Args:
        layout: of the video.
        axis: the frame axis of a prediction.
    """

    def __init__(self, layout: Layout, axis: int) -> None:
        self._layout, self._axis = layout, axis
        self._sum: Tensor | None = None
        self._mass = [0.0] * layout.frames
        self._weights = weights(layout.length)

    def add(self, number: int, prediction: Tensor, times: int = 1) -> None:
        """Count the prediction of a segment in, ``times`` times."""
        axis, span = self._axis, self._layout.span(number)
        wide = torch.float32 if prediction.device.type == "mps" else torch.float64
        if self._sum is None:
            shape = list(prediction.shape)
            shape[axis] = self._layout.frames
            self._sum = torch.zeros(shape, dtype=wide, device=prediction.device)
            self._dtype = prediction.dtype
        shaped = [1] * prediction.ndim
        shaped[axis] = -1
        weight = torch.tensor(self._weights, dtype=wide, device=prediction.device).view(shaped)
        part = self._sum.narrow(axis, span.start, self._layout.length)
        for _ in range(times):  # one by one: the sum is then the same as if each had been computed
            part.add_(weight * prediction)
            for j, w in enumerate(self._weights):
                self._mass[span.start + j] += w

    def result(self) -> Tensor:
        """The blended prediction of the whole video."""
        assert self._sum is not None
        shaped = [1] * self._sum.ndim
        shaped[self._axis] = -1
        mass = torch.tensor(self._mass, dtype=self._sum.dtype, device=self._sum.device).view(shaped)
        return (self._sum / mass).to(self._dtype)
