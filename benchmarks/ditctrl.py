"""DiTCtrl on zoo/video: sequences of prompts, word swaps and reweighted words, each beside what it is compared with.

    python benchmarks/ditctrl.py --groups 20                    long videos, then the edits; goes on where it was
    python benchmarks/ditctrl.py --groups 1 --steps 2 --dry     whether it runs
    python benchmarks/ditctrl.py --dedup [--memory]             what it costs instead (see ditctrl_cost.py)

Long videos: one clip for each prompt by itself (isolated), blending without shared keys, shared keys without masks, and
all of it. A row has, for the frames that belong to one prompt alone, what the detectors read; CSCV (the paper's
formula) over the mean patch features of zoo/vlm's CLIP tower, over colours and outlines, and with --clip over the
pooled features of a real CLIP, as the paper has it; and smoothness. Edits: what the detectors read, PSNR outside the
object against the source; where an object's colour lies between those of two words that it was given, by the factor of
one of them. Isolated clips are put behind each other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ditctrl_cost
import torch
from rows import RESULTS, append, conditions, read
from torch import Tensor

import patchkit
from patchkit import metrics, zoo
from patchkit.evaluation import learned, temporal
from patchkit.zoo import detect, worlds

OVERLAP, LENGTH = 6, 17
# (what changes, the prompts' words that do): colour, background, shape, motion and identity, of two and three prompts
PAIRS = [
    ("colour", ("red circle", "still", "white"), ("green circle", "still", "white")),
    ("background", ("yellow square", "still", "black"), ("yellow square", "still", "gray")),
    ("motion", ("purple circle", "right", "white"), ("purple circle", "left", "white")),
    ("shape", ("yellow square", "still", "black"), ("yellow circle", "still", "black")),
    ("colour", ("blue square", "still", "gray"), ("orange square", "still", "gray")),
    ("background", ("red triangle", "still", "white"), ("red triangle", "still", "blue")),
    ("motion", ("green square", "up", "black"), ("green square", "down", "black")),
    ("shape", ("red circle", "still", "gray"), ("red square", "still", "gray")),
    ("colour", ("green circle", "still", "black"), ("purple circle", "still", "black")),
    ("background", ("orange circle", "still", "gray"), ("orange circle", "still", "white")),
    ("motion", ("red square", "left", "gray"), ("red square", "right", "gray")),
    ("colour", ("yellow triangle", "still", "blue"), ("red triangle", "still", "blue")),
    ("background", ("purple square", "still", "black"), ("purple square", "still", "white")),
    ("colour", ("orange circle", "still", "black"), ("blue circle", "still", "black")),
]
TRIPLES = [
    ("colour", ("red circle", "still", "white"), ("green circle", "still", "white"), ("blue circle", "still", "white")),
    ("background", ("red square", "still", "black"), ("red square", "still", "gray"), ("red square", "still", "white")),
    (
        "background",
        ("blue circle", "still", "white"),
        ("blue circle", "still", "gray"),
        ("blue circle", "still", "black"),
    ),
    ("colour", ("green square", "still", "gray"), ("yellow square", "still", "gray"), ("red square", "still", "gray")),
    ("shape", ("red circle", "still", "white"), ("red square", "still", "white"), ("red triangle", "still", "white")),
    (
        "colour",
        ("purple circle", "still", "black"),
        ("red circle", "still", "black"),
        ("orange circle", "still", "black"),
    ),
]
GROUPS = [group for i in range(7) for group in (*PAIRS[2 * i : 2 * i + 2], *TRIPLES[i : i + 1])]
LONG: dict[str, dict[str, Any] | None] = {
    "isolated": None,
    "blending": {"kv_steps": None},
    "sharing": {"mask_guided": False},
    "full": {},
    "wide": {"mask_guided": False, "kv_layers": "3-"},
}
EDITS = [
    ("swap", ("red circle", "right", "white"), ("green circle", "right", "white")),
    ("swap", ("blue square", "up", "gray"), ("orange square", "up", "gray")),
    ("swap", ("yellow triangle", "left", "black"), ("yellow circle", "left", "black")),
    ("swap", ("red square", "still", "white"), ("red square", "still", "black")),
]
FACTORS = (0.0, 0.5, 1.0, 2.0)
# two colour words for one object, which the model mixes: how far one is heard can be read off the colour
MIXED = [
    (("red", "blue"), "a red blue circle moving right on a white background"),
    (("yellow", "purple"), "a yellow purple square standing still on a black background"),
    (("green", "red"), "a green red square moving up on a gray background"),
    (("orange", "blue"), "an orange blue circle standing still on a black background"),
]
TURNS = [(-1, 1.0), *((word, factor) for word in (0, 1) for factor in (0.0, 0.5, 2.0))]


def caption(what: str, motion: str, background: str) -> str:
    verb = "standing still" if motion == "still" else f"moving {motion}"
    return f"a {what} {verb} on a {background} background"


def objects(group: tuple[Any, ...]) -> list[str]:
    return [words[0].split()[1] for words in group[1:]]


def extractors(clip: str | None) -> dict[str, Any]:
    """Features that CSCV is computed over, by name: (F, 3, H, W) -> (F, n)."""
    tower = zoo.load("vlm").model.model.vision_tower

    def patches(frames: Tensor) -> Tensor:
        """(F, 128) mean of the patches' features in the tower's last layer."""
        with torch.no_grad():
            return tower(pixel_values=(frames - 0.5) / 0.5).last_hidden_state[:, 1:].mean(1)

    found = {"vlm": patches, "plain": lambda frames: torch.cat(temporal.frame_features(frames), 1)}
    return found | ({"clip": learned.clip_frames(clip)} if clip else {})


def judged(clip: Tensor, prompts: list[str]) -> dict[str, float]:
    """Share of the prompts that is right, by attribute, in the frames that no other prompt has a part in."""
    stride, count = LENGTH - OVERLAP, len(prompts)
    totals = dict.fromkeys((*detect.ATTRIBUTES, "all"), 0.0)
    for i, prompt in enumerate(prompts):
        start = 2 * i * stride + (OVERLAP if i else 0)  # segment 2 i is the prompt's own, its neighbours are mixed
        stop = 2 * i * stride + LENGTH - (OVERLAP if i < count - 1 else 0)
        for name, right in detect.score(clip[start:stop], prompt).items():
            totals[name] += right / count
    return totals


def long_row(
    pipe: Any, features: dict[str, Any], group: tuple[Any, ...], label: str, seed: int, call: dict[str, Any]
) -> dict[str, Any]:
    prompts = [caption(*words) for words in group[1:]]
    options, report = LONG[label], {}
    noise = torch.Generator().manual_seed(seed)
    if options is None:
        clips = [pipe(prompt=p, generator=noise, output_type="pt", **call).frames[0] for p in prompts]
        clip = torch.cat(clips)
        scores = [detect.score(c, p) for c, p in zip(clips, prompts, strict=True)]
        right = {n: sum(float(s[n]) for s in scores) / len(scores) for n in scores[0]}
    else:
        recipe = {"overlap": OVERLAP, "zero_uncond": False, "objects": objects(group), **options}
        with patchkit.apply(pipe, "ditctrl", **recipe) as patch:
            clip = pipe(prompt=prompts, generator=noise, output_type="pt", **call).frames[0]
            [entry] = patch.report()["recipes"]
        report = {"block_forwards": entry["counts"]["block forwards"]}
        report["block_forwards_pairwise"] = entry["counts"]["block forwards without sharing"]
        right = judged(clip, prompts)
    return {
        "frames": len(clip),
        **{f"right_{name}": round(float(value), 4) for name, value in right.items()},
        **{f"cscv_{name}": round(temporal.cscv(of(clip)), 4) for name, of in features.items()},
        "smoothness": round(float(temporal.smoothness(clip).mean()), 4),
        **report,
    }


def swap_row(pipe: Any, group: tuple[Any, ...], label: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
    """Target's own noise and keys ("apart"), shared keys, guided sharing; against the source."""
    prompts = [caption(*words) for words in group[1:]]
    options = {"apart": {"kv_steps": None}, "sharing": {"mask_guided": False}, "full": {}}[label]
    with patchkit.apply(pipe, "ditctrl", mode="swap", zero_uncond=False, objects=objects(group), **options):
        source, target = pipe(
            prompt=prompts, generator=torch.Generator().manual_seed(seed), output_type="pt", **call
        ).frames
    mask = worlds._clip_objects(source)
    both = None if mask is None else mask | (m if (m := worlds._clip_objects(target)) is not None else mask)
    outside = {} if both is None else metrics.outside(source, target, both)
    found = {f"right_{n}": float(v) for n, v in detect.score(target, prompts[1]).items()}
    return found | {"outside_psnr": round(outside.get("psnr", float("nan")), 2)}


def reweight_row(
    pipe: Any, words: tuple[str, str, str], factor: float, seed: int, call: dict[str, Any]
) -> dict[str, Any]:
    """How far the object's colour is from the word's, by factor."""
    word = words[0].split()[0]
    source, target, inside = reweighted(pipe, caption(*words), {word: factor}, seed, call)
    distance = float((inside - torch.tensor(zoo.world.COLOURS[word])).norm())
    return {
        "read": reading(target),
        "colour_distance": round(distance, 4),
        "psnr": round(metrics.psnr(source, target), 2),
    }


def mixed_row(pipe: Any, number: int, label: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
    """Where the object's colour lies between those of two words: 0 = the first's, 1 = the second's."""
    words, prompt = MIXED[number]
    word, _, factor = label.rpartition(" x ")
    source, target, inside = reweighted(pipe, prompt, {word: float(factor)}, seed, call)
    first, second = (torch.tensor(zoo.world.COLOURS[w]) for w in words)
    way = second - first
    place = float((inside - first) @ way / (way @ way))
    return {"words": words, "read": reading(target), "toward_second": round(place, 3)} | (
        {} if float(factor) == 1 else {"psnr": round(metrics.psnr(source, target), 2)}
    )


def reweighted(
    pipe: Any, prompt: str, factors: dict[str, float], seed: int, call: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The video without and with the factors, and the colour of the object in the second."""
    with patchkit.apply(pipe, "ditctrl", mode="reweight", reweight=factors, zero_uncond=False):
        source, target = pipe(
            prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **call
        ).frames
    mask = worlds._clip_objects(source)
    if mask is None:
        return source, target, torch.full((3,), float("nan"))
    return source, target, target.permute(0, 2, 3, 1)[mask].median(0).values


def reading(clip: Tensor) -> str:
    found = detect.detect(clip)
    return f"{found.colour} {found.shape} on {found.background}"


def wanted_rows(groups: int, only: list[str] | None) -> Iterator[tuple[str, int, str]]:
    for number in range(min(groups, len(GROUPS))):
        for label in LONG:
            yield "long", number, label
    for number in range(min(groups, len(EDITS))):
        for label in ("apart", "sharing", "full"):
            yield "swap", number, label
    for number in range(min(groups, 2)):
        for factor in FACTORS:
            yield "reweight", number, str(factor)
    for number, (words, _) in enumerate(MIXED[:groups]):
        for at, factor in TURNS:
            yield "mixed", number, f"{words[max(at, 0)]} x {factor:g}"


def measure(
    kind: str, number: int, label: str, loaded: tuple[Any, dict[str, Any]], seed: int, call: dict[str, Any]
) -> dict[str, Any]:
    pipe, features = loaded
    if kind == "long":
        return {"changes": GROUPS[number][0]} | long_row(pipe, features, GROUPS[number], label, seed, call)
    if kind == "swap":
        return swap_row(pipe, EDITS[number], label, seed, call)
    if kind == "mixed":
        return mixed_row(pipe, number, label, seed, call)
    return reweight_row(pipe, EDITS[number][1], float(label), seed, call)


def keep(row: dict[str, Any], args: argparse.Namespace) -> None:
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if not args.dry:
        append(args.out, conditions("cpu") | {"benchmark": "ditctrl", "model": "zoo/video"} | row)


def measure_cost(pipe: Any, args: argparse.Namespace) -> int:
    labels = {"labels": tuple(args.labels)} if args.labels else {}
    counts = {"counts": tuple(args.prompts)} if args.prompts else {}
    if args.dedup:
        for row in ditctrl_cost.dedup_rows(pipe, args.steps, args.rounds, **counts, **labels):
            keep({"kind": "dedup"} | row, args)
    if args.memory:
        for row in ditctrl_cost.memory_rows(pipe, **counts):
            keep({"kind": "memory"} | row, args)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", default=["long", "swap", "reweight", "mixed"])
    parser.add_argument("--labels", nargs="*", help="of these only")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "ditctrl.jsonl")
    parser.add_argument("--clip", help="folder or hub id (with HF_HUB_OFFLINE=0) of a CLIP model")
    parser.add_argument("--dry", action="store_true", help="write no row")
    parser.add_argument("--dedup", action="store_true", help="measure what computing segments once gains")
    parser.add_argument("--memory", action="store_true", help="measure the peak of tensors by the number of segments")
    parser.add_argument("--prompts", type=int, nargs="*", help="of --dedup and --memory: these numbers of prompts")
    parser.add_argument("--rounds", type=int, default=3, help="of --dedup")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = zoo.load("video")
    pipe.set_progress_bar_config(disable=True)
    if args.dedup or args.memory:
        return measure_cost(pipe, args)
    loaded = pipe, extractors(args.clip)
    call = {**zoo.defaults("video"), "num_inference_steps": args.steps}
    call.pop("prompt", None)
    key = ("kind", "group", "label", "seed", "steps")
    done = {tuple(row.get(k) for k in key) for row in read(args.out)}
    for kind, number, label in wanted_rows(args.groups, args.labels):
        name = (kind, number, label, args.seed, args.steps)
        if name in done or kind not in args.kinds or (args.labels and label not in args.labels):
            continue
        row = dict(zip(key, name, strict=True)) | measure(kind, number, label, loaded, args.seed + number, call)
        keep(row, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
