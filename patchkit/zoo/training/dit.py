"""Train the transformer and the text encoders of ``zoo/dit``: ``python -m patchkit.zoo.training.dit --out DIR``.

A Stable Diffusion 3 in small: joint attention over 64 places of the picture and 32 words, normalised queries and keys,
two CLIP encoders and a T5 encoder, trained together by flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.training import flow
from patchkit.zoo.training.stills_run import Stage, train
from patchkit.zoo.world import SIZE

LAYERS, HEADS, HEAD = 6, 6, 16
CLIP_WIDTH = 48  # of each of the two; side by side they are as wide as the T5 encoder
STAGES = (Stage(500, 32, 30), Stage(2900, 32, 60))


def build_models(seed: int = 0) -> nn.ModuleDict:
    """The untrained parts of zoo/dit, under the pipeline's names."""
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    width = HEADS * HEAD
    transformer: Any = SD3Transformer2DModel(
        sample_size=SIZE // stills.CELL,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        joint_attention_dim=2 * CLIP_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=SIZE // stills.CELL // 2,
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:
        flow.open_gates(block.norm1.linear, (2, 5), 6)
        if block.context_pre_only:  # the last block only reads the text
            flow.open_gates(block.norm1_context.linear, (), 2)
        else:
            flow.open_gates(block.norm1_context.linear, (2, 5), 6)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    clips = [CLIPTextModelWithProjection(flow.clip_config(CLIP_WIDTH)) for _ in range(2)]
    for clip in clips:
        flow.enlarge_embeddings(clip)
    return nn.ModuleDict(
        {
            "transformer": transformer,
            "text_encoder": clips[0],
            "text_encoder_2": clips[1],
            "text_encoder_3": flow.build_t5(2 * CLIP_WIDTH),
        }
    )


def encode(parts: nn.ModuleDict, clip: Tensor, t5: Tensor) -> tuple[Tensor, Tensor]:
    """What ``StableDiffusion3Pipeline.encode_prompt`` makes of token ids: (B, 32, C) words and (B, C) pooled."""
    first, second = (parts[name](clip, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2"))
    words = parts["text_encoder_3"](t5).last_hidden_state
    both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    both = F.pad(both, (0, words.shape[-1] - both.shape[-1]))
    return torch.cat([both, words], dim=1), torch.cat([first.text_embeds, second.text_embeds], dim=-1)


class Run(flow.FlowRun):
    """Everything that a checkpoint holds."""

    name = "dit"

    def __init__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        super().__init__(out, build_models(seed), stages, lr, seed)

    def velocity(self, noisy: Tensor, sigma: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        words, pooled = encode(self.parts, clip, t5)
        return self.parts["transformer"](noisy, words, pooled, sigma * 1000, return_dict=False)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    train(Run, STAGES, __doc__, argv)


if __name__ == "__main__":
    main()
