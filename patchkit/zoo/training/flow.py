"""What the flow-matching models of the zoo share: noise levels as their pipelines walk them, text lengths, the loss.

The models are trained on ``x = (1 - sigma) picture + sigma noise`` to predict ``noise - picture``. The levels of a
batch cover a logit-normal distribution evenly: most lie where outlines are decided, few at either end. What of the
target nobody can predict, because grain and noise look alike, is averaged out (:func:`noisy_and_velocity`).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.text import clip_tokenizer, t5_tokenizer
from patchkit.zoo.training.stills_run import LATENT_SCALE, Stage, StillsRun

SHIFT = 3.0  # of the pipeline's steps; even backgrounds stay visible through much noise
LEVELS = (0.5, 1.3)  # mean and standard deviation of the training's noise levels as logits
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": SHIFT}
GRAIN = 2 * LATENT_SCALE * stills.GRAIN  # standard deviation of the pictures' grain in latents
TEXT_TOKENS = 16  # of each text encoder; the longest caption takes 14


def levels(batch: int) -> Tensor:
    """(batch,) noise levels in (0, 1) that cover the training's distribution evenly."""
    u = (torch.arange(batch) + torch.rand(batch).clamp(0.01, 0.99)) / batch
    mean, deviation = LEVELS
    return torch.sigmoid(mean + deviation * torch.special.ndtri(u))


def noisy_and_velocity(flat: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents of pictures with grain, and what a model should predict for them.

    Grain and noise are both white in the latents, so only their sum ``rest`` can be seen. The expectation of ``noise -
    grain`` given ``rest`` takes the place of its sample: the best prediction is the same, and the gradient is quieter.

    Args:
        flat: (B, 3, 16, 16) latents of pictures without grain.
        sigma: (B,) noise levels in [0, 1].
    """
    sigma = sigma.view(-1, 1, 1, 1)
    power = ((1 - sigma) * GRAIN) ** 2 + sigma**2
    rest = power.sqrt() * torch.randn_like(flat)
    return (1 - sigma) * flat + rest, (sigma - (1 - sigma) * GRAIN**2) / power * rest - flat


def block_matrices(transformer: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon trains: the matrices of the blocks but those that make modulations."""
    return [p for n, p in transformer.named_parameters() if "blocks." in n and "norm" not in n and p.ndim == 2]


def open_gates(linear: nn.Linear, gates: tuple[int, ...], parts: int) -> None:
    """Start a block's modulation nearly unconditional, with its gates half open.

    Args:
        linear: makes ``parts`` shifts, scales and gates from the embedding of time and text.
        gates: which of them are gates.
        parts: how many there are.
    """
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    for number in gates:
        linear.bias.data.chunk(parts)[number].fill_(0.5)


def clip_config(width: int) -> Any:
    """The configuration of a two-layer CLIP text encoder for the zoo's words."""
    from transformers import CLIPTextConfig

    tokenizer = clip_tokenizer(TEXT_TOKENS)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def enlarge_embeddings(clip: Any) -> None:
    """Start a CLIP encoder with words that can be told apart.

    The class starts them at 0.02, and SD3 takes the states of the last layer but one, which no norm enlarges.
    """
    for module in clip.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def build_t5(width: int) -> Any:
    """An untrained two-layer ``T5EncoderModel`` for the zoo's words."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=2,
            num_heads=width // 16,
            dropout_rate=0.0,
        )
    )


def spread_places(t5: Any) -> None:
    """Start a T5 encoder with heads that look at different distances.

    The class starts the biases of distances so small that every head averages over all words. Where nothing else tells
    the order of words, that is never unlearned: a flux so trained knew which colours and shapes a caption names, but
    not which belong together (place of two objects 49 %, and the encoder gave the same to within 0.3 % for the caption
    with both objects swapped).
    """
    for module in t5.modules():
        if getattr(module, "has_relative_attention_bias", False):
            nn.init.normal_(module.relative_attention_bias.weight, std=2.0)


class FlowRun(StillsRun):
    """A run on the parts of a pipeline, by the pipeline's names. A subclass overrides :meth:`velocity`."""

    def __init__(self, out: Path, parts: nn.ModuleDict, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        self.parts = parts
        self.clip, self.t5 = clip_tokenizer(TEXT_TOKENS), t5_tokenizer(TEXT_TOKENS)
        matrices = block_matrices(parts["transformer"])
        super().__init__(out, parts, matrices, stages, lr, seed)

    def velocity(self, noisy: Tensor, sigma: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        """The model's prediction for (B, 3, 16, 16) latents at noise levels (B,), given both tokenizers' ids."""
        raise NotImplementedError

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        flat, captions = self.samples_of_step(rng, grain=0.0)
        options: dict[str, Any] = {"padding": "max_length", "max_length": TEXT_TOKENS, "return_tensors": "pt"}
        clip, t5 = self.clip(captions, **options).input_ids, self.t5(captions, **options).input_ids
        sigma = levels(len(flat))
        noisy, velocity = noisy_and_velocity(flat, sigma)
        return F.mse_loss(self.velocity(noisy, sigma, clip, t5), velocity), len(flat)
