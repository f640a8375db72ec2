"""Put zoo/vlm together: ``python -m patchkit.zoo.training.vlm_assemble --run DIR --out DIR``.

Writes model and processor in transformers' layout, weights in fp16, with a picture to try it on. A training that still
runs may be assembled, too: its last checkpoint is taken.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from patchkit import media
from patchkit.zoo import stills
from patchkit.zoo.chat import VisionLanguage, chat_processor
from patchkit.zoo.training.assemble import replacing_folder
from patchkit.zoo.training.vlm_model import build_model

logger = logging.getLogger(__name__)

EXAMPLE = stills.Still(  # a pair that no training picture shows
    stills.Description.parse("a green circle left of an orange square on a black background"),
    ((17.0, 30.0, 11.0), (48.0, 34.0, 11.0)),
)


def assemble(run: Path | None, weights: str = "average") -> VisionLanguage:
    """The model from a training folder, or an untrained one, with its processor.

    Args:
        run: output folder of :mod:`patchkit.zoo.training.vlm`.
        weights: ``"average"``, or ``"model"`` for the weights of the last step.
    """
    model = build_model()
    if run is not None:
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        model.load_state_dict(
            {k.removeprefix("llava."): w for k, w in state[weights].items() if k.startswith("llava.")}
        )
        logger.info("model of step %d", state["step"])
    return VisionLanguage(model.eval(), chat_processor())


def save(pair: VisionLanguage, out: Path) -> int:
    """Write model, processor and an example to ``out``; returns the bytes."""

    def write(folder: Path) -> None:
        model: Any = pair.model
        model.to(torch.float16).save_pretrained(folder)
        pair.processor.save_pretrained(folder)
        media.save_image(stills.render([EXAMPLE])[0], folder / "example.png", scale=1)

    return replacing_folder(out, write)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of patchkit.zoo.training.vlm")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = save(assemble(args.run), args.out)
    logger.info("%s: %.2f MB", args.out, size / 1e6)


if __name__ == "__main__":
    main()
