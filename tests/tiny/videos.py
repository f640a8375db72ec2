"""Video pipelines of the real classes, with random weights, built from config alone."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel

from . import tokenizers
from .build import clip_text, seeded, t5_text


def _cogvideox(layers: int, *, rope: bool, **config: object) -> CogVideoXPipeline:
    size = {"sample_width": 4, "sample_height": 4, "use_rotary_positional_embeddings": rope} | config
    transformer = seeded(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=layers,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        **size,
    )
    vae = seeded(
        AutoencoderKLCogVideoX,
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    return CogVideoXPipeline(
        tokenizer=tokenizers.t5(),
        text_encoder=t5_text(),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler(**schedule) if rope else CogVideoXDDIMScheduler(**schedule),
    )


def cogvideox(layers: int = 2) -> CogVideoXPipeline:
    """The 5B style: rotary positions on the video tokens, DPM scheduler."""
    return _cogvideox(layers, rope=True)


def cogvideox2b(layers: int = 2) -> CogVideoXPipeline:
    """The 2B style: positions added at the embedding, no RoPE, DDIM scheduler (which has no ``step_index``)."""
    return _cogvideox(layers, rope=False)


def cogvideox15(layers: int = 2) -> CogVideoXPipeline:
    """The 1.5 style: two latent frames a token, positions sliced off a larger table. Not in the tables of entries."""
    return _cogvideox(layers, rope=True, patch_size_t=2, patch_bias=False, sample_height=8, sample_width=8)


def _hunyuan_text() -> LlamaModel:
    # The pipeline reads hidden state -3, so the third layer from the end has to exist.
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=2,
    )
    return seeded(LlamaModel, config)


def hunyuan(layers: int = 1) -> HunyuanVideoPipeline:
    """As many single blocks as double blocks; one refiner block."""
    transformer = seeded(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    vae = seeded(
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return HunyuanVideoPipeline(
        text_encoder=_hunyuan_text(),
        tokenizer=tokenizers.llama(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text(),
        tokenizer_2=tokenizers.clip(),
    )


def _wan_transformer(layers: int, *, seed: int = 0) -> WanTransformer3DModel:
    return seeded(
        WanTransformer3DModel,
        seed=seed,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _wan_parts(layers: int, flow_shift: float) -> dict[str, object]:
    vae = seeded(
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {
        "tokenizer": tokenizers.t5(),
        "text_encoder": t5_text(umt5=True),
        "transformer": _wan_transformer(layers),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    }


def wan21(layers: int = 2) -> WanPipeline:
    return WanPipeline(**_wan_parts(layers, flow_shift=3.0), transformer_2=None)


def wan22(layers: int = 2) -> WanPipeline:
    """Two denoisers: ``transformer`` down to the boundary (high noise), ``transformer_2`` below it.

    The flow shift makes two steps fall at timesteps 999 and 444, so that both take part.
    """
    return WanPipeline(
        **_wan_parts(layers, flow_shift=0.8),
        transformer_2=_wan_transformer(layers, seed=1),
        boundary_ratio=0.5,
    )


def ltx(layers: int = 2) -> LTXPipeline:
    transformer = seeded(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=32,
    )
    vae = seeded(
        AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=t5_text(),
        tokenizer=tokenizers.t5(),
        transformer=transformer,
    )


def mochi(layers: int = 2) -> MochiPipeline:
    transformer = seeded(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=layers,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = seeded(
        AutoencoderKLMochi,
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=t5_text(),
        tokenizer=tokenizers.t5(),
        transformer=transformer,
    )
