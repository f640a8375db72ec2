"""Language and vision models of the real transformers classes, with random weights, built from config alone.

Every text batch has two rows of unequal length, padded on the left as generation wants it: a patch that loses the mask
changes the logits of the second row. Rows of pure padding carry no meaning; compare where the mask is 1.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import (
    BertConfig,
    BertModel,
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)

from .build import seeded

Model = TypeVar("Model", bound=PreTrainedModel)

VOCAB = 400
PAD = 0
IMAGE_TOKEN = 390
WINDOW = 8  # sliding window of Mistral and Gemma; the text batch is longer
LENGTHS = (12, 8)
SPREAD = 0.2  # wider than the usual 0.02, at which attention is so even that a wrong scale or position hardly shows
IMAGE_GRIDS = ((1, 4, 4), (1, 4, 6))  # frames, rows, columns of patches; Qwen-VL merges 2x2 of them into a token


def _text_config(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": SPREAD,
        **more,
    }


def _decoder(cls: type[Model], config_cls: type[PreTrainedConfig], layers: int, **more: Any) -> Model:
    return seeded(cls, config_cls(**_text_config(layers, **more)))


def llama(layers: int = 2) -> LlamaForCausalLM:
    return _decoder(LlamaForCausalLM, LlamaConfig, layers)


def mistral(layers: int = 2) -> MistralForCausalLM:
    return _decoder(MistralForCausalLM, MistralConfig, layers, sliding_window=WINDOW)


def qwen2(layers: int = 2) -> Qwen2ForCausalLM:
    return _decoder(Qwen2ForCausalLM, Qwen2Config, layers)


def qwen3(layers: int = 2) -> Qwen3ForCausalLM:
    return _decoder(Qwen3ForCausalLM, Qwen3Config, layers, head_dim=8)


def bitnet(layers: int = 2) -> BitNetForCausalLM:
    return _decoder(BitNetForCausalLM, BitNetConfig, layers)


def gemma3(layers: int = 2) -> Gemma3ForCausalLM:
    """Sliding and full attention layers in turn, the sliding one first."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": kinds}
    return _decoder(Gemma3ForCausalLM, Gemma3TextConfig, layers, **more)


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=256,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        initializer_range=SPREAD,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(GPT2LMHeadModel, config)


def bert(layers: int = 2) -> BertModel:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=SPREAD,
        pad_token_id=PAD,
    )
    return seeded(BertModel, config)


def vit(layers: int = 2) -> ViTModel:
    """32x32 pixels in patches of 8: 16 patches and the class token."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        initializer_range=SPREAD,
    )
    return seeded(ViTModel, config)


def llava(layers: int = 2) -> LlavaForConditionalGeneration:
    """A CLIP vision tower (16 image tokens a picture) in front of a Llama."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": SPREAD,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_text_config(layers)},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        pad_token_id=PAD,
    )
    return seeded(LlavaForConditionalGeneration, config)


def _qwen_vl(layers: int, vision: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    patches = {"num_heads": 4, "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "text_config": _text_config(layers, rope_parameters=rope),
        "vision_config": {"depth": 2, "initializer_range": SPREAD, **patches, **vision},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": IMAGE_TOKEN + 1,
        "vision_start_token_id": IMAGE_TOKEN + 2,
        "vision_end_token_id": IMAGE_TOKEN + 3,
        "pad_token_id": PAD,
    }


def qwen2vl(layers: int = 2) -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(**_qwen_vl(layers, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}))
    return seeded(Qwen2VLForConditionalGeneration, config)


def qwen25vl(layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """Its first vision block attends inside windows of 4x4 patches, its second to the whole picture."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return seeded(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(**_qwen_vl(layers, vision)))


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _words(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE_TOKEN, (length,), generator=generator).tolist()


def _padded(rows: list[list[int]], *, left: bool = True) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    tokens, mask = [], []
    for row in rows:
        blank = [PAD] * (longest - len(row))
        tokens.append(blank + row if left else row + blank)
        seen = [1] * len(row)
        mask.append(blank + seen if left else seen + blank)
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


def text_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return _padded([_words(length, seed) for seed, length in enumerate(LENGTHS)])


def bert_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return _padded([_words(length, seed) for seed, length in enumerate(LENGTHS)], left=False)


def vit_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(2, 3, 32, 32)}


def _around_images(counts: list[int], before: list[int], after: list[int]) -> list[list[int]]:
    rows = []
    for seed, (count, length) in enumerate(zip(counts, LENGTHS, strict=True)):
        words = _words(length, seed)
        rows.append(words[:2] + before + [IMAGE_TOKEN] * count + after + words[2:])
    return rows


def llava_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**_padded(_around_images([16, 16], [], [])), "pixel_values": _noise(2, 3, 32, 32)}


def qwen_vl_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One picture a row, of unequal sizes (``IMAGE_GRIDS``), already cut into patches."""
    sizes = [frames * rows * columns for frames, rows, columns in IMAGE_GRIDS]
    batch = _padded(_around_images([size // 4 for size in sizes], [IMAGE_TOKEN + 2], [IMAGE_TOKEN + 3]))
    batch["pixel_values"] = _noise(sum(sizes), 3 * 2 * 4 * 4)
    batch["image_grid_thw"] = torch.tensor(IMAGE_GRIDS)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch
