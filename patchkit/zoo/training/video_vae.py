"""Build and train the VAE of ``zoo/video``: ``python -m patchkit.zoo.training.video_vae --out DIR``.

The encoder is written down, not learned: it computes the 4x4 area mean of the picture exactly (to about 1e-3), so the
denoiser's training needs no encoder. The decoder is learned on such latents plus noise, which teaches it to give
slightly ragged generated latents a clean outline. It is trained frame by frame: every temporal kernel keeps its
newest tap only, and then the frames of the real, causal decoder are independent but for the group statistics.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.metrics import psnr
from patchkit.zoo import world
from patchkit.zoo.detect import score
from patchkit.zoo.training.video import LATENT_SCALE, latents

logger = logging.getLogger(__name__)

CHANNELS = (16, 32, 32)
STEADY = 30.0  # constant channels that keep the group statistics of the written encoder (nearly) constant


def build_vae(seed: int = 0) -> Any:
    """``AutoencoderKLCogVideoX`` with the written encoder and an untrained decoder."""
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(seed)
    vae: Any = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=CHANNELS,
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=1,
        sample_height=world.SIZE,
        sample_width=world.SIZE,
        scaling_factor=LATENT_SCALE,
    )
    write_encoder(vae.encoder)
    return vae


@torch.no_grad()
def write_encoder(encoder: Any) -> None:
    """Set ``encoder`` to the 4x4 area mean, one group of four channels (x, -x, +30, -30) for each of r, g and b.

    The residual branches add nothing and the strided convolutions average. The last norm divides all by a number that
    the constant channels fix, and ``silu(x) - silu(-x) = x`` undoes the activation exactly.
    """
    for parameter in encoder.parameters():
        parameter.zero_()
    first = encoder.conv_in.conv
    for c in range(3):
        first.weight[4 * c, c, -1, 1, 1] = 1.0
        first.weight[4 * c + 1, c, -1, 1, 1] = -1.0
        first.bias[4 * c + 2], first.bias[4 * c + 3] = STEADY, -STEADY
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if hasattr(resnet, "conv_shortcut"):
                nn.init.eye_(resnet.conv_shortcut.weight[:, :, 0, 0, 0])
        for down in block.downsamplers or ():
            for c in range(12):
                down.conv.weight[c, c, :2, :2] = 0.25
    encoder.norm_out.weight.fill_(1.0)
    for c in range(3):
        # the norm's divisor is the root mean square of a group: that of the constants, and of pixels of size 0.7
        divisor = ((STEADY**2 + 0.5) / 2) ** 0.5
        encoder.conv_out.conv.weight[c, 4 * c, -1, 1, 1] = divisor
        encoder.conv_out.conv.weight[c, 4 * c + 1, -1, 1, 1] = -divisor
    encoder.conv_out.conv.bias[3:] = -30.0  # log variance: the posterior is its mean


def newest_tap(module: Any) -> None:
    """Make the causal 3D convolutions of ``module`` use only the newest frame, and run as fast 2D convolutions."""

    def forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, None]:
        frames = inputs.transpose(1, 2)
        weight = self.conv.weight[:, :, -1]
        out = F.conv2d(frames.flatten(0, 1), weight, self.conv.bias, padding=weight.shape[-1] // 2)
        return out.unflatten(0, frames.shape[:2]).transpose(1, 2), None

    for child in module.modules():
        if type(child).__name__ == "CogVideoXCausalConv3d":
            child.forward = types.MethodType(forward, child)


@torch.no_grad()
def drop_older_taps(module: Any) -> None:
    """Zero the temporal taps that :func:`newest_tap` ignores, so that the class's own forward agrees with it."""
    for child in module.modules():
        if type(child).__name__ == "CogVideoXCausalConv3d" and child.conv.kernel_size[0] > 1:
            child.conv.weight[:, :, :-1] = 0


def roughen(clean: Tensor, strength: Tensor) -> Tensor:
    """Latents as a denoiser might draw them: noise everywhere, more of it where the picture has an outline."""
    spread = F.max_pool2d(clean, 3, 1, 1) + F.max_pool2d(-clean, 3, 1, 1)
    edge = spread.amax(dim=1, keepdim=True).clamp(0, 1)
    return clean + strength * (0.3 + 0.7 * edge) * torch.randn_like(clean)


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, out: Path, steps: int, batch: int, lr: float, seed: int, noise: float) -> None:
        self.out, self.steps, self.batch, self.lr, self.seed, self.noise = out, steps, batch, lr, seed, noise
        self.vae = build_vae(seed)
        self.decoder = self.vae.decoder
        newest_tap(self.decoder)
        self.average = copy.deepcopy(self.decoder).requires_grad_(False)
        newest_tap(self.average)
        self.optimiser = torch.optim.AdamW(self.decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0

    def checkpoint(self) -> None:
        state = {
            "model": self.decoder.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
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
            self.decoder.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.seconds = state["step"], state["seconds"]
            logger.info("resumed at step %d", self.step)

    def train_step(self) -> float:
        rng = random.Random(f"vae/{self.seed}/{self.step}")
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        scenes = [world.sample_scene(rng) for _ in range(self.batch)]
        # two frames next to each other, which is the chunk over which the real decoder takes its group statistics
        start = rng.randrange(world.FRAMES - 1)
        times = torch.tensor([start, start + 1]) / (world.FRAMES - 1)
        target = world.render(scenes, times).transpose(1, 2) * 2 - 1
        clean = F.avg_pool3d(target, (1, 4, 4))
        strength = torch.rand(self.batch, 1, 1, 1, 1) * self.noise
        rough = roughen(clean.transpose(1, 2).flatten(0, 1), strength.flatten(0, 1).repeat_interleave(2, 0))
        rate = self.lr * min(1.0, (self.step + 1) / 50) * max(0.02, min(1.0, (1 - self.step / self.steps) / 0.6))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        out, _ = self.decoder(rough.unflatten(0, (self.batch, 2)).transpose(1, 2))
        error = out - target
        loss = error.square().mean() + 0.1 * error.abs().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimiser.step()
        decay = min(0.99, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.decoder.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        self.step += 1
        return loss.item()

    def fit(self) -> None:
        recent: list[float] = []
        saved = time.time()
        while self.step < self.steps:
            begun = time.time()
            recent.append(self.train_step())
            self.seconds += time.time() - begun
            if self.step % 20 == 0 or self.step == self.steps:
                row = {"step": self.step, "loss": round(sum(recent) / len(recent), 5), "seconds": round(self.seconds)}
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                logger.info("%s", row)
                recent = []
            if time.time() - saved > 60:
                self.checkpoint()
                saved = time.time()
        self.checkpoint()


def load_vae(out: Path) -> Any:
    """The VAE of a training folder, with the averaged decoder."""
    vae = build_vae()
    vae.decoder.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["average"])
    drop_older_taps(vae)
    return vae.eval()


@torch.no_grad()
def evaluate(vae: Any, clips: int = 30, noise: float = 0.0, seed: int = 99) -> dict[str, float]:
    """Encoder error, PSNR and detector scores of whole clips through the class's own encode and decode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    scenes = [world.sample_scene(rng) for _ in range(clips)]
    times = torch.linspace(0, 1, world.FRAMES)
    sums: dict[str, float] = {}
    for scene in scenes:
        video = world.render([scene], times)
        code = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode() * LATENT_SCALE
        wanted = latents([scene], times)
        rough = roughen(wanted[0] / LATENT_SCALE, torch.full((1, 1, 1, 1), noise))[None]
        out = (vae.decode(rough.transpose(1, 2)).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
        row: dict[str, float] = {"psnr": psnr(out[0], video[0])}
        row["encoder_error"] = (code.transpose(1, 2) - wanted).abs().max().item()
        for name, value in (row | score(out[0], scene)).items():
            sums[name] = sums.get(name, 0.0) + float(value) / clips
    return {name: round(value, 4) for name, value in sums.items()} | {"clips": clips, "noise": noise}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.steps, args.batch, args.lr, args.seed, args.noise)
    run.resume()
    run.fit()
    vae = load_vae(args.out)
    results = [evaluate(vae, noise=noise) for noise in (0.0, 0.15)]
    (args.out / "evaluation.json").write_text(json.dumps(results, indent=1))
    logger.info("%s", results)


if __name__ == "__main__":
    main()
