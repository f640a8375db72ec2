"""Score zoo/vlm: ``python -m patchkit.zoo.training.vlm_evaluate --model DIR --out DIR``.

Pictures are drawn with fixed seeds, the detectors read them, and the questions and right answers are made from what
the detectors read. The model answers through its real processor and ``generate``. Beside it stand three controls: the
same questions with another picture, a model of random weights, and the best answer that could be given without any
picture. Writes ``evaluation.json`` and pictures with questions and answers.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit import media
from patchkit.zoo import stills
from patchkit.zoo.chat import VisionLanguage, load_chat
from patchkit.zoo.detect_stills import detect
from patchkit.zoo.questions import KINDS, PAIR_KINDS, Question, View, ask_about_two, ask_all, sample_still
from patchkit.zoo.training.evaluate import share_of
from patchkit.zoo.training.vlm_model import build_model

logger = logging.getLogger(__name__)

# what is held out, number of objects
GROUPS = {
    "seen": ("", None),
    "new_items_alone": ("item", 1),
    "new_items_in_pairs": ("item", 2),
    "new_scenes": ("scene", 2),
}


@dataclass(frozen=True)
class Sample:
    """A question and the pictures that it is about."""

    question: Question
    pictures: tuple[Tensor, ...]


def draw_pictures(n: int, seed: int, group: str) -> tuple[list[View], Tensor]:
    """``n`` pictures of a group: what is to be seen on them, and the pictures as eight bits store them."""
    held_out, count = GROUPS[group]
    rng = random.Random(f"{group}/{seed}")
    shown = [sample_still(rng, held_out, count) for _ in range(n)]
    return [View.of_still(s) for s in shown], (stills.render(shown) * 255).round() / 255


def samples_of(pictures: Tensor, seed: int) -> list[list[Sample]]:
    """For each picture one question of every kind that there is, by what the detectors read."""
    rng = random.Random(f"questions/{seed}")
    return [[Sample(q, (p,)) for q in ask_all(View.of_reading(detect(p)), rng)] for p in pictures]


def pairs_of(pictures: Tensor, seed: int) -> list[list[Sample]]:
    """For each two pictures the questions about them when they are shown together."""
    rng = random.Random(f"pairs/{seed}")
    both = list(zip(pictures[::2], pictures[1::2], strict=False))
    return [[Sample(q, two) for q in ask_about_two([View.of_reading(detect(p)) for p in two], rng)] for two in both]


def answer(pair: VisionLanguage, samples: Sequence[Sample], batch: int = 50) -> list[str]:
    """The model's answers, in batches of one kind as far as may be: a batch takes as long as its longest answer."""
    out = [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda n: samples[n].question.kind)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        told = pair.answers([samples[n].question.text for n in part], [samples[n].pictures for n in part])
        for n, words in zip(part, told, strict=True):
            out[n] = words
    return out


def summarise(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Shares right per kind and for all, with intervals, and what the best constant answer of each kind would get."""
    rights = [s.question.right(a) for s, a in zip(samples, answers, strict=True)]
    summary: dict[str, Any] = {}
    guessed = 0
    for kind in (*KINDS, *PAIR_KINDS):
        flags = [r for s, r in zip(samples, rights, strict=True) if s.question.kind == kind]
        if flags:
            common = Counter(s.question.answer for s in samples if s.question.kind == kind).most_common(1)[0][1]
            guessed += common
            summary[kind] = share_of(flags) | {"best_constant": round(common / len(flags), 4)}
    return summary | {"all": share_of(rights) | {"best_constant": round(guessed / len(samples), 4)}}


def judge(pair: VisionLanguage, asked: Sequence[Sequence[Sample]]) -> tuple[dict[str, Any], list[str]]:
    """Scores over all questions and over one a picture (the kinds take turns), and all answers."""
    samples = [s for about in asked for s in about]
    answers = answer(pair, samples)
    summary = summarise(samples, answers)
    told = iter(answers)
    one: list[bool] = []
    for n, about in enumerate(asked):
        rights = [s.question.right(next(told)) for s in about]
        if rights:
            one.append(rights[n % len(rights)])
    return summary | {"one_a_picture": share_of(one)}, answers


def swapped(asked: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """One question about each picture (the kinds take turns), asked about the picture of somewhere else."""
    far = len(asked) // 2
    elsewhere = [*asked[far:], *asked[:far]]
    ones = [(about[n % len(about)], others) for n, (about, others) in enumerate(zip(asked, elsewhere, strict=True))]
    return [[Sample(one.question, others[0].pictures)] for one, others in ones]


def evaluate(pair: VisionLanguage, n: int, seed: int, out: Path) -> dict[str, Any]:
    """The scores of every group, those of the swapped pictures, and pictures with questions and answers in ``out``."""
    result: dict[str, Any] = {}
    for group in GROUPS:
        views, pictures = draw_pictures(n, seed, group)
        asked, begun = samples_of(pictures, seed), time.time()
        result[group], answers = judge(pair, asked)
        seconds = time.time() - begun
        alike = [View.of_reading(detect(p)).description == v.description for p, v in zip(pictures, views, strict=True)]
        result[group] |= {"detectors_right": share_of(alike), "seconds_per_answer": round(seconds / len(answers), 4)}
        result[group]["swapped"] = judge(pair, swapped(asked))[0]
        show(asked, answers, out / f"{group}.png")
        logger.info("%s: %s", group, shares(result[group]))
        logger.info("%s, pictures swapped: %s", group, shares(result[group]["swapped"]))
    result["two_pictures"] = judge(pair, pairs_of(draw_pictures(n, seed + 1, "seen")[1], seed))[0]
    logger.info("two pictures: %s", shares(result["two_pictures"]))
    return result | {"seed": seed, "threads": torch.get_num_threads()}


def shares(summary: dict[str, Any]) -> dict[str, float]:
    """The shares of a summary alone."""
    return {k: v["share"] for k, v in summary.items() if isinstance(v, dict) and "share" in v}


def show(
    asked: Sequence[Sequence[Sample]], answers: Sequence[str], path: Path, rows: int = 6, columns: int = 2
) -> None:
    """Draw some pictures with three questions and the model's answers each; what is wrong is red (extra ``viz``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 1.25 * rows), squeeze=False)
    figure.subplots_adjust(left=0.01, right=1, top=0.99, bottom=0.01, hspace=0.1, wspace=0)
    told = iter(answers)
    for place, axis in zip(range(rows * columns), axes.flat, strict=True):
        axis.axis("off")
        if place >= len(asked) or not asked[place]:
            continue
        about = [(s, next(told)) for s in asked[place]]
        axis.imshow(asked[place][0].pictures[0].permute(1, 2, 0))
        axis.set_anchor("W")
        for line, (sample, words) in enumerate(about[(place + 2 * k) % len(about)] for k in range(3)):
            right = sample.question.right(words)
            text = f"{sample.question.text}\n    {words}" + ("" if right else f"  (right: {sample.question.answer})")
            axis.text(
                1.08, 1 - 0.36 * line, text, transform=axis.transAxes, va="top", size=8, color="k" if right else "r"
            )
    with media.replacing(path) as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model and its processor")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200, help="pictures of each group")
    parser.add_argument("--control", type=int, default=50, help="pictures of the untrained control; 0 for none")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pair = load_chat(args.model)
    result: dict[str, Any] = {"trained": evaluate(pair, args.n, args.seed, args.out)}
    if args.control:
        asked = samples_of(draw_pictures(args.control, args.seed, "seen")[1], args.seed)
        result["untrained_control"] = judge(pair._replace(model=build_model().eval()), asked)[0]
    with media.replacing(args.out / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
