"""Questions about stills: true answers, from what was drawn and from what the detectors read."""

import random
from collections import defaultdict
from itertools import pairwise

import pytest

from patchkit.zoo import stills
from patchkit.zoo.detect_stills import Found, Reading, detect
from patchkit.zoo.questions import (
    KINDS,
    NUMBERS,
    PAIR_KINDS,
    Question,
    Thing,
    View,
    ask,
    ask_about_two,
    ask_all,
    in_a_sentence,
)
from patchkit.zoo.stills import HELD_OUT_ITEMS, Description, Item


def _views(n, seed=0, held_out=("", "item", "scene")):
    rng = random.Random(seed)
    shown = [stills.draw(stills.sample_description(rng, held_out=held_out), rng) for _ in range(n)]
    return rng, shown, [View.of_still(s) for s in shown]


def _view(text, *places):
    description = Description.parse(text)
    return View(description.background, tuple(Thing(i, *p) for i, p in zip(description.items, places, strict=True)))


RED_AND_GREEN = _view("a red circle left of a green square on a blue background", (0.25, 0.5), (0.75, 0.52))
ALONE = _view("a red circle on a white background", (0.5, 0.75))


def _all(view, kind, n=200):
    found = {ask(view, random.Random(seed), kind) for seed in range(n)}
    return {(q.text, q.answer) for q in found if q is not None}


def test_each_kind_asks_what_it_says():
    answers = {kind: {a for _, a in _all(RED_AND_GREEN, kind)} for kind in KINDS}
    assert answers == {
        "background": {"blue"},
        "count": {"two"},
        "colour": {"red", "green"},
        "shape": {"circle", "square"},
        "position": {"left of the green square", "right of the red circle"},
        "neighbour": {"a red circle", "a green square", "nothing"},
        "yes or no": {"yes", "no"},
        "caption": {"a red circle left of a green square on a blue background"},
    }
    assert {a for _, a in _all(ALONE, "position")} == {"at the bottom"}
    assert _all(ALONE, "neighbour") == set()
    assert ("what colour is the shape?", "red") in _all(ALONE, "colour")


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("colour", "which colour is the circle?", "red"),
        ("colour", "what color is the shape on the right?", "green"),
        ("shape", "what kind of shape is the green shape?", "square"),
        ("position", "where is the red shape?", "left of the green square"),
        ("neighbour", "what is left of the square?", "a red circle"),
        ("neighbour", "what is left of the circle?", "nothing"),
        ("neighbour", "what is right of the circle?", "a green square"),
        ("yes or no", "is the square right of the circle?", "yes"),
        ("yes or no", "is the square left of the circle?", "no"),
        ("yes or no", "is there a green square?", "yes"),
        ("yes or no", "is there a red square?", "no"),
        ("yes or no", "is the background blue?", "yes"),
    ],
)
def test_examples(kind, text, answer):
    found = dict(_all(RED_AND_GREEN, kind, 1500))
    assert found[text] == answer


def test_one_question_has_one_answer():
    """Asked twice about a picture, the same words have the same answer; an object's name means one object."""
    rng, _, views = _views(60)
    for view in views:
        answers = defaultdict(set)
        for kind in KINDS:
            for _ in range(12):
                question = ask(view, rng, kind)
                if question is not None:
                    answers[question.text].add(question.answer)
        assert {len(a) for a in answers.values()} == {1}


def test_two_objects_of_one_shape_are_told_apart_by_colour():
    twins = _view("a red circle above a green circle on a gray background", (0.5, 0.25), (0.5, 0.75))
    named = {t.split(" is ")[1] for t, _ in _all(twins, "position")}
    assert named == {"the red circle?", "the green circle?", "the red shape?", "the green shape?"}
    assert {t.split(" is ")[1] for t, _ in _all(twins, "colour")} == {
        "the shape at the top?",
        "the shape at the bottom?",
    }


def test_the_detectors_ask_the_same_as_the_drawing():
    _, shown, views = _views(40, seed=3)
    pictures = stills.render(shown)
    read = [View.of_reading(detect(p)) for p in pictures]
    assert [v.description for v in read] == [v.description for v in views]
    for n, (drawn, seen) in enumerate(zip(views, read, strict=True)):
        assert ask_all(drawn, random.Random(n)) == ask_all(seen, random.Random(n))


def test_unclear_places_are_not_asked_for():
    corner = _view("a red circle on a white background", (0.65, 0.65))
    assert corner.position is None
    assert ask(corner, random.Random(0), "position") is None
    assert ask(corner, random.Random(0), "caption") is None
    assert len(ask_all(corner, random.Random(0))) == len(KINDS) - 3


def test_too_many_objects_are_not_counted():
    things = tuple(Found(c, "circle", x, 0.5, 0.1, 0.9, None) for c, x in (("red", 0.2), ("green", 0.5), ("blue", 0.8)))
    view = View.of_reading(Reading("white", things))
    assert {q.kind for q in ask_all(view, random.Random(0))} <= {"background", "colour", "shape", "yes or no"}


def test_answers_are_spread():
    rng, _, views = _views(700, held_out=("",))
    questions = [q for v in views for q in ask_all(v, rng)]
    by_kind = defaultdict(lambda: defaultdict(int))
    for q in questions:
        by_kind[q.kind][q.answer] += 1
    assert set(by_kind) == set(KINDS)
    assert set(by_kind["count"]) == set(NUMBERS)
    share = {k: max(a.values()) / sum(a.values()) for k, a in by_kind.items()}
    assert all(share[k] < 0.35 for k in ("background", "colour", "position", "neighbour", "caption"))
    assert share["shape"] < 0.4
    assert abs(by_kind["yes or no"]["yes"] / sum(by_kind["yes or no"].values()) - 0.5) < 0.05


def test_what_is_held_out_is_never_spoken_of_in_training():
    rng, _, views = _views(300, held_out=("",))
    words = {f"{colour} {shape}" for colour, shape in HELD_OUT_ITEMS}
    texts = [f"{q.text} {q.answer}" for v in views for q in ask_all(v, rng)]
    texts += [f"{q.text} {q.answer}" for two in pairwise(views) for q in ask_about_two(two, rng)]
    assert not [t for t in texts if any(w in t for w in words)]


def test_two_pictures():
    rng = random.Random(0)
    found = {q for _ in range(40) for q in ask_about_two((RED_AND_GREEN, ALONE), rng)}
    assert {q.kind for q in found} == set(PAIR_KINDS)
    answers = {q.text: q.answer for q in found}
    assert answers["which picture has a white background?"] == "the second"
    assert answers["which picture shows a green square?"] == "the first"
    assert not [t for t in answers if "shows a red circle" in t]  # both do
    assert answers["how many shapes are in the second picture?"] == "one"
    assert answers["describe the second picture."] == "a red circle at the bottom on a white background"


def test_sentences_repeat_what_they_are_about():
    said = {
        Question("colour", "which color is the circle?", "red"): "the circle is red",
        Question(
            "shape", "what kind of shape is the shape on the left?", "circle"
        ): "the shape on the left is a circle",
        Question("position", "where is the red shape?", "at the top"): "the red shape is at the top",
    }
    for question, answer in said.items():
        told = in_a_sentence(question)
        assert (told.kind, told.text, told.answer) == (question.kind, f"tell me: {question.text}", answer)
    assert in_a_sentence(Question("count", "how many shapes are there?", "one")).answer == "one"


def test_right_answers():
    caption = Question("caption", "describe the picture.", "a red circle left of a green square on a blue background")
    assert caption.right("A red circle  left of a green square on a blue background")
    assert caption.right("a green square right of a red circle on a blue background")
    assert not caption.right("a green square left of a red circle on a blue background")
    assert not caption.right("a red circle and a green square on a blue background")
    assert not caption.right("a red red red")
    colour = Question("colour", "what colour is the circle?", "red")
    assert colour.right("red")
    assert not colour.right("red red")
    assert not colour.right("")


def test_both_orders_of_a_still_are_one_view():
    description = Description("white", (Item("red", "circle"), Item("blue", "square")), "below")
    still = stills.draw(description, random.Random(0))
    told = stills.Still(description.reversed, still.spots[::-1], still.grain)
    assert View.of_still(still) == View.of_still(told)
    assert View.of_still(still).description.caption == "a blue square above a red circle on a white background"
