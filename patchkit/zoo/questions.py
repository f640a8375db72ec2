"""Questions about stills of the shape world, with their answers: what ``zoo/vlm`` is taught and judged by.

The answers follow from a :class:`View`, which is made from what was drawn or from what the detectors read back. So a
picture of unknown origin can be asked about, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from patchkit.zoo.detect import NONE
from patchkit.zoo.detect_stills import APART, SIDE, Reading, direction
from patchkit.zoo.stills import (
    HELD_OUT_ITEMS,
    OPPOSITE,
    PLACES,
    RELATIONS,
    Description,
    Item,
    Still,
    draw,
    sample_description,
)
from patchkit.zoo.world import BACKGROUNDS, COLOURS, SHAPES, SIZE

NUMBERS = ("none", "one", "two")
ORDINALS = ("first", "second")
KINDS = ("background", "count", "colour", "shape", "position", "neighbour", "yes or no", "caption")
PAIR_KINDS = ("which picture", "one of two")


@dataclass(frozen=True)
class Thing:
    """An object and the middle of its bounding box, as shares of the picture."""

    item: Item
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """What there is to see. Two objects stand in reading order: the left or the upper one first."""

    background: str
    things: tuple[Thing, ...] = ()

    @classmethod
    def of_still(cls, still: Still) -> View:
        """What was drawn."""
        return cls._ordered(
            still.description.background,
            [Thing(i, s[0] / SIZE, s[1] / SIZE) for i, s in zip(still.description.items, still.spots, strict=True)],
        )

    @classmethod
    def of_reading(cls, reading: Reading) -> View:
        """What the detectors read."""
        return cls._ordered(reading.background, [Thing(Item(o.colour, o.shape), o.x, o.y) for o in reading.objects])

    @classmethod
    def _ordered(cls, background: str, things: Sequence[Thing]) -> View:
        view = cls(background, tuple(things))
        return replace(view, things=view.things[::-1]) if view.position in ("right of", "below") else view

    @property
    def position(self) -> str | None:
        """Where the only object is, or the first relative to the second; None where that has no clear word."""
        if len(self.things) == 1:
            found = direction(self.things[0].x - 0.5, self.things[0].y - 0.5, PLACES, SIDE)
        elif len(self.things) == 2:
            first, second = self.things
            found = direction(first.x - second.x, first.y - second.y, RELATIONS, APART)
        else:
            return None
        return None if found == NONE else found

    @property
    def description(self) -> Description:
        """What a full caption says."""
        return Description(self.background, tuple(t.item for t in self.things), self.position)


@dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    Attributes:
        kind: one of :data:`KINDS`, for two pictures one of :data:`PAIR_KINDS`.
        text: the question.
        answer: the answer.
        named: (words of the question that speak of an object, its number in the view; None if there is no such object).
    """

    kind: str
    text: str
    answer: str
    named: tuple[tuple[str, int | None], ...] = ()

    @property
    def words(self) -> list[str]:
        """The words of the question and its answer."""
        return re.findall(r"\w+", f"{self.text} {self.answer}")

    def right(self, answer: str) -> bool:
        """Whether ``answer`` is the right one. A caption may be told from the other object."""
        words = " ".join(answer.lower().split())
        if self.kind != "caption" or words == self.answer:
            return words == self.answer
        try:
            told = Description.parse(words)
        except ValueError:
            return False
        return told.reversed == Description.parse(self.answer)


def sample_still(rng: random.Random, held_out: str = "", count: int | None = None, pairs: float = 0.55) -> Still:
    """A random picture of which all that a full caption says is held out so (``""``: open to training).

    A description that leaves the place of two objects open is drawn with one place, which another description, held
    out or not, may have in words; so it is what is seen that decides.

    Args:
        rng: the source of chance.
        held_out: value of :attr:`Description.held_out`.
        count: number of objects, if given.
        pairs: share of the pictures with two objects where it is not given.
    """
    while True:
        still = draw(sample_description(rng, pairs, held_out=(held_out,)), rng)
        if count in (None, len(still.spots)) and View.of_still(still).description.held_out == held_out:
            return still


def ask(view: View, rng: random.Random, kind: str) -> Question | None:
    """A random question of one of :data:`KINDS`; None if there is none of that kind about this picture."""
    found = _ASK[kind](view, rng)
    return None if found is None else Question(kind, *found)


def ask_all(view: View, rng: random.Random) -> list[Question]:
    """One question of every kind that there is."""
    found = [ask(view, rng, kind) for kind in KINDS]
    return [question for question in found if question is not None]


_ABOUT = {
    "colour": r"(?:what|which) colou?r is (.+)\?",
    "shape": r"what (?:kind of shape )?is (.+)\?",
    "position": r"where is (.+)\?",
}


def in_a_sentence(question: Question) -> Question:
    """The same question, asked for a whole sentence: the answer first repeats what it is about."""
    match = re.fullmatch(_ABOUT[question.kind], question.text) if question.kind in _ABOUT else None
    if match is None:
        return question
    said = f"{_an(question.answer)} {question.answer}" if question.kind == "shape" else question.answer
    return replace(question, text=f"tell me: {question.text}", answer=f"{match[1]} is {said}")


def ask_about_two(views: Sequence[View], rng: random.Random) -> list[Question]:
    """Questions about two pictures that are shown together, in random order."""
    questions = []
    backgrounds = [v.background for v in views]
    if backgrounds[0] != backgrounds[1]:
        n = rng.randrange(2)
        text = rng.choice(("which picture has {} {} background?", "which of the two pictures has {} {} background?"))
        questions.append(Question("which picture", text.format(_an(backgrounds[n]), backgrounds[n]), _nth(n)))
    for n, view in enumerate(views):
        other = {t.item for t in views[1 - n].things}
        mine = [t.item for t in view.things if t.item not in other]
        if mine:
            text = rng.choice(("which picture shows {}?", "which of the two pictures shows {}?"))
            questions.append(Question("which picture", text.format(rng.choice(mine)), _nth(n)))
        where = f"the {ORDINALS[n]} picture"
        questions.append(Question("one of two", f"what {_colour(rng)} is the background of {where}?", view.background))
        questions.append(Question("one of two", f"how many shapes are in {where}?", NUMBERS[len(view.things)]))
        if view.position is not None or not view.things:
            questions.append(Question("one of two", f"describe {where}.", view.description.caption))
    return rng.sample(questions, len(questions))


def _nth(n: int) -> str:
    return f"the {ORDINALS[n]}"


def _an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _colour(rng: random.Random) -> str:
    return rng.choice(("colour", "color"))


def _names(view: View, n: int) -> Iterator[str]:
    """The ways to speak of an object that mean no other one."""
    item, others = view.things[n].item, [t.item for i, t in enumerate(view.things) if i != n]
    yield f"the {item.colour} {item.shape}"
    if all(o.colour != item.colour for o in others):
        yield f"the {item.colour} shape"
    if all(o.shape != item.shape for o in others):
        yield f"the {item.shape}"
    if not others:
        yield "the shape"


def _sides(view: View) -> tuple[str, str] | None:
    """Words for the places of two objects."""
    sides = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
    return sides.get(view.position or "")


_Named = tuple[tuple[str, int | None], ...]
_Asked = tuple[str, str, _Named] | None


def _background(view: View, rng: random.Random) -> _Asked:
    texts = ("what {} is the background?", "which {} is the background?", "what {} is the background of the picture?")
    return rng.choice(texts).format(_colour(rng)), view.background, ()


def _count(view: View, rng: random.Random) -> _Asked:
    if len(view.things) >= len(NUMBERS):
        return None
    texts = ("how many shapes are there?", "how many objects do you see?", "how many shapes are in the picture?")
    return rng.choice(texts), NUMBERS[len(view.things)], ()


def _named(view: View, attribute: str) -> list[tuple[str, str, int]]:
    """(a way to speak of an object that does not tell the attribute, the attribute's value, the object's number)."""
    found = []
    sides = _sides(view)
    for n, thing in enumerate(view.things):
        value = getattr(thing.item, attribute)
        found += [(name, value, n) for name in _names(view, n) if value not in name.split()]
        if sides is not None:
            found.append((f"the shape {sides[n]}", value, n))
    return found


def _colour_of(view: View, rng: random.Random) -> _Asked:
    found = _named(view, "colour")
    if not found:
        return None
    name, value, n = rng.choice(found)
    return f"{rng.choice(('what', 'which'))} {_colour(rng)} is {name}?", value, ((name, n),)


def _shape_of(view: View, rng: random.Random) -> _Asked:
    found = _named(view, "shape")
    if not found:
        return None
    name, value, n = rng.choice(found)
    return rng.choice((f"what is {name}?", f"what kind of shape is {name}?")), value, ((name, n),)


def _where(view: View, rng: random.Random) -> _Asked:
    position = view.position
    if position is None:
        return None
    n = rng.randrange(len(view.things))
    name = rng.choice(list(_names(view, n)))
    named: _Named = ((name, n),)
    if len(view.things) == 1:
        return f"where is {name}?", f"{'in' if position == 'center' else 'at'} the {position}", named
    item = view.things[1 - n].item
    return f"where is {name}?", f"{OPPOSITE[position] if n else position} the {item.colour} {item.shape}", named


def _neighbour(view: View, rng: random.Random) -> _Asked:
    """What is beside an object; sometimes nothing is."""
    if len(view.things) != 2 or view.position is None:
        return None
    n = rng.randrange(2)
    true = OPPOSITE[view.position] if n == 0 else view.position  # of the other one, relative to the n-th
    asked = true if rng.random() < 0.75 else rng.choice([r for r in RELATIONS if r != true])
    name = rng.choice(list(_names(view, n)))
    return f"what is {asked} {name}?", str(view.things[1 - n].item) if asked == true else "nothing", ((name, n),)


def _yes_or_no(view: View, rng: random.Random) -> _Asked:
    true = rng.random() < 0.5
    options: list[Callable[[View, random.Random, bool], tuple[str, _Named] | None]]
    options = [_is_there, _is_background, _is_beside]
    for option in rng.sample(options, len(options)):
        found = option(view, rng, true)
        if found is not None:
            return found[0], "yes" if true else "no", found[1]
    return None


def _is_there(view: View, rng: random.Random, true: bool) -> tuple[str, _Named] | None:
    here = [t.item for t in view.things]
    if true:
        if not here:
            return None
        n = rng.randrange(len(here))
        return f"is there {here[n]}?", ((str(here[n]), n),)
    pool = [Item(c, s) for c in COLOURS for s in SHAPES]
    if here and rng.random() < 0.8:  # one word differs
        near = rng.choice(here)
        pool = [i for i in pool if (i.colour == near.colour) != (i.shape == near.shape)]
    # what is held out must not be learnt as never being there
    pool = [i for i in pool if i not in here and (i.colour, i.shape) not in HELD_OUT_ITEMS]
    absent = str(rng.choice(pool))
    return f"is there {absent}?", ((absent, None),)


def _is_background(view: View, rng: random.Random, true: bool) -> tuple[str, _Named]:
    other = rng.choice([b for b in BACKGROUNDS if b != view.background])
    return f"is the background {view.background if true else other}?", ()


def _is_beside(view: View, rng: random.Random, true: bool) -> tuple[str, _Named] | None:
    if len(view.things) != 2 or view.position is None:
        return None
    n = rng.randrange(2)
    relation = OPPOSITE[view.position] if n else view.position
    if not true:
        relation = OPPOSITE[relation] if rng.random() < 0.5 else rng.choice([r for r in RELATIONS if r != relation])
    first, second = rng.choice(list(_names(view, n))), rng.choice(list(_names(view, 1 - n)))
    return f"is {first} {relation} {second}?", ((first, n), (second, 1 - n))


def _caption(view: View, rng: random.Random) -> _Asked:
    if len(view.things) > 2 or (view.things and view.position is None):
        return None
    texts = ("describe the picture.", "what do you see?", "what is in the picture?")
    return rng.choice(texts), view.description.caption, ()


_ASK: dict[str, Callable[[View, random.Random], _Asked]] = dict(
    zip(KINDS, (_background, _count, _colour_of, _shape_of, _where, _neighbour, _yes_or_no, _caption), strict=True)
)
