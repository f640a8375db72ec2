"""Train the vision tower of ``zoo/vlm`` by itself first: ``python -m patchkit.zoo.training.vlm_tower --out DIR``.

Each patch learns to tell the shape and the colour of the object that it belongs to, by one linear layer that is thrown
away. Real LLaVA models start from a tower that has learnt to see, too. The answers of the language model say so little
about shapes, and each through so many layers, that shapes were still guessed after 9,000 pictures; here every picture
has some twenty patches that are told what they are. The objects have any colours, not only those with names: otherwise
the tower learns which pairs of shape and colour never occur, and is then wrong on just those that are held out. For the
same reason part of the objects have outlines without a name, in all the named colours, and are asked for these alone.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.chat import PATCH
from patchkit.zoo.questions import sample_still
from patchkit.zoo.stills import Still, reshape, tint
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.vlm import optimisers
from patchkit.zoo.training.vlm_model import WIDTH, build_model
from patchkit.zoo.training.vlm_rows import pixels
from patchkit.zoo.world import BACKGROUNDS, SHAPES, SIZE

logger = logging.getLogger(__name__)

PARTS = (len(SHAPES) + 1, 3)  # which shape a patch belongs to (the background last), and its colour
UNNAMED = 0.4  # share of the pictures whose objects have outlines without a name
UNTOLD = -100  # shape of a patch that is not to be told
AROUND = 2.0  # pixels beyond an object in which patches still count as its own


def labels(shown: Sequence[Still]) -> tuple[Tensor, Tensor]:
    """Of each patch the number of the shape it belongs to, (B, patches), and that object's colour, (B, patches, 3)."""
    middles = (torch.arange(SIZE // PATCH) + 0.5) * PATCH
    shape = torch.full((len(shown), len(middles), len(middles)), len(SHAPES))
    colour = torch.tensor([BACKGROUNDS[s.description.background] for s in shown])
    colour = colour[:, None, None].repeat(1, len(middles), len(middles), 1)
    for n, still in enumerate(shown):
        for item, paint, (x, y, radius) in zip(still.description.items, still.paints, still.spots, strict=True):
            rows, columns = ((middles - centre).abs() < radius + AROUND for centre in (y, x))
            near = rows[:, None] & columns[None, :]
            shape[n][near] = UNTOLD if still.lobes else SHAPES.index(item.shape)
            colour[n][near] = torch.tensor(paint)
    return shape.flatten(1), colour.flatten(1, 2)


class TowerRun(Loop):
    """Everything that a checkpoint holds."""

    name = "vlm tower"

    def __init__(self, out: Path, steps: int, batch: int, lr: float, seed: int) -> None:
        self.size = batch
        self.right: list[float] = []
        self.tower = build_model(seed).model.vision_tower
        model = nn.ModuleDict({"tower": self.tower, "head": nn.Linear(WIDTH, sum(PARTS))})
        super().__init__(out, model, optimisers(model, lr), steps, seed, decay=0.99, warm=40)

    def notes(self) -> dict[str, Any]:
        right, self.right = sum(self.right) / len(self.right), []
        return {"shape": round(right, 4)}

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        shown = [sample_still(rng, pairs=0.5) for _ in range(self.size)]
        shown = [reshape(s, rng) if rng.random() < UNNAMED else tint(s, rng) for s in shown]
        seen = self.tower(pixels(stills.render(shown))).last_hidden_state[:, 1:]
        told, colour = self.model.get_submodule("head")(seen).split(PARTS, dim=-1)
        shape, paint = labels(shown)
        objects = (shape >= 0) & (shape < len(SHAPES))
        hit = told[objects][:, : len(SHAPES)].argmax(dim=-1) == shape[objects]
        self.right.append(hit.float().mean().item())
        named = F.cross_entropy(told.flatten(0, 1), shape.flatten(), ignore_index=UNTOLD)
        return named + 30 * F.mse_loss(colour, paint), len(shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = TowerRun(args.out, args.steps, args.batch, args.lr, args.seed)
    run.resume()
    run.fit()


if __name__ == "__main__":
    main()
