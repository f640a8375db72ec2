"""A training that can be stopped at any moment: the same command goes on, and ends with the same weights.

What a step does depends on the seed, the step, and the weights and the optimiser's state before it, on nothing else.
Those two are written every so often, to a temporary name that is then renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import PatchkitError
from patchkit.finetune.rows import Rows
from patchkit.media import replacing

CHECKPOINT = "checkpoint.pt"
LOG = "training.jsonl"

Evaluate = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Course:
    """How a model is trained.

    Attributes:
        steps: optimiser steps.
        batch: rows of a step, over all processes and accumulated parts.
        accumulate: parts that a step is computed in.
        lr: greatest learning rate (AdamW).
        warmup: share of the steps in which it rises.
        schedule: ``"cosine"``: down to a tenth of it at the end; ``"constant"``.
        weight_decay, clip: of AdamW; greatest norm of the gradients.
        precision: ``"no"`` or ``"bf16"``: accelerate's mixed precision.
        checkpointing: whether activations are computed again in the backward pass.
        seed: of everything.
        save_every, evaluate_every: steps between checkpoints and between evaluations.
    """

    steps: int
    batch: int
    accumulate: int
    lr: float
    warmup: float
    schedule: str
    weight_decay: float
    clip: float
    precision: str
    checkpointing: bool
    seed: int
    save_every: int
    evaluate_every: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        if self.schedule == "constant":
            return self.lr
        done = (step - rising) / max(1, self.steps - rising)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass
class Training:
    """One model on its course.

    Args:
        model: what is trained: all of its parameters that require gradients.
        rows: what it reads.
        course: how.
        folder: where checkpoint and log go.
        facts: what the checkpoint must agree with to be gone on with, besides the course.
        evaluate: figures of the model in eval mode.
        extra: figures of each step, asked for after its last part: the load-balance loss, say.
        tell: is told (steps done, seconds left).
    """

    model: Any
    rows: Rows
    course: Course
    folder: Path
    facts: dict[str, Any]
    evaluate: Evaluate
    extra: Callable[[Any], dict[str, float]]
    tell: Callable[[int, float | None], None]
    log: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end; returns the log."""
        from accelerate import Accelerator

        course = self.course
        cpu = next(self.model.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=course.precision)
        if course.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if hasattr(self.model, "enable_input_require_grads"):
                self.model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(self._trained().values(), lr=course.lr, weight_decay=course.weight_decay)
        if course.batch % self.accelerator.num_processes:
            raise PatchkitError(
                f"{course.batch} rows for {self.accelerator.num_processes} processes",
                "batch",
                "give a multiple, so that each process weighs the same",
            )
        first = self._resume(optimizer)
        model, optimizer = self.accelerator.prepare(self.model, optimizer)
        if first == 0:
            self._note({"step": 0, **self._evaluated()})
        begun = time.monotonic()
        for step in range(first, course.steps):
            row = self._step(model, optimizer, step)
            done = step + 1
            if done % course.evaluate_every == 0 or done == course.steps:
                row |= self._evaluated()
            self._note(row)
            if done % course.save_every == 0 or done == course.steps:
                self._save(optimizer, done)
            self.tell(done, (time.monotonic() - begun) / (done - first) * (course.steps - done))
        if course.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        return self.log

    # --- a step -----------------------------------------------------------------------------------------------

    def _step(self, model: Any, optimizer: Any, step: int) -> dict[str, Any]:
        course, accelerator = self.course, self.accelerator
        begun = time.monotonic()
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed(((course.seed * 1_000_003 + step) * world + rank) % 2**63)  # dropout
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = course.rate(step)
        rows = self.rows.of_step(step, course.batch)[rank::world].to(accelerator.device)
        parts = [part for part in rows.chunk(course.accumulate) if len(part)]
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = model(input_ids=part, labels=part).loss * (len(part) / len(rows))
                accelerator.backward(loss)
                total += loss.detach()
        norm = accelerator.clip_grad_norm_(model.parameters(), course.clip) if course.clip else None
        loss_value = float(accelerator.reduce(total, "mean"))
        for what, value in (("loss", loss_value), ("norm of the gradients", 0.0 if norm is None else float(norm))):
            if not math.isfinite(value):
                raise PatchkitError(f"the {what} is {value} at step {step + 1}", str(self.folder), "lower lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": round(loss_value, 6), "lr": course.rate(step)}
        row |= {name: round(value, 6) for name, value in self.extra(self.model).items()}
        if norm is not None:
            row["gradient"] = round(float(norm), 6)
        return row | {
            "tokens": (step + 1) * rows.shape[1] * course.batch,
            "seconds": round(time.monotonic() - begun, 3),
        }

    def _evaluated(self) -> dict[str, float]:
        self.model.eval()
        found = self.evaluate(self.model)
        return {name: round(value, 6) for name, value in found.items()}

    # --- what is kept -----------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, optimizer: Any, done: int) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": done,
                "facts": json.dumps(self._all_facts()),
                "weights": {name: p.detach().cpu() for name, p in self._trained().items()},
                "optimizer": optimizer.state_dict(),
            }
            with replacing(self.folder / CHECKPOINT) as part:
                torch.save(state, part)
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: Any) -> int:
        """Go on from the checkpoint if there is one; returns how many steps are done."""
        path = self.folder / CHECKPOINT
        if self.accelerator.is_main_process:
            for left in self.folder.glob(f".{path.stem}-*{path.suffix}"):
                left.unlink(missing_ok=True)  # half written when a run was killed
        if not path.is_file():
            self._write_log()
            return 0
        state = _state(path)
        other = differing(json.loads(state["facts"]), json.loads(json.dumps(self._all_facts())))
        if other:
            raise PatchkitError(
                f"a training with other settings ({', '.join(other)}) was begun in this folder",
                str(self.folder),
                "give its settings to go on with it, name another output, or delete the folder",
            )
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        done = int(state["step"])
        self.log = [row for row in _read(self.folder / LOG) if row["step"] <= done]
        if [row["step"] for row in self.log] != list(range(done + 1)):
            raise PatchkitError(
                f"the log does not hold the {done} steps before the checkpoint",
                str(self.folder / LOG),
                f"put it back, or delete {path.name} to begin again",
            )
        self._write_log()
        return done

    def _all_facts(self) -> dict[str, Any]:
        course = asdict(self.course)
        del course["save_every"]
        return self.facts | course

    def _note(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _write_log(self) -> None:
        if self.accelerator.is_main_process:
            with replacing(self.folder / LOG) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.log), encoding="utf-8")


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the settings in which two trainings differ; a section within counts by its fields."""
    names = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing(a, b)
        elif a != b:
            names.append(name)
    return list(dict.fromkeys(names))


def _state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; raises :class:`PatchkitError` where it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "facts", "weights", "optimizer"} <= state.keys():
            raise ValueError("parts of it are missing")
    except (RuntimeError, EOFError, OSError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PatchkitError(
            f"the checkpoint is damaged: {reason}", str(path), "delete it to begin this training again"
        ) from None
    return state


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a log; a line that was cut off in the middle ends it."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
