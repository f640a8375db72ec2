"""HunyuanVideo and Wan at their true sizes with random weights, for ``model_step.py``: classes, sizes, inputs."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to build: its class, configuration, the lists of its layers, and how to make inputs."""

    cls: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    lists: dict[str, str]  # attribute of the model -> entry of the configuration that counts its layers
    latents: tuple[int, ...]
    tiny_latents: tuple[int, ...]
    text: int

    def build(self, args: argparse.Namespace) -> tuple[Any, float]:
        """The model on its device, and how many times more layers the real one has."""
        import diffusers

        config = self.tiny if args.smoke else self.config
        dtype = torch.float32 if args.smoke else torch.bfloat16
        one = dict.fromkeys(self.lists.values(), 1)
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**config | one).to(args.device).eval().requires_grad_(False)
        exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # as from_pretrained would leave them
        for path, x in (*model.named_parameters(), *model.named_buffers()):
            if x.is_floating_point() and not exact & set(path.split(".")):
                x.data = x.data.to(dtype)
        made = wanted = 0
        for attribute, entry in self.lists.items():
            layers = getattr(model, attribute)
            count = max(1, round(config[entry] * args.layer_share))
            for _ in range(count - 1):
                kept = {} if args.own_weights else {id(x): x for x in (*layers[0].parameters(), *layers[0].buffers())}
                layers.append(copy.deepcopy(layers[0], kept))
            made, wanted = made + count, wanted + config[entry]
        return model, wanted / made

    def inputs(self, model: Any, args: argparse.Namespace) -> dict[str, Any]:
        """Everything but the timestep."""
        g = torch.Generator(args.device).manual_seed(0)
        dtype = torch.float32 if args.smoke else torch.bfloat16
        text = 16 if args.smoke else self.text

        def noise(*shape: int) -> Any:
            return torch.randn(*shape, generator=g, device=args.device, dtype=dtype)

        config = model.config
        found = {"hidden_states": noise(*(self.tiny_latents if args.smoke else self.latents))}
        if "text_embed_dim" in config:
            found |= {
                "encoder_hidden_states": noise(1, text, config.text_embed_dim),
                "encoder_attention_mask": torch.ones(1, text, device=args.device, dtype=torch.long),
                "pooled_projections": noise(1, config.pooled_projection_dim),
                "guidance": torch.full((1,), 6000.0, device=args.device, dtype=dtype),
            }
        else:
            found["encoder_hidden_states"] = noise(1, text, config.text_dim)
        return found


_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 64,
}
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LAYERS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
SUBJECTS = {
    # Latents (batch, channels, frames, height, width): 129 and 81 frames of 720p, 81 frames of 480p.
    "hunyuanvideo": Subject(
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 20, "num_single_layers": 40},
        _HUNYUAN,
        _LAYERS,
        (1, 16, 33, 90, 160),
        (1, 4, 4, 16, 16),
        256,
    ),
    "wan-14b": Subject(
        "WanTransformer3DModel",
        {"num_layers": 40},
        _WAN,
        {"blocks": "num_layers"},
        (1, 16, 21, 90, 160),
        (1, 4, 4, 16, 16),
        512,
    ),
    "wan-1.3b": Subject(
        "WanTransformer3DModel",
        _WAN_SMALL,
        _WAN,
        {"blocks": "num_layers"},
        (1, 16, 21, 60, 104),
        (1, 4, 4, 16, 16),
        512,
    ),
}
