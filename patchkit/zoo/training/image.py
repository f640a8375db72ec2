"""Train the denoiser and the text encoder of ``zoo/image``: ``python -m patchkit.zoo.training.image --out DIR``.

The latents are 4x4 area means of the picture, so they need no encoder and a 16x16 token is a place. The noise levels
reach further down than usual (a signal of 1.5 % is left at the end), so that pure noise is a fair start, and the
terminal signal-to-noise ratio is not zero, so that DPM-Solver++ and its inverse can start there, too.

The run is cut into stages of fixed length, checkpoints every two minutes, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.text import CLIP_TOKENS, clip_tokenizer
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.muon import Muon
from patchkit.zoo.world import SIZE

logger = logging.getLogger(__name__)

LATENT_SCALE = 1.25  # gives the latents about unit variance
CHANNELS = (48, 64, 80)
HEAD = 16  # width of an attention head: 3, 4 and 5 heads at 16x16, 8x8 and 4x4
EMPTY = 0.1  # share of the captions that are dropped, for guidance and for inversion without words


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on batches of ``batch`` pictures, ``pairs`` per cent of them with two objects."""

    steps: int
    batch: int
    pairs: int


STAGES = (Stage(1000, 32, 40), Stage(5000, 32, 60))

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def build_models(seed: int = 0) -> tuple[Any, Any]:
    """The untrained ``UNet2DConditionModel`` and ``CLIPTextModel`` of zoo/image."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(
        sample_size=SIZE // stills.CELL,
        in_channels=3,
        out_channels=3,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=tuple(width // HEAD for width in CHANNELS),  # the class reads it as the number of heads
        cross_attention_dim=64,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return unet, CLIPTextModel(config)


def latents(pictures: Tensor) -> Tensor:
    """The (B, 3, 16, 16) latents of (B, 3, 64, 64) pictures in [0, 1]: area means in about unit variance."""
    return (F.avg_pool2d(pictures, stills.CELL) * 2 - 1) * LATENT_SCALE


def noise_levels() -> Tensor:
    """alpha_bar of the 1,000 training steps; the pipeline's scheduler is built with the same values."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**SCHEDULER)
    return scheduler.alphas_cumprod.float()


def stratified(batch: int, levels: int) -> Tensor:
    """(batch,) noise levels that cover the whole range evenly."""
    return ((torch.arange(batch) + torch.rand(batch)) / batch * levels).long()


class Run(Loop):
    """Everything that a checkpoint holds."""

    name = "image"

    def __init__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        self.stages = stages
        self.unet, self.text = build_models(seed)
        self.tokenizer = clip_tokenizer()
        self.alphas = noise_levels()
        matrices = [p for n, p in self.unet.named_parameters() if "blocks." in n or "mid_block." in n if p.ndim > 1]
        taken = {id(p) for p in matrices}
        model = nn.ModuleDict({"unet": self.unet, "text": self.text})
        rest = [p for p in model.parameters() if id(p) not in taken]
        optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        super().__init__(out, model, optimisers, sum(s.steps for s in stages), seed)

    def stage(self) -> Stage:
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def notes(self) -> dict[str, Any]:
        return {"pairs": self.stage().pairs}

    def batch(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Clean latents and token ids."""
        stage = self.stage()
        wanted = [stills.sample_description(rng, stage.pairs / 100) for _ in range(stage.batch)]
        captions = ["" if rng.random() < EMPTY else w.caption for w in wanted]
        clean = latents(stills.render([stills.draw(w, rng) for w in wanted]))
        ids = self.tokenizer(captions, padding="max_length", max_length=CLIP_TOKENS, return_tensors="pt").input_ids
        return clean, ids

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        clean, ids = self.batch(rng)
        t = stratified(len(clean), len(self.alphas))
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        words = self.text(ids).last_hidden_state
        return F.mse_loss(self.unet(noisy, t, words, return_dict=False)[0], velocity), len(clean)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(f"{s.steps}x{s.batch}x{s.pairs}" for s in STAGES))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = tuple(Stage(*map(int, part.split("x"))) for part in args.stages.split(","))
    run = Run(args.out, stages, args.lr, args.seed)
    run.resume()
    run.fit()


if __name__ == "__main__":
    main()
