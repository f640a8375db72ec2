"""Put zoo/dit or zoo/flux together: ``python -m patchkit.zoo.training.flow_assemble dit|flux --denoiser DIR ...``.

Writes a model folder in diffusers' layout, weights in fp16. A training that still runs may be assembled, too: its last
checkpoint is taken. The decoder is that of ``zoo/image``, whose latents are the same.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from patchkit.zoo.text import clip_tokenizer, t5_tokenizer
from patchkit.zoo.training import dit, flux
from patchkit.zoo.training.assemble import save
from patchkit.zoo.training.flow import SCHEDULER, TEXT_TOKENS
from patchkit.zoo.training.image_vae import build_vae, load_vae

logger = logging.getLogger(__name__)

MODELS: dict[str, Any] = {"dit": dit, "flux": flux}
PIPELINES = {"dit": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}


def assemble(name: str, denoiser_dir: Path | None, vae_dir: Path | None, weights: str = "average") -> Any:
    """The pipeline from two training folders; without a folder that part stays untrained.

    Args:
        name: ``"dit"`` or ``"flux"``.
        denoiser_dir: output folder of :mod:`patchkit.zoo.training.dit` or ``flux``.
        vae_dir: output folder of :mod:`patchkit.zoo.training.image_vae`.
        weights: ``"average"``, or ``"model"`` for the weights of the last step.
    """
    import diffusers

    parts = MODELS[name].build_models()
    if denoiser_dir is not None:
        state = torch.load(denoiser_dir / "checkpoint.pt", weights_only=True)
        parts.load_state_dict(state[weights])
        logger.info("denoiser of step %d", state["step"])
    vae = build_vae() if vae_dir is None else load_vae(vae_dir)
    tokenizers = [clip_tokenizer(TEXT_TOKENS), clip_tokenizer(TEXT_TOKENS), t5_tokenizer(TEXT_TOKENS)]
    if name == "flux":
        del tokenizers[1]
    return getattr(diffusers, PIPELINES[name])(
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        **dict(zip(("tokenizer", "tokenizer_2", "tokenizer_3"), tokenizers, strict=False)),
        **parts.eval(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--denoiser", type=Path, required=True, help="output folder of the model's training")
    parser.add_argument("--vae", type=Path, required=True, help="output folder of patchkit.zoo.training.image_vae")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(args.name, args.denoiser, args.vae), args.out)
    logger.info("%s: %.2f MB", args.out, size / 1e6)


if __name__ == "__main__":
    main()
