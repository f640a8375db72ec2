"""What is true of each tiny pipeline and model, written down by hand: the answers the adapters are held to.

Read from the installed diffusers 0.42.1 and transformers 5.23.0 sources (the comments name the place) and checked by
``test_tiny.py`` against a recording of the library's own attention calls. Nothing here is computed from patchkit.
All of it is for the entry's default call: prompt "a red circle", negative prompt "blur", default size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Site:
    """One attention module of a denoiser (or of a transformers model)."""

    name: str
    kind: str  # self, cross, joint; outside the blocks: refiner, pooler; "linear" calls no attention op at all
    layer: int | None  # its block, counted in the order in which blocks run; None outside the stack of blocks
    route: str = "direct"  # F.scaled_dot_product_attention ("direct") or diffusers' dispatch_attention_fn ("dispatch")
    text: str = "none"  # where text tokens stand in the query: none, first, last
    mask: str = "none"  # none, bool_key (B,1,1,Nk), bool (per query), additive
    ops: int = 1  # attention op calls in one call of the denoiser
    grid: Grid | None = None  # of the picture or video tokens in the query: frames, rows, columns, row-major
    heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class Facts:
    """One pipeline. ``sites`` stand in the order in which they run, the same for each denoiser."""

    sites: tuple[Site, ...]
    text: tuple[int, int]  # text tokens in the op on the (conditional, unconditional) branch, padding included
    words: tuple[int, int]  # of these, how many are not padding
    # "batched": one call, batch [uncond; cond].  "two_calls": cond, then uncond.  "one_call": no CFG.
    cfg: str = "batched"
    cfg_of: dict[str, str] = field(default_factory=lambda: {"no_cfg": "one_call"})  # the same for the variants
    contexts: tuple[str, ...] = ()  # names given to cache_context in one step, in order
    contexts_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    timestep: str = "t"  # what the denoiser gets, t being the scheduler's: "t" or "t/1000"
    step_index: bool = True  # whether the scheduler has the attribute
    denoiser_of_step: tuple[str, str] = ("transformer", "transformer")
    # Calls of an attention op inside the denoiser that belong to no module of an attention class: (module, calls).
    others: tuple[tuple[str, int], ...] = ()


def _sites(heads: int, head_dim: int, grid: Grid, *sites: Site) -> tuple[Site, ...]:
    """Fill in what all sites of a denoiser share."""
    return tuple(
        replace(site, heads=site.heads or heads, head_dim=site.head_dim or head_dim, grid=site.grid or grid)
        for site in sites
    )


def _unet_block(name: str, layer: int, **more: Any) -> tuple[Site, Site]:
    block = f"{name}.transformer_blocks.{more.pop('inner', 0)}"
    return Site(f"{block}.attn1", "self", layer, **more), Site(f"{block}.attn2", "cross", layer, **more)


_HIGH: dict[str, Any] = {"grid": (1, 16, 24), "head_dim": 4}
_LOW: dict[str, Any] = {"grid": (1, 8, 12), "head_dim": 8}

# The UNet's forward runs down, mid, up; it registers down, up, mid (models/unets/unet_2d_condition.py). So the order of
# named_modules() is not the order of execution. Transformer2DModel flattens (B,C,h,w) row by row.
# attention_head_dim=2 is the number of heads in SD1.5 and SDXL.
_SD15 = _sites(
    2,
    8,
    (1, 8, 12),
    *_unet_block("down_blocks.0.attentions.0", 0, **_HIGH),
    *_unet_block("down_blocks.1.attentions.0", 1, **_LOW),
    *_unet_block("mid_block.attentions.0", 2, **_LOW),
    *_unet_block("up_blocks.0.attentions.0", 3, **_LOW),
    *_unet_block("up_blocks.0.attentions.1", 4, **_LOW),
    *_unet_block("up_blocks.1.attentions.0", 5, **_HIGH),
    *_unet_block("up_blocks.1.attentions.1", 6, **_HIGH),
)
_SDXL = _sites(
    4,
    4,
    (1, 8, 12),
    *_unet_block("down_blocks.1.attentions.0", 0, inner=0),
    *_unet_block("down_blocks.1.attentions.0", 1, inner=1),
    *_unet_block("mid_block.attentions.0", 2, inner=0),
    *_unet_block("mid_block.attentions.0", 3, inner=1),
    *_unet_block("up_blocks.0.attentions.0", 4, inner=0),
    *_unet_block("up_blocks.0.attentions.0", 5, inner=1),
    *_unet_block("up_blocks.0.attentions.1", 6, inner=0),
    *_unet_block("up_blocks.0.attentions.1", 7, inner=1),
)
# JointAttnProcessor2_0 appends the text; the dual layers' attn2 runs after attn, on the image alone.
_SD3 = _sites(
    4,
    8,
    (1, 8, 12),
    Site("transformer_blocks.0.attn", "joint", 0, text="last"),
    Site("transformer_blocks.1.attn", "joint", 1, text="last"),
)
_SD35 = _sites(
    4,
    8,
    (1, 8, 12),
    Site("transformer_blocks.0.attn", "joint", 0, text="last"),
    Site("transformer_blocks.0.attn2", "self", 0),
    Site("transformer_blocks.1.attn", "joint", 1, text="last"),
)
# Double blocks first, then single blocks; both put the text in front (transformer_flux.py).
_FLUX = _sites(
    2,
    16,
    (1, 8, 12),
    Site("transformer_blocks.0.attn", "joint", 0, "dispatch", text="first"),
    Site("transformer_blocks.1.attn", "joint", 1, "dispatch", text="first"),
    Site("single_transformer_blocks.0.attn", "joint", 2, "dispatch", text="first"),
    Site("single_transformer_blocks.1.attn", "joint", 3, "dispatch", text="first"),
)
_PIXART = _sites(
    3,
    8,
    (1, 8, 12),
    Site("transformer_blocks.0.attn1", "self", 0),
    Site("transformer_blocks.0.attn2", "cross", 0, mask="additive"),
    Site("transformer_blocks.1.attn1", "self", 1),
    Site("transformer_blocks.1.attn2", "cross", 1, mask="additive"),
)
# attn1 is SanaLinearAttnProcessor2_0: two matrix products, no softmax, no attention op.
_SANA = _sites(
    2,
    4,
    (1, 16, 32),
    Site("transformer_blocks.0.attn1", "linear", 0, ops=0),
    Site("transformer_blocks.0.attn2", "cross", 0, mask="additive"),
    Site("transformer_blocks.1.attn1", "linear", 1, ops=0),
    Site("transformer_blocks.1.attn2", "cross", 1, mask="additive"),
)
# CogVideoXAttnProcessor2_0 concatenates [text, video] before the shared projections; the name is attn1 all the same.
_COGVIDEOX = _sites(
    2,
    16,
    (3, 2, 3),
    Site("transformer_blocks.0.attn1", "joint", 0, text="first"),
    Site("transformer_blocks.1.attn1", "joint", 1, text="first"),
)
# [video, text]; a key mask always, with the text padding at the very end. Text runs through the refiner first.
_HUNYUAN = _sites(
    2,
    12,
    (3, 2, 3),
    Site("context_embedder.token_refiner.refiner_blocks.0.attn", "refiner", None, mask="bool"),
    Site("transformer_blocks.0.attn", "joint", 0, "dispatch", text="last", mask="bool_key"),
    Site("single_transformer_blocks.0.attn", "joint", 1, "dispatch", text="last", mask="bool_key"),
)
# The text is padded to its full length with zeros and attended to without a mask (pipeline_wan.py).
_WAN = _sites(
    2,
    12,
    (3, 2, 3),
    Site("blocks.0.attn1", "self", 0, "dispatch"),
    Site("blocks.0.attn2", "cross", 0, "dispatch"),
    Site("blocks.1.attn1", "self", 1, "dispatch"),
    Site("blocks.1.attn2", "cross", 1, "dispatch"),
)
_LTX = _sites(
    4,
    8,
    (3, 8, 16),
    Site("transformer_blocks.0.attn1", "self", 0, "dispatch"),
    Site("transformer_blocks.0.attn2", "cross", 0, "dispatch", mask="additive"),
    Site("transformer_blocks.1.attn1", "self", 1, "dispatch"),
    Site("transformer_blocks.1.attn2", "cross", 1, "dispatch", mask="additive"),
)
# One op for each batch element, of its own length: padding is cut off, so the uncond branch comes first and is shorter.
_MOCHI = _sites(
    2,
    8,
    (2, 2, 3),
    Site("transformer_blocks.0.attn1", "joint", 0, text="last", ops=2),
    Site("transformer_blocks.1.attn1", "joint", 1, text="last", ops=2),
)
_QWENIMAGE = _sites(
    3,
    16,
    (1, 4, 6),
    Site("transformer_blocks.0.attn", "joint", 0, "dispatch", text="first"),
    Site("transformer_blocks.1.attn", "joint", 1, "dispatch", text="first"),
)

_UNET: dict[str, Any] = {"text": (77, 77), "words": (77, 77), "denoiser_of_step": ("unet", "unet")}
# Character tokens: 13 or 5 with the leading spaces, and the end token of T5. No end token for Llama's tokenizer.
_T5: dict[str, Any] = {"text": (16, 16), "words": (14, 6)}
_UNMASKED: dict[str, Any] = {"text": (16, 16), "words": (16, 16)}
_BOTH: dict[str, Any] = {"contexts": ("cond_uncond",), "contexts_of": {"no_cfg": ("cond_uncond",)}}
_TWO_CALLS: dict[str, Any] = {
    "cfg": "two_calls",
    "contexts": ("cond", "uncond"),
    "contexts_of": {"no_cfg": ("cond",)},
}
_EMBEDDED: dict[str, Any] = {
    "cfg": "one_call",
    "cfg_of": {"true_cfg": "two_calls"},
    "contexts": ("cond",),
    "contexts_of": {"true_cfg": ("cond", "uncond")},
}

PIPELINES: dict[str, Facts] = {
    "sd15": Facts(_SD15, **_UNET, step_index=False),
    "sdxl": Facts(_SDXL, **_UNET),
    # 77 CLIP tokens, then 16 of T5
    "sd3": Facts(_SD3, text=(93, 93), words=(93, 93)),
    "sd35": Facts(_SD35, text=(93, 93), words=(93, 93)),
    "flux": Facts(_FLUX, **_UNMASKED, **_EMBEDDED, timestep="t/1000"),
    "pixart": Facts(_PIXART, **_T5),
    "sana": Facts(_SANA, text=(16, 16), words=(13, 5)),
    "cogvideox": Facts(_COGVIDEOX, **_UNMASKED, **_BOTH, step_index=False),
    "cogvideox2b": Facts(_COGVIDEOX, **_UNMASKED, **_BOTH, step_index=False),
    "hunyuan": Facts(_HUNYUAN, text=(16, 16), words=(13, 5), **_EMBEDDED),
    "wan21": Facts(_WAN, **_UNMASKED, **_TWO_CALLS),
    "wan22": Facts(_WAN, **_UNMASKED, **_TWO_CALLS, denoiser_of_step=("transformer", "transformer_2")),
    "ltx": Facts(_LTX, **_T5, **_BOTH),
    # The caption pooler (MochiAttentionPool, no attention class) calls the op too, one query a caption.
    "mochi": Facts(_MOCHI, text=(14, 6), words=(14, 6), **_BOTH, others=(("time_embed.pooler", 1),)),
    # The template's last 128 tokens (the pipeline drops its first 34), and one token a byte of the prompt: 12 or 4.
    "qwenimage": Facts(_QWENIMAGE, text=(140, 132), words=(140, 132), **_TWO_CALLS, timestep="t/1000"),
}


@dataclass(frozen=True)
class ModelFacts:
    """One transformers model. Heads are the query's; ``kv_heads`` are fewer where heads share keys and values."""

    sites: tuple[Site, ...]
    kv_heads: int
    causal: bool = True
    windows: tuple[int | None, ...] = (None, None)  # sliding window of each language layer


def _layers(pattern: str, *, heads: int = 4, mask: str = "bool", ops: tuple[int, int] = (1, 1)) -> tuple[Site, ...]:
    return tuple(
        Site(pattern.format(layer), "self", layer, mask=mask, ops=ops[layer], heads=heads, head_dim=8)
        for layer in range(2)
    )


_LM = _layers("model.layers.{}.self_attn")
_VLM = _layers("model.language_model.layers.{}.self_attn")

MODELS: dict[str, ModelFacts] = {
    "llama": ModelFacts(_LM, 2),
    "mistral": ModelFacts(_LM, 2, windows=(8, 8)),
    "qwen2": ModelFacts(_LM, 2),
    "qwen3": ModelFacts(_LM, 2),
    "bitnet": ModelFacts(_LM, 2),
    "gemma3": ModelFacts(_LM, 2, windows=(8, None)),
    "gpt2": ModelFacts(_layers("transformer.h.{}.attn"), 4),
    "bert": ModelFacts(_layers("encoder.layer.{}.attention.self"), 4, causal=False),
    "vit": ModelFacts(_layers("layers.{}.attention", mask="none"), 4, causal=False),
    "llava": ModelFacts(_layers("model.vision_tower.encoder.layers.{}.self_attn", mask="none") + _VLM, 2),
    # The vision tower calls the op once a picture (two here). 2.5 once a window in the windowed first block: pictures
    # of 4x4 and 4x6 patches give windows of 16, 16 and 8.
    "qwen2vl": ModelFacts(_layers("model.visual.blocks.{}.attn", mask="none", ops=(2, 2)) + _VLM, 2),
    "qwen25vl": ModelFacts(_layers("model.visual.blocks.{}.attn", mask="none", ops=(3, 2)) + _VLM, 2),
}
