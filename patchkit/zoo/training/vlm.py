"""Train the vision-language model of ``zoo/vlm``: ``python -m patchkit.zoo.training.vlm --out DIR``.

Projector and decoder learn from the tokens of the answers alone, with a tower that has learnt to see before
(:mod:`patchkit.zoo.training.vlm_tower`) and stays as it is, as LLaVA's does; without one, the tower learns with them.
All questions about a picture share one sequence, so the picture is read once: a mask keeps the questions from seeing
each other, and each has the positions that it would have alone. One picture in five is a conversation instead, in which
a question sees the turns before it.

Half-way through the decoder, the last word that speaks of an object ("the red *shape*") also has to tell that
object's shape, colour and place, by one linear layer that is thrown away. The answers alone did not teach which of two
objects is meant in 20,000 pictures: there, neither the word nor the picture says anything, only both together.

The run is cut into stages of fixed length, checkpoints every two minutes, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.questions import View, ask_about_two, sample_still
from patchkit.zoo.stills import reshape, tint
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.muon import Muon
from patchkit.zoo.training.vlm_model import WIDTH, build_model
from patchkit.zoo.training.vlm_rows import HINTS, Batch, Hints, Packer, choose, pixels
from patchkit.zoo.world import COLOURS

logger = logging.getLogger(__name__)

CONVERSATIONS = 0.2  # share of the pictures whose questions are turns of one conversation
# Shares of the pictures that teach shapes apart from colours, and colours apart from shapes; otherwise the decoder
# learns which of them never come together, and is wrong on just these.
TINTED = 0.2  # objects have any colours, and questions are about shapes and places
RESHAPED = 0.2  # objects have outlines without a name, and questions are about colours
PLAIN = 0.1  # share of the pictures that come without the system's sentence
HINTED = 3  # decoder layers below the states that have to tell what is spoken of
TWO_EVERY = 5  # of the stages with two pictures, one step in so many has them


@dataclass(frozen=True)
class Stage:
    """``steps`` optimiser steps on ``batch`` pictures, ``pairs`` per cent of them with two objects.

    ``two``: whether some steps show two pictures together.
    """

    steps: int
    batch: int
    pairs: int
    two: bool


STAGES = (Stage(250, 16, 40, False), Stage(1150, 16, 80, False), Stage(700, 16, 70, False))


def optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and projector, AdamW for the rest; nothing for what is frozen."""
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in learning if p.ndim == 2 and ("layers." in n or "projector" in n)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in learning if id(p) not in taken]
    return [Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0)]


class Run(Loop):
    """Everything that a checkpoint holds."""

    name = "vlm"

    def __init__(
        self, out: Path, stages: tuple[Stage, ...], lr: float, seed: int, tower: dict[str, Tensor] | None = None
    ) -> None:
        self.stages = stages
        self.packer = Packer()
        self.right: list[tuple[int, int]] = []  # answers that were all right, and all answers, of the last steps
        self.told: list[float] = []  # losses of the hints
        model = build_model(seed)
        if tower is not None:
            model.model.vision_tower.load_state_dict(tower)
            model.model.vision_tower.requires_grad_(False)
        both = nn.ModuleDict({"llava": model, "hint": nn.Linear(WIDTH, sum(HINTS))})
        super().__init__(out, both, optimisers(both, lr), sum(s.steps for s in stages), seed, decay=0.99, warm=40)

    def stage(self) -> Stage:
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def notes(self) -> dict[str, Any]:
        right, asked = (sum(column) for column in zip(*self.right, strict=True))
        told, self.right, self.told = sum(self.told) / len(self.told), [], []
        return {"right": round(right / asked, 4), "told": round(told, 4)}

    def batch(self, rng: random.Random) -> tuple[Tensor, Batch, Hints]:
        """Pixels, sequences, and what their words speak of."""
        stage = self.stage()
        shown = [sample_still(rng, pairs=stage.pairs / 100) for _ in range(stage.batch)]
        views = [View.of_still(s) for s in shown]
        rows = []
        if stage.two and self.step % TWO_EVERY == 0:
            for pair in zip(views[::2], views[1::2], strict=True):
                rows.append(self.packer.row(ask_about_two(pair, rng), 2, rng.random() < PLAIN))
        else:
            for n, still in enumerate(shown):
                kind = rng.random()
                if kind < TINTED + RESHAPED:
                    shown[n] = tint(still, rng) if kind < TINTED else reshape(still, rng)
                    views[n] = View.of_still(shown[n])
                questions = choose(views[n], shown[n], rng)
                rows.append(self.packer.row(questions, 1, rng.random() < PLAIN, rng.random() < CONVERSATIONS))
        batch = Batch.of(rows, self.packer.tokenizer.pad_token_id)
        batch.mishear(rows, [self.packer.ids(colour)[0] for colour in COLOURS], rng)
        return pixels(stills.render(shown)), batch, Hints.of(rows, views, shown)

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        pictures, batch, hints = self.batch(rng)
        found = self.model.get_submodule("llava")(
            input_ids=batch.ids,
            pixel_values=pictures,
            attention_mask=batch.mask,
            position_ids=batch.places,
            use_cache=False,
            output_hidden_states=True,
        )
        logits, states = found.logits, found.hidden_states[HINTED][hints.rows, hints.tokens]
        told = hints.loss(self.model.get_submodule("hint")(F.rms_norm(states, (WIDTH,))))
        self.told.append(told.item())
        wanted = batch.labels >= 0
        hit = (logits.argmax(dim=-1) == batch.labels) | ~wanted
        ends = batch.labels == self.packer.tokenizer.eos_token_id
        # answers are neighbours in the flat order, each closed by its end mark
        flat, closed = hit[wanted], ends[wanted].long().cumsum(0) - ends[wanted].long()
        misses = torch.zeros(int(ends.sum())).index_add_(0, closed, (~flat).float())
        self.right.append((int((misses == 0).sum()), len(misses)))
        # a caption has many tokens, yes and no are one: between a mean of tokens and a mean of answers
        weight = closed.bincount()[closed].float().rsqrt()
        each = F.cross_entropy(logits[wanted], batch.labels[wanted], reduction="none")
        return (each * weight).sum() / weight.sum() + told, len(pictures)


def trained_average(run: Path, prefix: str) -> dict[str, Tensor]:
    """The averaged weights of one part of what a training folder holds."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    logger.info("%s of step %d", prefix, state["step"])
    return {name.removeprefix(prefix): w for name, w in state["average"].items() if name.startswith(prefix)}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="output folder of patchkit.zoo.training.vlm_tower, to start from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(f"{s.steps}x{s.batch}x{s.pairs}x{int(s.two)}" for s in STAGES))
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [map(int, part.split("x")) for part in args.stages.split(",")]
    stages = tuple(Stage(steps, batch, pairs, bool(two)) for steps, batch, pairs, two in parts)
    run = Run(args.out, stages, args.lr, args.seed, args.tower and trained_average(args.tower, "tower."))
    run.resume()
    run.fit()


if __name__ == "__main__":
    main()
