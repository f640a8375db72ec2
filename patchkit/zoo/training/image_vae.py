"""Build and train the VAE of ``zoo/image``: ``python -m patchkit.zoo.training.image_vae --out DIR``.

The encoder is written down, not learned: it computes the 4x4 area mean of the picture, so the denoiser's training
needs no encoder and every latent is a place. The decoder is learned on such latents. It must reproduce the grain,
which carries the noise of an inverted picture; so noise is added to its inputs at outlines only, where it teaches clean
edges.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.metrics import psnr
from patchkit.zoo import stills
from patchkit.zoo.detect_stills import score
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.stills_run import LATENT_SCALE, latents
from patchkit.zoo.world import SIZE

logger = logging.getLogger(__name__)

CHANNELS = (16, 32, 32)
STEADY = 30.0  # constant channels that keep the group statistics of the written encoder (nearly) constant


def build_vae(seed: int = 0) -> Any:
    """``AutoencoderKL`` with the written encoder and an untrained decoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CHANNELS,
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=LATENT_SCALE,
        shift_factor=0.0,  # the pipelines of flow-matching models ask for it
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
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
    for c in range(3):
        encoder.conv_in.weight[4 * c, c, 1, 1] = 1.0
        encoder.conv_in.weight[4 * c + 1, c, 1, 1] = -1.0
        encoder.conv_in.bias[4 * c + 2], encoder.conv_in.bias[4 * c + 3] = STEADY, -STEADY
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                nn.init.eye_(resnet.conv_shortcut.weight[:, :, 0, 0])
        for down in block.downsamplers or ():
            for c in range(12):
                down.conv.weight[c, c, :2, :2] = 0.25
    encoder.conv_norm_out.weight.fill_(1.0)
    for c in range(3):
        # the norm's divisor is the root mean square of a group: that of the constants, and of pixels of size 0.7
        divisor = ((STEADY**2 + 0.5) / 2) ** 0.5
        encoder.conv_out.weight[c, 4 * c, 1, 1] = divisor
        encoder.conv_out.weight[c, 4 * c + 1, 1, 1] = -divisor
    encoder.conv_out.bias[3:] = -30.0  # log variance: the posterior is its mean


def roughen(clean: Tensor, strength: Tensor) -> Tensor:
    """Latents (unscaled) as a denoiser might draw them: the grain as it is, noise where the picture has an outline."""
    spread = F.max_pool2d(clean, 3, 1, 1) + F.max_pool2d(-clean, 3, 1, 1)
    edge = (spread.amax(dim=1, keepdim=True) - 0.4).clamp(0, 1)  # the grain alone spreads by about 0.2
    return clean + strength * edge * torch.randn_like(clean)


class Run(Loop):
    """Trains the decoder alone."""

    name = "image-vae"

    def __init__(self, out: Path, steps: int, batch: int, lr: float, seed: int, noise: float) -> None:
        self.size, self.noise = batch, noise
        decoder = build_vae(seed).decoder
        optimiser = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        super().__init__(out, decoder, [optimiser], steps, seed, decay=0.99, fall=0.6, warm=50)

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        wanted = [stills.sample_description(rng) for _ in range(self.size)]
        target = stills.render([stills.draw(w, rng) for w in wanted]) * 2 - 1
        clean = F.avg_pool2d(target, stills.CELL)
        error = self.model(roughen(clean, torch.rand(self.size, 1, 1, 1) * self.noise)) - target
        return error.square().mean() + 0.1 * error.abs().mean(), self.size


def load_vae(out: Path) -> Any:
    """The VAE of a training folder, with the averaged decoder."""
    vae = build_vae()
    vae.decoder.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["average"])
    return vae.eval()


@torch.no_grad()
def evaluate(vae: Any, pictures: int = 100, noise: float = 0.0, seed: int = 99) -> dict[str, float]:
    """Encoder error, PSNR and detector scores of renders through the class's own encode and decode."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    wanted = [stills.draw(stills.sample_description(rng, held_out=("", "item", "scene")), rng) for _ in range(pictures)]
    sums: dict[str, float] = {}
    for still in wanted:
        picture = stills.render([still])
        code = vae.encode(picture * 2 - 1).latent_dist.mode() * LATENT_SCALE
        clean = latents(picture)
        rough = roughen(clean / LATENT_SCALE, torch.full((1, 1, 1, 1), noise))
        out = (vae.decode(rough).sample / 2 + 0.5).clamp(0, 1)
        row: dict[str, float] = {"psnr": psnr(out, picture), "encoder_error": (code - clean).abs().max().item()}
        row["all"] = score(out[0], still)["all"]
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + float(value) / pictures
    return {name: round(value, 4) for name, value in sums.items()} | {"pictures": pictures, "noise": noise}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.steps, args.batch, args.lr, args.seed, args.noise)
    run.resume()
    run.fit()
    results = [evaluate(load_vae(args.out), noise=noise) for noise in (0.0, 0.15)]
    (args.out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    logger.info("%s", results)


if __name__ == "__main__":
    main()
