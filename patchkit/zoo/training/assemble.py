"""Put zoo/video together: ``python -m patchkit.zoo.training.assemble --denoiser DIR --vae DIR``.

Writes the package's own model folder (or ``--out``) in diffusers' layout, weights in fp16.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchkit import zoo
from patchkit.zoo.text import t5_tokenizer
from patchkit.zoo.training.video import SCHEDULER, build_models
from patchkit.zoo.training.video_vae import build_vae, load_vae

logger = logging.getLogger(__name__)


def assemble(denoiser_dir: Path | None, vae_dir: Path | None) -> Any:
    """The pipeline from two training folders; without a folder that part stays untrained."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    denoiser, text = build_models()
    if denoiser_dir is not None:
        state = torch.load(denoiser_dir / "checkpoint.pt", weights_only=True)
        nn.ModuleDict({"denoiser": denoiser, "text": text}).load_state_dict(state["average"])
        logger.info("denoiser of step %d", state["step"])
    vae = build_vae() if vae_dir is None else load_vae(vae_dir)
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=text.eval(),
        vae=vae.eval(),
        transformer=denoiser.eval(),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    )


def save(pipe: Any, out: Path) -> int:
    """Write ``pipe`` to ``out`` in fp16, replacing what was there only when all is written; returns the bytes."""
    return replacing_folder(out, pipe.to(torch.float16).save_pretrained)


def replacing_folder(out: Path, write: Callable[[Path], Any]) -> int:
    """Let ``write`` fill a new folder that becomes ``out`` when all is written; returns the bytes."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".assemble-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        write(new)
        for file in new.rglob("*.safetensors"):
            file.chmod(0o644)  # they are written private, and a package is for all
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    return sum(f.stat().st_size for f in out.rglob("*") if f.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--denoiser", type=Path, required=True, help="output folder of patchkit.zoo.training.video")
    parser.add_argument("--vae", type=Path, required=True, help="output folder of patchkit.zoo.training.video_vae")
    parser.add_argument("--out", type=Path, default=zoo.path("video"))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(args.denoiser, args.vae), args.out)
    logger.info("%s: %.2f MB", args.out, size / 1e6)


if __name__ == "__main__":
    main()
