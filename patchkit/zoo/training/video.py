"""Train the denoiser and the text encoder of ``zoo/video``: ``python -m patchkit.zoo.training.video --out DIR``.

What makes two CPU cores enough:

* the latents are the 4x4 area mean of the picture, so they need no encoder and stay spatially meaningful;
* a clip is nearly a function of its caption and the time, so most steps train on a few random frames of it, and the
  whole clip is only needed at the end, to make the frames agree on what the caption leaves open;
* Muon on the matrices.

The run is cut into stages of fixed length, checkpoints every few minutes, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import world
from patchkit.zoo.text import MAX_TOKENS, t5_tokenizer
from patchkit.zoo.training.muon import Muon

logger = logging.getLogger(__name__)

LATENT_SCALE = 1.25  # gives the latents about unit variance
LATENT_SIZE = world.SIZE // 4


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on batches of ``batch`` clips, ``frames`` random frames of each."""

    steps: int
    batch: int
    frames: int


STAGES = (Stage(1150, 32, 1), Stage(1000, 16, 4), Stage(300, 8, world.FRAMES))


def build_models(seed: int = 0) -> tuple[Any, Any]:
    """The untrained ``CogVideoXTransformer3DModel`` and ``T5EncoderModel`` of zoo/video."""
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    denoiser: Any = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=6,
        sample_width=LATENT_SIZE,
        sample_height=LATENT_SIZE,
        sample_frames=world.FRAMES,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=MAX_TOKENS,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    for block in denoiser.transformer_blocks:
        for norm in (block.norm1, block.norm2):  # start with open, unconditional gates
            nn.init.normal_(norm.linear.weight, std=0.02)
            nn.init.zeros_(norm.linear.bias)
            _, _, gate, _, _, text_gate = norm.linear.bias.data.chunk(6)
            gate.fill_(0.5)
            text_gate.fill_(0.5)
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return denoiser, T5EncoderModel(config)


def latents(scenes: list[world.Scene], times: Tensor) -> Tensor:
    """The (B, F, 3, 16, 16) latents of ``scenes``: area means of the picture, in about unit variance."""
    pixels = world.render(scenes, times)
    return (F.avg_pool2d(pixels.flatten(0, 1), 4).unflatten(0, pixels.shape[:2]) * 2 - 1) * LATENT_SCALE


def noise_levels() -> Tensor:
    """alpha_bar of the 1,000 training steps; the pipeline's scheduler is built with the same values."""
    from diffusers import CogVideoXDDIMScheduler

    scheduler: Any = CogVideoXDDIMScheduler(**SCHEDULER)
    return scheduler.alphas_cumprod.float()


SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def rotary_table(denoiser: Any) -> tuple[Tensor, Tensor] | None:
    """What ``CogVideoXPipeline`` hands the denoiser as ``image_rotary_emb`` for a whole clip."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if not denoiser.config.use_rotary_positional_embeddings:
        return None
    grid = (LATENT_SIZE // 2, LATENT_SIZE // 2)
    cos, sin = get_3d_rotary_pos_embed(denoiser.config.attention_head_dim, ((0, 0), grid), grid, world.FRAMES)
    return cos, sin


class FrameSubset:
    """Lets the denoiser see some frames of a clip at their true places in time (its position table is swapped)."""

    def __init__(self, denoiser: Any) -> None:
        self.patch_embed: Any = denoiser.patch_embed
        self.full: Tensor = self.patch_embed.pos_embedding
        self.rotary = rotary_table(denoiser)

    def select(self, frames: Tensor) -> tuple[Tensor, Tensor] | None:
        text, video = self.full[:, :MAX_TOKENS], self.full[:, MAX_TOKENS:]
        chosen = video.unflatten(1, (world.FRAMES, -1))[:, frames].flatten(1, 2)
        self.patch_embed.pos_embedding = torch.cat([text, chosen], dim=1)
        self.patch_embed.sample_frames = len(frames)
        if self.rotary is None:
            return None
        cos, sin = (table.unflatten(0, (world.FRAMES, -1))[frames].flatten(0, 1) for table in self.rotary)
        return cos, sin

    def restore(self) -> None:
        self.patch_embed.pos_embedding = self.full
        self.patch_embed.sample_frames = world.FRAMES


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> None:
        self.out, self.stages, self.lr, self.seed = out, stages, lr, seed
        self.total = sum(s.steps for s in stages)
        self.denoiser, self.text = build_models(seed)
        self.model = nn.ModuleDict({"denoiser": self.denoiser, "text": self.text})
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        inner = self.denoiser.transformer_blocks.named_parameters()
        matrices = [p for name, p in inner if p.ndim == 2 and "norm" not in name]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_lrs = [lr, lr / 10]
        self.step = 0
        self.seconds = 0.0
        self.tokenizer = t5_tokenizer()
        self.alphas = noise_levels()
        self.subset = FrameSubset(self.denoiser)

    def checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.out / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.out / "checkpoint.pt")

    def resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for o, s in zip(self.optimisers, state["optimisers"], strict=True):
                o.load_state_dict(s)
            self.step, self.seconds = state["step"], state["seconds"]
            logger.info("resumed at step %d", self.step)

    def stage(self) -> Stage:
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise StopIteration

    def rate(self) -> float:
        """Warm up over 100 steps, hold, and fall linearly to 2 % over the second half."""
        warm = min(1.0, (self.step + 1) / 100)
        left = (self.total - self.step) / self.total
        return warm * max(0.02, min(1.0, left / 0.5))

    def train_step(self) -> float:
        stage = self.stage()
        rng = random.Random(f"{self.seed}/{self.step}")  # a resumed run draws what the unbroken one would have drawn
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        scenes = [world.sample_scene(rng) for _ in range(stage.batch)]
        captions = ["" if rng.random() < 0.1 else s.caption for s in scenes]
        frames = torch.tensor(sorted(rng.sample(range(world.FRAMES), stage.frames)))
        clean = latents(scenes, frames / (world.FRAMES - 1))
        ids = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        # stratified noise levels: every batch covers the whole range
        t = ((torch.arange(stage.batch) + torch.rand(stage.batch)) / stage.batch * len(self.alphas)).long()
        alpha = self.alphas[t].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        for optimiser, lr in zip(self.optimisers, self.base_lrs, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * self.rate()
            optimiser.zero_grad(set_to_none=True)
        rotary = self.subset.select(frames)
        embeds = self.text(ids).last_hidden_state
        loss = F.mse_loss(self.denoiser(noisy, embeds, t, image_rotary_emb=rotary, return_dict=False)[0], target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.subset.restore()
        decay = min(0.995, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        self.step += 1
        return loss.item()

    def fit(self) -> None:
        recent: list[float] = []
        saved = logged = time.time()
        while self.step < self.total:
            begun = time.time()
            recent.append(self.train_step())
            self.seconds += time.time() - begun
            if self.step % 20 == 0 or self.step == self.total:
                row = {
                    "step": self.step,
                    "loss": round(sum(recent) / len(recent), 5),
                    "frames": self.stage().frames if self.step < self.total else world.FRAMES,
                    "lr": round(self.lr * self.rate(), 6),
                    "seconds": round(self.seconds, 1),
                }
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                if time.time() - logged > 30:
                    logger.info("%s", row)
                    logged = time.time()
                recent = []
            if time.time() - saved > 120:
                self.checkpoint()
                saved = time.time()
        self.checkpoint()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(f"{s.steps}x{s.batch}x{s.frames}" for s in STAGES))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = tuple(Stage(*map(int, part.split("x"))) for part in args.stages.split(","))
    run = Run(args.out, stages, args.lr, args.seed)
    run.resume()
    run.fit()


if __name__ == "__main__":
    main()
