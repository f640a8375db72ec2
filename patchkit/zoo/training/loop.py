"""What every training run of the zoo shares: steps, checkpoints, an average of the weights, a log.

A run is stopped and continued at any step without a trace: all chance in a step comes from the seed and the number of
the step, and a checkpoint holds all the rest.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Loop:
    """``total`` optimiser steps on ``model``. A subclass overrides :meth:`loss`.

    Args:
        out: folder of ``checkpoint.pt`` and ``log.jsonl``.
        model: what is trained.
        optimisers: each with the learning rate at which it was made as its highest.
        total: steps of the whole run.
        seed: of all that is drawn.
        decay: of the average of weights, per step.
        fall: share of the run, at its end, over which the learning rates fall linearly to 2 %.
        warm: steps over which they rise first.
    """

    name = "loop"  # goes into the seeds, so that two kinds of run draw different samples

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimisers: list[torch.optim.Optimizer],
        total: int,
        seed: int,
        decay: float = 0.998,
        fall: float = 0.5,
        warm: int = 100,
    ) -> None:
        self.out, self.model, self.optimisers = out, model, optimisers
        self.total, self.seed, self.decay, self.fall, self.warm = total, seed, decay, fall, warm
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.highest = [[group["lr"] for group in o.param_groups] for o in optimisers]
        self.step, self.seconds, self.samples = 0, 0.0, 0

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        """The loss of this step's batch, and the number of its samples."""
        raise NotImplementedError

    def notes(self) -> dict[str, Any]:
        """What else a row of the log says."""
        return {}

    def rate(self) -> float:
        """Share of the highest learning rate: a warm-up, a plateau, a linear fall."""
        left = (self.total - self.step) / self.total
        return min(1.0, (self.step + 1) / self.warm) * max(0.02, min(1.0, left / self.fall))

    def train_step(self) -> float:
        rng = random.Random(f"{self.name}/{self.seed}/{self.step}")
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        for optimiser, highest in zip(self.optimisers, self.highest, strict=True):
            for group, lr in zip(optimiser.param_groups, highest, strict=True):
                group["lr"] = lr * self.rate()
            optimiser.zero_grad(set_to_none=True)
        loss, samples = self.loss(rng)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = min(self.decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        self.step += 1
        self.samples += samples
        return loss.item()

    def fit(self, log_every: int = 20, save_every: float = 120.0) -> None:
        """Train to the end; ``log_every`` is in steps, ``save_every`` in seconds."""
        recent: list[float] = []
        saved = time.time()
        while self.step < self.total:
            begun = time.time()
            recent.append(self.train_step())
            self.seconds += time.time() - begun
            if self.step % log_every == 0 or self.step == self.total:
                row = {
                    "step": self.step,
                    "loss": round(sum(recent) / len(recent), 5),
                    "rate": round(self.rate(), 4),
                    "samples": self.samples,
                    "seconds": round(self.seconds, 1),
                }
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row | self.notes()) + "\n")
                logger.info("%s", row)
                recent = []
            if time.time() - saved > save_every:
                self.checkpoint()
                saved = time.time()
        self.checkpoint()

    def checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
        }
        part = self.out / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.out / "checkpoint.pt")

    def resume(self) -> None:
        """Continue at the checkpoint of ``out``, if there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds, self.samples = state["step"], state["seconds"], state["samples"]
        logger.info("resumed at step %d", self.step)
