"""Picture pipelines of the real classes, with random weights, built from config alone."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from . import tokenizers
from .build import clip_pooled, clip_text, picture_vae, seeded, shifted_vae, t5_text


def _unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return seeded(UNet2DConditionModel, **(config | changes))


def sd15() -> StableDiffusionPipeline:
    """Attention at two resolutions, so that the grid differs from block to block."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=picture_vae(),
        text_encoder=clip_text(),
        tokenizer=tokenizers.clip(),
        unet=_unet(
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    unet = _unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )
    return StableDiffusionXLPipeline(
        vae=picture_vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_pooled(seed=1),
        tokenizer=tokenizers.clip(),
        tokenizer_2=tokenizers.clip(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sd3(layers: int = 2, **changes: Any) -> StableDiffusion3Pipeline:
    transformer = seeded(
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
        **changes,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=clip_pooled(),
        tokenizer=tokenizers.clip(),
        text_encoder_2=clip_pooled(seed=1),
        tokenizer_2=tokenizers.clip(),
        text_encoder_3=t5_text(64),
        tokenizer_3=tokenizers.t5(),
    )


def sd35(layers: int = 2) -> StableDiffusion3Pipeline:
    return sd3(layers, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(layers: int = 2) -> FluxPipeline:
    """As many single blocks as double blocks."""
    transformer = seeded(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=shifted_vae(),
        text_encoder=clip_text(),
        tokenizer=tokenizers.clip(),
        text_encoder_2=t5_text(),
        tokenizer_2=tokenizers.t5(),
        transformer=transformer,
    )


def pixart(layers: int = 2) -> PixArtSigmaPipeline:
    transformer = seeded(
        PixArtTransformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        cross_attention_dim=24,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizers.t5(),
        text_encoder=t5_text(),
        vae=picture_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def _sana_text() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
    )
    return seeded(Gemma2Model, config)


def sana(layers: int = 2) -> SanaPipeline:
    transformer = seeded(
        SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    two_blocks = ("ResBlock", "EfficientViTBlock")
    vae = seeded(
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=two_blocks,
        decoder_block_types=two_blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    return SanaPipeline(
        tokenizer=tokenizers.llama(),
        text_encoder=_sana_text(),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def _qwen_text() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return seeded(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwenimage(layers: int = 2) -> QwenImagePipeline:
    transformer = seeded(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = seeded(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_qwen_text(),
        tokenizer=tokenizers.qwen2(),
        transformer=transformer,
    )
