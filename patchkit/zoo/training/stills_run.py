"""What the training runs on still pictures share: stages, latents with captions, two optimisers, a command line.

The latents are 4x4 area means of the picture, so they need no encoder and every latent is a place.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.muon import Muon

LATENT_SCALE = 1.25  # gives the latents about unit variance
EMPTY = 0.1  # share of the captions that are dropped, for guidance and for inversion without words


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on batches of ``batch`` pictures, ``pairs`` per cent of them with two objects."""

    steps: int
    batch: int
    pairs: int


def latents(pictures: Tensor) -> Tensor:
    """The (B, 3, 16, 16) latents of (B, 3, 64, 64) pictures in [0, 1]: area means in about unit variance."""
    return (F.avg_pool2d(pictures, stills.CELL) * 2 - 1) * LATENT_SCALE


class StillsRun(Loop):
    """A run on stills in stages. A subclass overrides ``loss``.

    Args:
        out: as for :class:`Loop`.
        model: all that is trained.
        matrices: those of its weights that Muon trains; AdamW trains the others.
        stages: one after another; the last one stays.
        lr: Muon's; AdamW's is a tenth of it.
        seed: as for :class:`Loop`.
    """

    def __init__(
        self, out: Path, model: nn.Module, matrices: list[Any], stages: tuple[Stage, ...], lr: float, seed: int
    ) -> None:
        self.stages = stages
        taken = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in taken]
        optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        super().__init__(out, model, optimisers, sum(s.steps for s in stages), seed)

    def stage(self) -> Stage:
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def notes(self) -> dict[str, Any]:
        return {"pairs": self.stage().pairs}

    def samples_of_step(self, rng: random.Random, grain: float = stills.GRAIN) -> tuple[Tensor, list[str]]:
        """Clean latents and captions of this step, some captions dropped; ``grain`` is its strength."""
        stage = self.stage()
        wanted = [stills.sample_description(rng, stage.pairs / 100) for _ in range(stage.batch)]
        captions = ["" if rng.random() < EMPTY else w.caption for w in wanted]
        return latents(stills.render([stills.draw(w, rng) for w in wanted], grain)), captions


class RunClass(Protocol):
    """A subclass of :class:`StillsRun` as :func:`train` makes it."""

    def __call__(self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int) -> Loop: ...


def train(run_class: RunClass, stages: tuple[Stage, ...], about: str | None, argv: Sequence[str] | None) -> None:
    """Command line of a run: train to the end, or go on from the last checkpoint."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(f"{s.steps}x{s.batch}x{s.pairs}" for s in stages))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = tuple(Stage(*map(int, part.split("x"))) for part in args.stages.split(","))
    run = run_class(args.out, chosen, args.lr, args.seed)
    run.resume()
    run.fit()
