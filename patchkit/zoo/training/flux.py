"""Train the transformer and the text encoders of ``zoo/flux``: ``python -m patchkit.zoo.training.flux --out DIR``.

A FLUX in small, by the recipe of ``zoo/dit``: blocks with two streams, then blocks with one, rotary positions, words
from a T5 encoder alone and a pooled CLIP embedding beside the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchkit.zoo.training import flow
from patchkit.zoo.training.stills_run import Stage, train

DOUBLE, SINGLE, HEADS, HEAD = 3, 4, 6, 16
AXES = (4, 6, 6)  # of a head's width: what turns with the (unused) first index, the row and the column
CLIP_WIDTH, T5_WIDTH = 48, 96
STAGES = (Stage(500, 32, 30), Stage(2900, 32, 60))


def build_models(seed: int = 0) -> nn.ModuleDict:
    """The untrained parts of zoo/flux, under the pipeline's names."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    transformer: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,  # 2x2 latents of three channels, packed by the pipeline
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )
    for block in transformer.transformer_blocks:
        flow.open_gates(block.norm1.linear, (2, 5), 6)
        flow.open_gates(block.norm1_context.linear, (2, 5), 6)
    for block in transformer.single_transformer_blocks:
        flow.open_gates(block.norm.linear, (2,), 3)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    clip = CLIPTextModel(flow.clip_config(CLIP_WIDTH))
    flow.enlarge_embeddings(clip)
    t5 = flow.build_t5(T5_WIDTH)
    flow.spread_places(t5)
    return nn.ModuleDict({"transformer": transformer, "text_encoder": clip, "text_encoder_2": t5})


class Run(flow.FlowRun):
    """Everything that a checkpoint holds."""

    name = "flux"

    def __init__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        super().__init__(out, build_models(seed), stages, lr, seed)

    def velocity(self, noisy: Tensor, sigma: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        from diffusers import FluxPipeline

        batch, channels, height, width = noisy.shape
        pooled = self.parts["text_encoder"](clip).pooler_output
        words = self.parts["text_encoder_2"](t5).last_hidden_state
        packed = self.parts["transformer"](
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
            txt_ids=torch.zeros(words.shape[1], 3),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(packed, height, width, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    train(Run, STAGES, __doc__, argv)


if __name__ == "__main__":
    main()
