"""DiTCtrl as its formulas read, in fp32 and with N x N maps: pair by pair, four samples at a time, nothing shared.

Independent of ``patchkit.recipes.ditctrl``: own processors on the transformer's blocks, and an own loop that blends the
guided estimates of the clean video before the solver. CogVideoX only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

SOURCE, TARGET = (0, 2), (1, 3)  # of the batch [u_s, u_t, c_s, c_t]


def frames(prompts: int, transitions: int, extra: int, length: int, overlap: int) -> tuple[int, int]:
    """(segments, latent frames)."""
    count = prompts + transitions * (prompts - 1) + extra * max(prompts - 2, 0)
    return count, length + (count - 1) * (length - overlap)


def texts(prompts: Sequence[Tensor], transitions: int, extra: int) -> list[Tensor]:
    out = []
    for i, c in enumerate(prompts):
        out += [c] * (1 + (extra if 0 < i < len(prompts) - 1 else 0))
        if i + 1 < len(prompts):
            for j in range(1, transitions + 1):
                a = j / (transitions + 1)
                out.append((1 - a) * c + a * prompts[i + 1])
    return out


def weight(length: int) -> Tensor:
    return torch.tensor([min((j + 0.5) * 2 / length, 2 - (j + 0.5) * 2 / length) for j in range(length)])


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(output, P): softmax(q k' / sqrt(D) + bias) v."""
    logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
    p = (logits if bias is None else logits + bias).softmax(-1)
    return p @ v.float(), p


def normalised(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    x = x.view(grid)
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return ((x - low) / (high - low + 1e-6)).flatten()


def fg_bg(q: Tensor, k: Tensor, v: Tensor, m_t: Tensor, m_s: Tensor, text: int) -> Tensor:
    """O = M_t O_fg + (1 - M_t) O_bg: two attentions with additive masks on video-video entries; text first."""
    n = q.shape[-2]
    outs = []
    for hidden in (~m_s, m_s):  # fg hides what is not the source's object, bg hides the object
        bias = torch.zeros(n, n)
        bias[text:, text:].masked_fill_(hidden[None, :], float("-inf"))
        outs.append(dense(q, k, v, bias)[0])
    rows = torch.cat([torch.ones(text, dtype=torch.bool), m_t])[:, None]
    return torch.where(rows, outs[0], outs[1])


@dataclass
class State:
    """What the processors have to know of the running forward."""

    share: bool = False
    layers: tuple[int, ...] = ()
    tokens: tuple[Sequence[int], Sequence[int]] | None = None  # of the source's and the target's object
    threshold: float = 0.3
    grid: tuple[int, int, int] = (1, 1, 1)
    kind: str = "v2t"
    sums: list[Tensor] = field(default_factory=list)
    count: int = 0
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self) -> None:
        self.sums, self.count, self.masks = [], 0, {}


class Processor:
    """One block's attention over the batch of four."""

    def __init__(self, layer: int, state: State) -> None:
        self.layer, self.state = layer, state

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, image_rotary_emb: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        text, state = encoder_hidden_states.shape[1], self.state
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = q.clone(), k.clone()
            q[:, :, text:] = apply_rotary_emb(q[:, :, text:], image_rotary_emb)
            k[:, :, text:] = apply_rotary_emb(k[:, :, text:], image_rotary_emb)
        out, p = dense(q, k, v)
        if state.share and state.tokens is not None:
            found = [self.map(p[row], text, tokens) for row, tokens in zip((2, 3), state.tokens, strict=True)]
            state.sums = found if not state.sums else [a + b for a, b in zip(state.sums, found, strict=True)]
            state.count += 1
        if state.share and self.layer in state.layers:
            for s, t in zip(SOURCE, TARGET, strict=True):
                if state.tokens is None:
                    out[t] = dense(q[t], k[s], v[s])[0]
                    continue
                m_s, m_t = (normalised(x / state.count, state.grid) >= state.threshold for x in state.sums)
                state.masks[self.layer] = (m_s, m_t)
                out[t] = fg_bg(q[t], k[s], v[s], m_t, m_s, text)
        y = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        return y[:, text:], y[:, :text]

    def map(self, p: Tensor, text: int, tokens: Sequence[int]) -> Tensor:
        there = p[:, text:, list(tokens)].mean(0).sum(-1)
        if self.state.kind == "v2t":
            return there
        return (there + p[:, list(tokens), text:].mean(0).sum(0)) / 2


def long_video(
    pipe: Any,
    segments: Sequence[Tensor],
    negative: Tensor,
    noise: Tensor,
    *,
    length: int,
    overlap: int,
    steps: int,
    guidance: float,
    sharing: Callable[[int], bool],
    state: State,
    tokens: Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Section 2.3, for every step: pairs in ascending order, the blend of guided x0, one solver step.

    Args:
        segments: (1, T, D) text of each segment.
        noise: (1, F, C, h, w).
        tokens: of the object, for each segment; None without masks.
    """
    transformer, scheduler = pipe.transformer, pipe.scheduler
    kept = [block.attn1.processor for block in transformer.transformer_blocks]
    for i, block in enumerate(transformer.transformer_blocks):
        block.attn1.processor = Processor(i, state)
    try:
        scheduler.set_timesteps(steps)
        x, old = noise.clone(), None
        w = weight(length).view(1, -1, 1, 1, 1)
        times = list(scheduler.timesteps)
        rope = None
        if transformer.config.use_rotary_positional_embeddings:
            size = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
            rope = pipe._prepare_rotary_positional_embeddings(x.shape[-2] * size, x.shape[-1] * size, length, "cpu")
        for i, t in enumerate(times):
            num, den = torch.zeros_like(x), torch.zeros(1, x.shape[1], 1, 1, 1)
            alpha = scheduler.alphas_cumprod[t]
            state.share = sharing(i)
            for k in range(len(segments) - 1):
                a, b = k * (length - overlap), (k + 1) * (length - overlap)
                here, there = x[:, a : a + length], x[:, b : b + length]
                state.begin()
                if tokens is not None:
                    state.tokens = (tokens[k], tokens[k + 1])
                with torch.no_grad():
                    v = transformer(
                        hidden_states=torch.cat([here, there, here, there]),
                        encoder_hidden_states=torch.cat([negative, negative, segments[k], segments[k + 1]]),
                        timestep=t.expand(4),
                        image_rotary_emb=rope,
                        return_dict=False,
                    )[0]
                pair = torch.cat([here, there])
                clean = [alpha.sqrt() * pair - (1 - alpha).sqrt() * half for half in (v[:2], v[2:])]
                guided = clean[0] + guidance * (clean[1] - clean[0])
                for start, x0 in ((a, guided[:1]), (b, guided[1:])):
                    num[:, start : start + length] += w * x0
                    den[:, start : start + length] += w
            # the scheduler wants v; x0 and v say the same where there is noise
            blended = (alpha.sqrt() * x - num / den) / (1 - alpha).sqrt()
            if isinstance(scheduler, CogVideoXDPMScheduler):
                x, old = scheduler.step(
                    blended, old, t, times[i - 1] if i else None, x, generator=generator, return_dict=False
                )
            else:
                x = scheduler.step(blended, t, x, return_dict=False)[0]
        return x
    finally:
        for block, processor in zip(transformer.transformer_blocks, kept, strict=True):
            block.attn1.processor = processor
