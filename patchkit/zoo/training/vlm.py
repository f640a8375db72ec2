"""Train the vision-language model of ``zoo/vlm``: ``python -m patchkit.zoo.training.vlm --out DIR``.

Projector and decoder learn from the tokens of the answers alone, with a tower that has learnt to see before
(:mod:`patchkit.zoo.training.vlm_tower`) and stays as it is, as LLaVA's does; without one, the tower learns with them.
All questions about a picture share one sequence, so the picture is read once: a mask keeps the questions from seeing
each other, and each has the positions that it would have alone. One picture in five is a conversation instead, in which
a question sees the turns before it.

The run is cut into stages of fixed length, checkpoints every two minutes, and continues where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchkit.zoo import stills
from patchkit.zoo.chat import IMAGE_TOKENS, PATCH, SYSTEM, chat_tokenizer
from patchkit.zoo.questions import KINDS, Question, View, ask, ask_about_two, ask_all, in_a_sentence, sample_still
from patchkit.zoo.stills import tint
from patchkit.zoo.training.loop import Loop
from patchkit.zoo.training.muon import Muon
from patchkit.zoo.world import COLOURS, SIZE

logger = logging.getLogger(__name__)

WIDTH, INNER = 128, 256
TOWER_LAYERS, LAYERS, HEADS, KV_HEADS = 3, 6, 8, 2
PLACES = 32  # channels of the tower that tell the place of a patch, as many as a head has
SIDES, CORNERS = ((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))
QUESTIONS = 4  # about each picture, besides its caption
CONVERSATIONS = 0.2  # share of the pictures whose questions are turns of one conversation
TINTED = 0.25  # share of the pictures whose objects have any colours, and that are asked about shapes and places only
# Which of two objects is meant is learnt last, long after both can be described; so most questions turn on that.
REFERRING = ("colour", "colour", "shape", "shape", "position", "neighbour", "yes or no")
SENTENCES = 0.5  # share of these questions that want a sentence, which names what is meant once more before it tells
UNCOLOURED = ("yes or no", "shape", "yes or no", "position", "shape", "yes or no", "count", "shape")
PLAIN = 0.1  # share of the pictures that come without the system's sentence
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


STAGES = (Stage(250, 16, 40, False), Stage(1750, 16, 80, False))


def build_model(seed: int = 0) -> Any:
    """The untrained ``LlavaForConditionalGeneration`` of zoo/vlm."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = chat_tokenizer()
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.encode("<image>", add_special_tokens=False)[0],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        **special,
    )
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config)
    prepare_tower(model.model.vision_tower)
    return model


def prepare_tower(tower: Any) -> None:
    """Write down what every vision tower has to find out first: colours and edges, places, and neighbours.

    The first channels hold the smoothest cosine patterns of a patch, the last ones waves of its row and column. The
    heads of the first layers look at the neighbour on each side and at each corner, found by turning these waves. From
    random weights, shapes were still guessed after 9,000 pictures.
    """
    embeddings, layers = tower.embeddings, tower.encoder.layers
    with torch.no_grad():
        embeddings.class_embedding.zero_()
        embeddings.patch_embedding.weight.copy_(F.pad(cosines(PATCH, WIDTH - PLACES), (0, 0) * 3 + (0, PLACES)))
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:, -PLACES:] = waves(SIZE // PATCH, 0, 0)
        for layer, offsets in zip(layers, (SIDES, CORNERS), strict=False):
            for head, offset in enumerate(offsets):
                rows = slice(head * PLACES, (head + 1) * PLACES)
                layer.self_attn.q_proj.weight[rows] = F.pad(1.5 * turn(*offset), (WIDTH - PLACES, 0))
                layer.self_attn.k_proj.weight[rows] = F.pad(torch.eye(PLACES), (WIDTH - PLACES, 0))


def frequencies() -> Tensor:
    """Radians a patch, for rows and for columns."""
    return torch.logspace(math.log10(0.3), math.log10(2.0), PLACES // 4)


def waves(side: int, row: int, column: int) -> Tensor:
    """(side * side, PLACES) cosines and sines of rows and columns, counted from (row, column)."""
    rows, columns = torch.arange(side).float() + row, torch.arange(side).float() + column
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(-1, 2, 1) * frequencies()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def turn(row: int, column: int) -> Tensor:
    """The matrix that moves :func:`waves` by so many rows and columns."""
    blocks = []
    for angle in torch.cat([row * frequencies(), column * frequencies()]).tolist():
        blocks.append(torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))
    return torch.block_diag(*blocks)


def cosines(side: int, width: int) -> Tensor:
    """(width, 3, side, side): the smoothest cosine patterns of each colour channel, the mean weaker than the others."""
    place = (torch.arange(side) + 0.5) / side * math.pi
    patterns = torch.stack([(n * place).cos() * (2 if n else 1) ** 0.5 for n in range(side)]) / side**0.5
    order = sorted(((r, c) for r in range(side) for c in range(side)), key=lambda rc: (rc[0] + rc[1], rc))
    out = torch.zeros(width, 3, side, side)
    for n in range(width):
        row, column = order[n // 3]
        out[n, n % 3] = torch.outer(patterns[row], patterns[column]) * (1.2 if row + column else 0.45)
    return out


@dataclass
class Row:
    """Token ids of one sequence: what all questions see, and the questions with their answers.

    Attributes:
        ids: all tokens.
        places: position of each.
        group: 0 for what all see, else the number of the question.
        answers: (begin, end) of each answer, its end mark included.
    """

    ids: list[int]
    places: list[int]
    group: list[int]
    answers: list[tuple[int, int]] = field(default_factory=list)


def choose(view: View, tinted: bool, rng: random.Random) -> list[Question]:
    """A few questions about a picture; where the colours have no names, those that speak of no object's colour."""
    if tinted:
        found = [ask(view, rng, kind) for kind in UNCOLOURED]
        fitting = {q.text: q for q in found if q is not None and not COLOURS.keys() & set(q.words)}
        return list(fitting.values())[:QUESTIONS]
    if len(view.things) == 2:
        found = [ask(view, rng, kind) for kind in (*REFERRING, *rng.sample(KINDS, 2))]
        different = {q.text: q for q in found if q is not None}.values()
        questions = [in_a_sentence(q) if rng.random() < SENTENCES else q for q in different]
    else:
        questions = ask_all(view, rng)
        captions = [q for q in questions if q.kind == "caption"]
        others = [q for q in questions if q.kind != "caption"]
        questions = captions + rng.sample(others, min(QUESTIONS, len(others)))
    return rng.sample(questions, len(questions))


class Packer:
    """Makes rows of token ids; every text is tokenised once."""

    def __init__(self) -> None:
        self.tokenizer = chat_tokenizer()
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def row(self, questions: Sequence[Question], pictures: int = 1, plain: bool = False, chat: bool = False) -> Row:
        """One sequence about ``pictures`` pictures; as ``chat``, the questions are turns of one conversation."""
        start = [self.tokenizer.bos_token_id, *(() if plain else self.ids(SYSTEM)), *self.ids("USER:")]
        start += [self.image] * IMAGE_TOKENS * pictures
        shared = len(start)
        row = Row(start, list(range(shared)), [0] * shared)
        for number, question in enumerate(questions, start=1):
            again = self.ids("USER:") if chat and number > 1 else []
            asked = [*again, *self.ids(question.text), *self.ids("ASSISTANT:")]
            both = [*asked, *self.ids(question.answer), self.tokenizer.eos_token_id]
            first = len(row.ids) if chat else shared
            row.answers.append((len(row.ids) + len(asked), len(row.ids) + len(both)))
            row.ids += both
            row.places += range(first, first + len(both))
            row.group += [0 if chat else number] * len(both)
        return row


@dataclass
class Batch:
    """Rows as tensors; ``labels`` hold the answers' tokens where they are to be predicted, else -100."""

    ids: Tensor
    places: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], pad: int) -> Batch:
        """Pad ``rows`` at their ends."""
        length = max(len(r.ids) for r in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (length - len(v)) for v in values])

        ids, group = padded([r.ids for r in rows], pad), padded([r.group for r in rows], -1)
        keys, queries = group[:, None, :], group[:, :, None]
        mask = torch.ones(length, length).tril().bool() & ((keys == 0) | (keys == queries))
        labels = torch.full_like(ids, -100)
        for n, row in enumerate(rows):
            for begin, end in row.answers:
                labels[n, begin - 1 : end - 1] = ids[n, begin:end]
        return cls(ids, padded([r.places for r in rows], 0), mask[:, None], labels)


def pixels(pictures: Tensor) -> Tensor:
    """What the processor makes of pictures in [0, 1] that were stored in eight bits."""
    return (pictures * 255).round() / 127.5 - 1


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
        model = build_model(seed)
        if tower is not None:
            model.model.vision_tower.load_state_dict(tower)
            model.model.vision_tower.requires_grad_(False)
        super().__init__(out, model, optimisers(model, lr), sum(s.steps for s in stages), seed, decay=0.99, warm=40)

    def stage(self) -> Stage:
        step = self.step
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def notes(self) -> dict[str, Any]:
        right, asked = (sum(column) for column in zip(*self.right, strict=True))
        self.right = []
        return {"right": round(right / asked, 4)}

    def batch(self, rng: random.Random) -> tuple[Tensor, Batch]:
        """Pixels and sequences."""
        stage = self.stage()
        shown = [sample_still(rng, pairs=stage.pairs / 100) for _ in range(stage.batch)]
        views = [View.of_still(s) for s in shown]
        rows = []
        if stage.two and self.step % TWO_EVERY == 0:
            for pair in zip(views[::2], views[1::2], strict=True):
                rows.append(self.packer.row(ask_about_two(pair, rng), 2, rng.random() < PLAIN))
        else:
            for n, view in enumerate(views):
                if rng.random() < TINTED:
                    shown[n] = tint(shown[n], rng)
                questions = choose(view, bool(shown[n].tints), rng)
                rows.append(self.packer.row(questions, 1, rng.random() < PLAIN, rng.random() < CONVERSATIONS))
        return pixels(stills.render(shown)), Batch.of(rows, self.packer.tokenizer.pad_token_id)

    def loss(self, rng: random.Random) -> tuple[Tensor, int]:
        pictures, batch = self.batch(rng)
        logits = self.model(
            input_ids=batch.ids,
            pixel_values=pictures,
            attention_mask=batch.mask,
            position_ids=batch.places,
            use_cache=False,
        ).logits
        wanted = batch.labels >= 0
        hit = (logits.argmax(dim=-1) == batch.labels) | ~wanted
        ends = batch.labels == self.packer.tokenizer.eos_token_id
        # answers are neighbours in the flat order, each closed by its end mark
        flat, closed = hit[wanted], ends[wanted].long().cumsum(0) - ends[wanted].long()
        misses = torch.zeros(int(ends.sum())).index_add_(0, closed, (~flat).float())
        self.right.append((int((misses == 0).sum()), len(misses)))
        return F.cross_entropy(logits[wanted], batch.labels[wanted]), len(pictures)


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
