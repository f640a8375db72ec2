"""What every factory shares: seeding, and the text encoders and picture VAE used by several pipelines."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

Module = TypeVar("Module", bound=torch.nn.Module)


def seeded(cls: type[Module], *args: Any, seed: int = 0, **config: Any) -> Module:
    """Build a module in eval mode, its weights a function of the seed alone; the caller's random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(*args, **config).eval()


def clip_text(cls: type[Module] = CLIPTextModel, *, seed: int = 0) -> Module:
    """CLIP text tower of width 32; pass ``CLIPTextModelWithProjection`` where pooled embeddings are needed."""
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return seeded(cls, config, seed=seed)


def clip_pooled(*, seed: int = 0) -> CLIPTextModelWithProjection:
    return clip_text(CLIPTextModelWithProjection, seed=seed)


def t5_text(width: int = 32, *, umt5: bool = False) -> T5EncoderModel | UMT5EncoderModel:
    """T5 (or UMT5) encoder with two layers and four heads of 8."""
    config_cls, cls = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    config = config_cls(vocab_size=104, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)
    return seeded(cls, config)


def picture_vae(**changes: Any) -> AutoencoderKL:
    """Four latent channels at half the side of the picture."""
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return seeded(AutoencoderKL, **(config | changes))


def shifted_vae() -> AutoencoderKL:
    """The SD3 and Flux flavour: shift and scale, no quant convolutions."""
    return picture_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
