"""Tiny models of the real classes, built offline from config with random weights.

``PIPELINES`` and ``MODELS`` map names to entries::

    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    latents = tiny.run(entry, pipe, seed=0)
    frames = tiny.run(entry, pipe, variant="decode", num_frames=5)

    entry = tiny.MODELS["qwen3"]
    logits = tiny.forward(entry, entry.build())

Equal seeds give equal bits. ``build(layers=8)`` makes a deeper one (not for the two UNets). ``entry.expected`` holds
what is true of it by upstream's source (``facts.py``); ``tiny.record`` watches which attention operations really run.
"""

from __future__ import annotations

from typing import Any

from . import images, models, videos
from .entries import NEGATIVE, PROMPT, TinyModel, TinyPipeline, forward, generate, run
from .facts import Facts, ModelFacts, Site
from .record import Op, record

__all__ = [
    "MODELS",
    "NEGATIVE",
    "PIPELINES",
    "PROMPT",
    "Facts",
    "ModelFacts",
    "Op",
    "Site",
    "TinyModel",
    "TinyPipeline",
    "forward",
    "generate",
    "record",
    "run",
]

# Height and width differ everywhere, so that a grid read the wrong way round shows.
_PICTURE: dict[str, Any] = {"prompt": PROMPT, "height": 32, "width": 48, "output_type": "latent"}
_GUIDED = dict(_PICTURE, negative_prompt=NEGATIVE, guidance_scale=5.0)
_VIDEO = dict(_GUIDED, num_frames=9)
_NO_CFG = {"no_cfg": {"guidance_scale": 1.0}}
_COMMON: dict[str, dict[str, Any]] = {
    "decode": {"output_type": "pt"},
    "batch": {"prompt": [PROMPT, "two cats"]},
}
_GUIDED_BATCH: dict[str, dict[str, Any]] = {
    "decode": {"output_type": "pt"},
    "batch": {"prompt": [PROMPT, "two cats"], "negative_prompt": [NEGATIVE, "noise"]},
}
_TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": NEGATIVE}
_T5 = {"max_sequence_length": 16}
_PLAIN_CAPTION = {"use_resolution_binning": False, "clean_caption": False}


def _pipeline(name: str, build: Any, call: dict[str, Any], **rest: Any) -> TinyPipeline:
    variants = rest.pop("variants", {**_GUIDED_BATCH, **_NO_CFG})
    return TinyPipeline(name, build, call, variants=variants, **rest)


PIPELINES: dict[str, TinyPipeline] = {
    entry.name: entry
    for entry in (
        _pipeline("sd15", images.sd15, dict(_GUIDED), denoisers=("unet",)),
        _pipeline("sdxl", images.sdxl, dict(_GUIDED), denoisers=("unet",)),
        _pipeline("sd3", images.sd3, dict(_GUIDED, **_T5)),
        _pipeline("sd35", images.sd35, dict(_GUIDED, **_T5)),
        # Flux and Hunyuan are guided by an embedded scale in one call; real CFG is their variant "true_cfg".
        _pipeline("flux", images.flux, dict(_PICTURE, **_T5), variants={**_COMMON, "true_cfg": _TRUE_CFG}),
        _pipeline("pixart", images.pixart, dict(_GUIDED, **_T5, **_PLAIN_CAPTION)),
        _pipeline(
            "sana",
            images.sana,
            dict(_GUIDED, **_T5, **_PLAIN_CAPTION, width=64, complex_human_instruction=None),
        ),
        _pipeline("cogvideox", videos.cogvideox, dict(_VIDEO, **_T5)),
        _pipeline("cogvideox2b", videos.cogvideox2b, dict(_VIDEO, **_T5)),
        _pipeline(
            "hunyuan",
            videos.hunyuan,
            dict(_PICTURE, **_T5, num_frames=9, prompt_template={"template": "{}", "crop_start": 0}),
            variants={**_COMMON, "true_cfg": _TRUE_CFG},
        ),
        _pipeline("wan21", videos.wan21, dict(_VIDEO, **_T5)),
        _pipeline("wan22", videos.wan22, dict(_VIDEO, **_T5), denoisers=("transformer", "transformer_2")),
        _pipeline("ltx", videos.ltx, dict(_VIDEO, **_T5, width=64)),
        _pipeline("mochi", videos.mochi, dict(_VIDEO, **_T5, num_frames=7)),
        _pipeline(
            "qwenimage",
            images.qwenimage,
            # Its fixed template alone is longer than 16 tokens: a shorter limit would cut the prompt off.
            dict(_PICTURE, **_TRUE_CFG, max_sequence_length=512),
            variants={**_GUIDED_BATCH, "no_cfg": {"true_cfg_scale": 1.0, "negative_prompt": None}},
        ),
    )
}

MODELS: dict[str, TinyModel] = {
    entry.name: entry
    for entry in (
        TinyModel("llama", models.llama, models.text_inputs),
        TinyModel("mistral", models.mistral, models.text_inputs),
        TinyModel("qwen2", models.qwen2, models.text_inputs),
        TinyModel("qwen3", models.qwen3, models.text_inputs),
        TinyModel("bitnet", models.bitnet, models.text_inputs),
        TinyModel("gemma3", models.gemma3, models.text_inputs),
        TinyModel("gpt2", models.gpt2, models.text_inputs),
        TinyModel("bert", models.bert, models.bert_inputs, causal=False),
        TinyModel("vit", models.vit, models.vit_inputs, causal=False),
        TinyModel("llava", models.llava, models.llava_inputs),
        TinyModel("qwen2vl", models.qwen2vl, models.qwen_vl_inputs),
        TinyModel("qwen25vl", models.qwen25vl, models.qwen_vl_inputs),
    )
}
