"""Vision-language models of the real classes, random weights, four decoder layers unless asked otherwise.

``VLMS`` maps names to entries like those of ``tiny.MODELS``. A batch holds two prompts of unequal length, padded on the
left, each with one picture or more; text stands before, after and (Idefics3, SmolVLM) between the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from . import models
from .build import seeded
from .entries import TinyModel
from .models import IMAGE_TOKEN, PAD, SPREAD, _noise, _padded, _text_config, _words

Rows = list[list[int]]
DEEP = 4


def _clip(kind: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": SPREAD,
        **more,
    }


def llava(layers: int = DEEP) -> PreTrainedModel:
    return models.llava(layers)


def qwen2vl(layers: int = DEEP) -> PreTrainedModel:
    return models.qwen2vl(layers)


def qwen25vl(layers: int = DEEP) -> PreTrainedModel:
    return models.qwen25vl(layers)


def llava_next(layers: int = DEEP) -> PreTrainedModel:
    """Any-resolution tiles: 32x32 base picture, tiles of the pinpoints, a newline feature after each row."""
    config = LlavaNextConfig(
        vision_config=_clip(projection_dim=32),
        text_config={"model_type": "llama", **_text_config(layers)},
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        pad_token_id=PAD,
    )
    return seeded(LlavaNextForConditionalGeneration, config)


def llava_onevision(layers: int = DEEP) -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        vision_config=_clip("siglip_vision_model"),
        text_config={"model_type": "qwen2", **_text_config(layers)},
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN + 1,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    return seeded(LlavaOnevisionForConditionalGeneration, config)


def qwen3vl(layers: int = DEEP) -> PreTrainedModel:
    """Features of a vision block are added to the first decoder layers once more (deepstack)."""
    base = models._qwen_vl(
        layers,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
    )
    base["text_config"]["head_dim"] = 8
    return seeded(Qwen3VLForConditionalGeneration, Qwen3VLConfig(**base))


def internvl(layers: int = DEEP) -> PreTrainedModel:
    """4x4 patches of a tile are shuffled into 4 tokens."""
    config = InternVLConfig(
        vision_config=_clip("internvl_vision", image_size=[32, 32], patch_size=[8, 8], use_qk_norm=False),
        text_config={"model_type": "qwen2", **_text_config(layers)},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
        pad_token_id=PAD,
    )
    return seeded(InternVLForConditionalGeneration, config)


def _idefics(config_cls: Any, cls: Any, kind: str, layers: int) -> PreTrainedModel:
    config = config_cls(
        vision_config=_clip(kind),
        text_config={"model_type": "llama", **_text_config(layers)},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return seeded(cls, config)


def idefics3(layers: int = DEEP) -> PreTrainedModel:
    """4 tokens a tile."""
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, "idefics3_vision", layers)


def smolvlm(layers: int = DEEP) -> PreTrainedModel:
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, "smolvlm_vision", layers)


def paligemma(layers: int = DEEP) -> PreTrainedModel:
    """The prompt attends to all of itself."""
    config = PaliGemmaConfig(
        vision_config=_clip("siglip_vision_model", projection_dim=32),
        text_config={"model_type": "gemma", **_text_config(layers), "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
        pad_token_id=PAD,
    )
    return seeded(PaliGemmaForConditionalGeneration, config)


def gemma3vl(layers: int = DEEP, window: int = 16) -> PreTrainedModel:
    """Sliding layers at even numbers; picture tokens see each other both ways."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": window, "layer_types": kinds}
    config = Gemma3Config(
        vision_config=_clip("siglip_vision_model"),
        text_config={"model_type": "gemma3_text", **_text_config(layers, **text)},
        image_token_index=IMAGE_TOKEN,
        boi_token_index=IMAGE_TOKEN + 2,
        eoi_token_index=IMAGE_TOKEN + 3,
        mm_tokens_per_image=4,
        pad_token_id=PAD,
    )
    return seeded(Gemma3ForConditionalGeneration, config)


def _prompts(counts: list[list[int]]) -> Rows:
    """Words, then the pictures with a word between them, then words again; the first word is the beginning token."""
    rows = []
    for seed, (tiles, length) in enumerate(zip(counts, (9, 6), strict=True)):
        words = _words(length, seed)
        row = [1, words[0]]
        for number, count in enumerate(tiles):
            row += ([words[1]] if number else []) + [IMAGE_TOKEN] * count
        rows.append(row + words[1:])
    return rows


def llava_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two pictures in the first prompt, one in the second."""
    return {**_padded(_prompts([[16, 16], [16]])), "pixel_values": _noise(3, 3, 32, 32)}


def _anyres_inputs(model: PreTrainedModel, count: int) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = dict(_padded(_prompts([[count], [count]])))
    batch["pixel_values"] = _noise(2, 3, 3, 32, 32)
    batch["image_sizes"] = torch.tensor([[32, 64], [32, 64]])
    return batch


def llava_next_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """16 tokens of the base picture, 4 rows of 8 of the two tiles with a newline each."""
    return _anyres_inputs(model, 16 + 4 * 9)


def llava_onevision_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return _anyres_inputs(model, 16 + 4 * 9)


def tiles_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """4 tokens a tile, text between the tiles."""
    return {**_padded(_prompts([[4, 4], [4]])), "pixel_values": _noise(3, 3, 32, 32)}


def idefics_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    batch = tiles_inputs(model)
    batch["pixel_values"] = torch.stack((_noise(2, 3, 32, 32), _noise(2, 3, 32, 32, seed=1)))
    batch["pixel_values"][1, 1] = 0  # the second prompt has one tile; all zeros means: none
    return batch


def paligemma_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    rows = [[IMAGE_TOKEN] * 16 + [1, *_words(length, seed)] for seed, length in enumerate((9, 6))]
    batch = {**_padded(rows), "pixel_values": _noise(2, 3, 32, 32)}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def gemma3_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    batch = tiles_inputs(model)
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch


VLMS: dict[str, TinyModel] = {
    entry.name: entry
    for entry in (
        TinyModel("llava", llava, llava_inputs),
        TinyModel("llava_next", llava_next, llava_next_inputs),
        TinyModel("llava_onevision", llava_onevision, llava_onevision_inputs),
        TinyModel("qwen2vl", qwen2vl, models.qwen_vl_inputs),
        TinyModel("qwen25vl", qwen25vl, models.qwen_vl_inputs),
        TinyModel("qwen3vl", qwen3vl, models.qwen_vl_inputs),
        TinyModel("internvl", internvl, tiles_inputs),
        TinyModel("idefics3", idefics3, idefics_inputs),
        TinyModel("smolvlm", smolvlm, idefics_inputs),
        TinyModel("paligemma", paligemma, paligemma_inputs),
        TinyModel("gemma3vl", gemma3vl, gemma3_inputs),
    )
}
