"""Train the denoiser and the text encoder of ``zoo/image``: ``python -m patchkit.zoo.training.image --out DIR``.

The latents are 4x4 area means of the picture, so they need no encoder and a 16x16 token is a place. The noise levels
reach further down than usual (a signal of 1.5 % is left at the end), so that pure noise is a fair start, and the
terminal signal-to-noise ratio is not zero, so that DPM-Solver++ and its inverse can start there, too.

The run is cut into stages of fixed length, checkpoints every two minutes, and continues where it was stopped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.text import CLIP_TOKENS, clip_tokenizer
from patchkit.zoo.training.stills_run import Stage, StillsRun, train
from patchkit.zoo.world import SIZE

CHANNELS = (48, 64, 80)
HEAD = 16  # width of an attention head: 3, 4 and 5 heads at 16x16, 8x8 and 4x4

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


def noise_levels() -> Tensor:
    """alpha_bar of the 1,000 training steps; the pipeline's scheduler is built with the same values."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**SCHEDULER)
    return scheduler.alphas_cumprod.float()


def stratified(batch: int, levels: int) -> Tensor:
    """(batch,) noise levels that cover the whole range evenly."""
    return ((torch.arange(batch) + torch.rand(batch)) / batch * levels).long()


class Run(StillsRun):
    """Everything that a checkpoint holds."""

    name = "image"

    def __init__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        self.unet, self.text = build_models(seed)
        self.tokenizer = clip_tokenizer()
        self.alphas = noise_levels()
        matrices = [p for n, p in self.unet.named_parameters() if "blocks." in n or "mid_block." in n if p.ndim > 1]
        super().__init__(out, nn.ModuleDict({"unet": self.unet, "text": self.text}), matrices, stages, lr, seed)

    def batch(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Clean latents and token ids."""
        clean, captions = self.samples_of_step(rng)
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
    train(Run, STAGES, __doc__, argv)


if __name__ == "__main__":
    main()
