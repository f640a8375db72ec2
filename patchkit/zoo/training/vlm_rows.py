"""What ``zoo/vlm`` learns from: questions about a picture as one sequence, and what their words have to tell."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.zoo.chat import IMAGE_TOKENS, SYSTEM, chat_tokenizer
from patchkit.zoo.questions import KINDS, Question, View, ask, ask_all, in_a_sentence
from patchkit.zoo.stills import Still
from patchkit.zoo.world import COLOURS, SHAPES

QUESTIONS = 4  # about each picture, besides its caption
# Which of two objects is meant is learnt last, long after both can be described; so most questions turn on that.
REFERRING = ("colour", "shape", "shape", "position", "neighbour", "yes or no", "yes or no", "yes or no")
SENTENCES = 0.5  # share of these questions that want a sentence, which names what is meant once more before it tells
MISNAMED = 0.5  # share of the questions for the shape of an only object that name it by any colour
MISHEARD = 0.3  # share of the colours in answers that are read wrong when the next word is to be told
UNSHAPED = ("colour", "colour", "colour", "colour", "background", "count")
UNCOLOURED = ("yes or no", "shape", "yes or no", "position", "shape", "yes or no", "count", "shape")
HINTS = (len(SHAPES), 3, 2, 1)  # its shape, colour (red, green, blue), place (x, y), and whether it is there at all
HINT_WEIGHTS = (1.0, 10.0, 10.0, 1.0)


@dataclass
class Row:
    """Token ids of one sequence: what all questions see, and the questions with their answers.

    Attributes:
        ids: all tokens.
        places: position of each.
        group: 0 for what all see, else the number of the question.
        answers: (begin, end) of each answer, its end mark included.
        named: (token, object) for the last word of all that speaks of an object; see :attr:`Question.named`.
    """

    ids: list[int]
    places: list[int]
    group: list[int]
    answers: list[tuple[int, int]] = field(default_factory=list)
    named: list[tuple[int, int | None]] = field(default_factory=list)


def choose(view: View, still: Still, rng: random.Random) -> list[Question]:
    """A few questions about a picture, among them none that asks for colours or shapes without names."""
    unnamed = {*(COLOURS if still.tints else ()), *(SHAPES if still.lobes else ())}
    if unnamed:
        found = [ask(view, rng, kind) for kind in (UNCOLOURED if still.tints else UNSHAPED)]
        fitting = {q.text: q for q in found if q is not None and not unnamed & set(q.words)}
        return list(fitting.values())[:QUESTIONS]
    if len(view.things) == 2:
        found = [ask(view, rng, kind) for kind in (*REFERRING, "caption", rng.choice(KINDS))]
        different = {q.text: q for q in found if q is not None}.values()
        questions = [in_a_sentence(q) if rng.random() < SENTENCES else q for q in different]
    else:
        questions = ask_all(view, rng)
        captions = [q for q in questions if q.kind == "caption"]
        others = [misname(q, rng) for q in questions if q.kind != "caption"]
        questions = captions + rng.sample(others, min(QUESTIONS, len(others)))
    return rng.sample(questions, len(questions))


def misname(question: Question, rng: random.Random) -> Question:
    """A question for the shape of the only object, by a colour that it may not have; other questions as they are.

    Pairs that never come together in a picture would never come together in a question, either, and the model would
    learn to answer from the question alone.
    """
    words = COLOURS.keys() & set(question.words)
    if question.kind != "shape" or not words or rng.random() > MISNAMED:
        return question
    old, new = words.pop(), rng.choice(list(COLOURS))
    named = tuple((told.replace(old, new), thing) for told, thing in question.named)
    return replace(question, text=question.text.replace(old, new), named=named)


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
            for words, thing in question.named:
                until = question.text.index(words) + len(words)
                row.named.append((len(row.ids) + len(again) + len(self.ids(question.text[:until])) - 1, thing))
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

    def mishear(self, rows: Sequence[Row], colours: Sequence[int], rng: random.Random) -> None:
        """Change some of the colours in what the model has said so far; what it has to say stays.

        Otherwise it learns from its own words which shape never follows a colour, and looks no more.
        """
        for n, row in enumerate(rows):
            for begin, end in row.answers:
                for place in range(begin, end):
                    if row.ids[place] in colours and rng.random() < MISHEARD:
                        self.ids[n, place] = rng.choice(colours)


@dataclass
class Hints:
    """What the words that speak of objects have to tell: where they are, and the values of :data:`HINTS`.

    Attributes:
        rows, tokens: (N,) places in the batch.
        shape: (N,) numbers of shapes.
        colour, place: (N, 3) in [0, 1] and (N, 2) as shares of the picture.
        there: (N,) 1 for an object that is there, else 0; the others count only for these.
        painted, shaped: (N,) 1 where the colour counts, and where the shape does.
    """

    rows: Tensor
    tokens: Tensor
    shape: Tensor
    colour: Tensor
    place: Tensor
    there: Tensor
    painted: Tensor
    shaped: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], views: Sequence[View], shown: Sequence[Still]) -> Hints:
        """Those of ``rows``, each about one of ``views``; colours and shapes count where they have names."""
        spoken = [(n, token, thing) for n, row in enumerate(rows) for token, thing in row.named]
        things = [None if thing is None else views[n].things[thing] for n, _, thing in spoken]
        return cls(
            torch.tensor([n for n, _, _ in spoken], dtype=torch.long),
            torch.tensor([token for _, token, _ in spoken], dtype=torch.long),
            torch.tensor([0 if t is None else SHAPES.index(t.item.shape) for t in things], dtype=torch.long),
            torch.tensor([(0.0,) * 3 if t is None else COLOURS[t.item.colour] for t in things]).view(-1, 3),
            torch.tensor([(0.0,) * 2 if t is None else (t.x, t.y) for t in things]).view(-1, 2),
            torch.tensor([float(t is not None) for t in things]),
            torch.tensor([float(thing is not None and not shown[n].tints) for n, _, thing in spoken]),
            torch.tensor([float(thing is not None and not shown[n].lobes) for n, _, thing in spoken]),
        )

    def loss(self, told: Tensor) -> Tensor:
        """How far ``told``, (N, sum(HINTS)), is from what is to be told; 0 where there is nothing to tell."""
        if not len(told):
            return told.sum()
        shape, colour, place, there = told.split(HINTS, dim=-1)
        parts = (
            (F.cross_entropy(shape, self.shape, reduction="none") * self.shaped).mean(),
            ((colour - self.colour).square().mean(dim=-1) * self.painted).mean(),
            ((place - self.place).square().mean(dim=-1) * self.there).mean(),
            F.binary_cross_entropy_with_logits(there[:, 0], self.there),
        )
        return torch.stack([weight * part for weight, part in zip(HINT_WEIGHTS, parts, strict=True)]).sum()


def pixels(pictures: Tensor) -> Tensor:
    """What the processor makes of pictures in [0, 1] that were stored in eight bits."""
    return (pictures * 255).round() / 127.5 - 1
