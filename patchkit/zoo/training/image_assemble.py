"""Put zoo/image together: ``python -m patchkit.zoo.training.image_assemble --denoiser DIR --vae DIR --out DIR``.

Writes a model folder in diffusers' layout, weights in fp16. A training that still runs may be assembled, too: its last
checkpoint is taken.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchkit.zoo.text import clip_tokenizer
from patchkit.zoo.training.assemble import save
from patchkit.zoo.training.image import SCHEDULER, build_models
from patchkit.zoo.training.image_vae import build_vae, load_vae

logger = logging.getLogger(__name__)


def assemble(denoiser_dir: Path | None, vae_dir: Path | None, weights: str = "average") -> Any:
    """The pipeline from two training folders; without a folder that part stays untrained.

    Args:
        denoiser_dir: output folder of :mod:`patchkit.zoo.training.image`.
        vae_dir: output folder of :mod:`patchkit.zoo.training.image_vae`.
        weights: ``"average"``, or ``"model"`` for the weights of the last step.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, text = build_models()
    if denoiser_dir is not None:
        state = torch.load(denoiser_dir / "checkpoint.pt", weights_only=True)
        nn.ModuleDict({"unet": unet, "text": text}).load_state_dict(state[weights])
        logger.info("denoiser of step %d", state["step"])
    vae = build_vae() if vae_dir is None else load_vae(vae_dir)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--denoiser", type=Path, required=True, help="output folder of patchkit.zoo.training.image")
    parser.add_argument("--vae", type=Path, required=True, help="output folder of patchkit.zoo.training.image_vae")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(args.denoiser, args.vae), args.out)
    logger.info("%s: %.2f MB", args.out, size / 1e6)


if __name__ == "__main__":
    main()
