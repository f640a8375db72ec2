"""The untrained model of ``zoo/vlm``, with what is written into its vision tower before anything is learnt."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.zoo.chat import IMAGE_TOKENS, PATCH, chat_tokenizer
from patchkit.zoo.world import SIZE

WIDTH, INNER = 128, 256
TOWER_LAYERS, LAYERS, HEADS, KV_HEADS = 3, 6, 8, 2
PLACES = 32  # channels of the tower that tell the place of a patch, as many as a head has
SIDES, CORNERS = ((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))


def build_model(seed: int = 0) -> Any:
    """The untrained ``LlavaForConditionalGeneration`` of zoo/vlm."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = chat_tokenizer()
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.encode("<image>", add_special_tokens=False)[0],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        **special,
    )
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    prepare_tower(model.model.vision_tower)
    return model


def prepare_tower(tower: Any) -> None:
    """Write down what every vision tower has to find out first: colours and edges, places, and neighbours.

    The first channels hold the smoothest cosine patterns of a patch, the last ones waves of its row and column. The
    heads of the first layers look at the neighbour on each side and at each corner, found by turning these waves. From
    random weights, shapes were still guessed after 9,000 pictures.
    """
    embeddings, layers = tower.embeddings, tower.encoder.layers
    with torch.no_grad():
        embeddings.class_embedding.zero_()
        embeddings.patch_embedding.weight.copy_(F.pad(cosines(PATCH, WIDTH - PLACES), (0, 0) * 3 + (0, PLACES)))
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:, -PLACES:] = waves(SIZE // PATCH, 0, 0)
        for layer, offsets in zip(layers, (SIDES, CORNERS), strict=False):
            for head, offset in enumerate(offsets):
                rows = slice(head * PLACES, (head + 1) * PLACES)
                layer.self_attn.q_proj.weight[rows] = F.pad(1.5 * turn(*offset), (WIDTH - PLACES, 0))
                layer.self_attn.k_proj.weight[rows] = F.pad(torch.eye(PLACES), (WIDTH - PLACES, 0))


def frequencies() -> Tensor:
    """Radians a patch, for rows and for columns."""
    return torch.logspace(math.log10(0.3), math.log10(2.0), PLACES // 4)


def waves(side: int, row: int, column: int) -> Tensor:
    """(side * side, PLACES) cosines and sines of rows and columns, counted from (row, column)."""
    rows, columns = torch.arange(side).float() + row, torch.arange(side).float() + column
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(-1, 2, 1) * frequencies()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def turn(row: int, column: int) -> Tensor:
    """The matrix that moves :func:`waves` by so many rows and columns."""
    blocks = []
    for angle in torch.cat([row * frequencies(), column * frequencies()]).tolist():
        blocks.append(torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))
    return torch.block_diag(*blocks)


def cosines(side: int, width: int) -> Tensor:
    """(width, 3, side, side): the smoothest cosine patterns of each colour channel, the mean weaker than the others."""
    place = (torch.arange(side) + 0.5) / side * math.pi
    patterns = torch.stack([(n * place).cos() * (2 if n else 1) ** 0.5 for n in range(side)]) / side**0.5
    order = sorted(((r, c) for r in range(side) for c in range(side)), key=lambda rc: (rc[0] + rc[1], rc))
    out = torch.zeros(width, 3, side, side)
    for n in range(width):
        row, column = order[n // 3]
        out[n, n % 3] = torch.outer(patterns[row], patterns[column]) * (1.2 if row + column else 0.45)
    return out
