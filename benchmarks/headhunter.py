"""Are heads that a hunt found better than random heads, or than the best whole layer? On a zoo model, without CFG.

    python benchmarks/headhunter.py [--model zoo/dit] [--steps 2] [--hunt 16] [--unseen 64]

Hunts on some captions with the shape world's detectors, then compares on other captions: no guidance, as many random
heads (several draws), the whole layer that was best on the hunting captions, and the found heads at four strengths.
All captions are of combinations that the model was never trained on. Writes a row a variant to
benchmarks/results/headhunter.jsonl and the curve to docs/headhunter.png (another model's beside it). Stopped, it goes
on where it was.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import patchkit
from patchkit import intervals
from patchkit.media import replacing
from patchkit.recipes.headhunter import SoftPAG, hunt
from patchkit.recipes.headhunter.objectives import ShapeWorld
from patchkit.zoo import stills

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
RANDOM_STRENGTHS = (0.5, 1.0)
GRADED = ("clarity", "outline")  # parts of the objective that are not a right-or-wrong
Heads = Sequence[tuple[int, int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="zoo/dit")
    parser.add_argument("--steps", type=int, default=2, help="few: with its own 20 it is right nearly always")
    parser.add_argument("--hunt", type=int, default=16, help="captions of the hunt")
    parser.add_argument("--unseen", type=int, default=64, help="captions of the comparison")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each caption of the comparison")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store", type=Path, default=None, help="folder of what is finished")
    parser.add_argument("--dry", action="store_true", help="write no rows and no picture")
    return parser.parse_args()


def captions(count: int, seed: int = 0) -> list[str]:
    """Scenes never drawn in training: one in four has one object, the others two."""
    rng = random.Random(seed)
    groups = [[d.caption for d in stills.descriptions(n) if d.held_out and d.position] for n in (1, 2)]
    for group in groups:
        rng.shuffle(group)
    return [groups[0].pop() if i % 4 == 0 else groups[1].pop() for i in range(count)]


class Bench:
    """A pipeline, its captions, and the scores that are known so far."""

    def __init__(self, pipe: Any, args: argparse.Namespace, texts: list[str]) -> None:
        self.pipe, self.args, self.objective = pipe, args, ShapeWorld()
        self.hunting, self.unseen = texts[: args.hunt], texts[args.hunt :]
        terms = ("model", "steps", "hunt", "unseen", "seeds", "scale", "top_k", "rounds", "draws")
        name = "-".join(str(getattr(args, n)).replace("/", "-") for n in terms)
        self.folder = args.store or Path("out") / f"headhunter-{name}"
        self.path = self.folder / "scores.json"
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def call(self, texts: list[str], seeds: list[int], **more: Any) -> list[torch.Tensor]:
        given = {"num_inference_steps": self.args.steps, "guidance_scale": 1.0, "output_type": "pt"} | more
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(self.pipe(prompt=texts, generator=generators, **given).images)

    def measure(self, where: str, heads: Heads = (), strength: float = 1.0, **more: Any) -> dict[str, Any]:
        """Score, rightness and seconds of every caption; ``where``: ``"hunting"`` or ``"unseen"``."""
        if where == "unseen" and self.args.seeds > 1:
            firsts = [10_000 * (n + 1) for n in range(self.args.seeds)]
            return averaged([self._measure(where, first, heads, strength, **more) for first in firsts])
        return self._measure(where, 0 if where == "hunting" else 10_000, heads, strength, **more)

    def _measure(self, where: str, first: int, heads: Heads, strength: float, **more: Any) -> dict[str, Any]:
        texts = self.hunting if where == "hunting" else self.unseen
        later = [first] if first > 10_000 else []
        key = json.dumps([where, len(texts), sorted(heads), strength, sorted(more.items()), *later])
        if key in self.known:
            return self.known[key]
        scores, right, seconds = [], [], 0.0
        with patchkit.apply(self.pipe, SoftPAG(heads=list(heads), strength=strength, scale=self.args.scale)):
            for start in range(0, len(texts), 16):
                some = texts[start : start + 16]
                begun = time.perf_counter()
                images = self.call(some, [first + start + i for i in range(len(some))], **more)
                seconds += time.perf_counter() - begun
                for image, text in zip(images, some, strict=True):
                    parts = self.objective.parts(image, text)
                    scores.append(sum(parts.values()) / len(parts))
                    right.append(float(all(v == 1 for n, v in parts.items() if n not in GRADED)))
        self.known[key] = {"scores": scores, "right": right, "seconds_a_sample": seconds / len(texts)}
        with replacing(self.path) as part:
            part.write_text(json.dumps(self.known))
        return self.known[key]

    def best_layer(self, shape: tuple[int, int]) -> tuple[int, list[float]]:
        layers, heads = shape
        means = []
        for layer in range(layers):
            found = self.measure("hunting", [(layer, head) for head in range(heads)])
            means.append(sum(found["scores"]) / len(found["scores"]))
        return max(range(layers), key=lambda layer: means[layer]), means


def shape_of(pipe: Any) -> tuple[int, int]:
    sites = patchkit.plan(pipe, "softpag").selections[0].matched
    return sites[0].layers, sites[0].heads


def row_of(variant: str, found: dict[str, Any], none: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        **more,
        "score": intervals.mean(found["scores"]).to_dict(),
        "right": intervals.share(found["right"]).to_dict(),
        "score_more_than_none": intervals.difference(found["scores"], none["scores"]).to_dict(),
        "seconds_a_sample": round(found["seconds_a_sample"], 4),
    }


def averaged(several: list[dict[str, Any]]) -> dict[str, Any]:
    """Several draws of random heads, or several seeds, as one: the mean of each caption."""
    columns = {n: list(zip(*(s[n] for s in several), strict=True)) for n in ("scores", "right")}
    out: dict[str, Any] = {n: [sum(c) / len(c) for c in column] for n, column in columns.items()}
    return out | {"seconds_a_sample": sum(s["seconds_a_sample"] for s in several) / len(several)}


def experiment(bench: Bench) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the variants, and of the found heads against the others."""
    args, shape = bench.args, shape_of(bench.pipe)
    begun = time.perf_counter()
    found = hunt(
        bench.pipe,
        bench.objective,
        bench.hunting,
        scale=args.scale,
        strength=1.0,
        top_k=args.top_k,
        rounds=args.rounds,
        batch=args.batch,
        store=bench.folder / "hunt.json",
        progress=lambda p: print(p, flush=True),
        num_inference_steps=args.steps,
        guidance_scale=1.0,
        output_type="pt",
    )
    took = time.perf_counter() - begun
    heads = found.heads
    print("found", heads, f"{took:.0f} s", flush=True)
    layer, layer_means = bench.best_layer(shape)
    on_hunting = {u: sum(bench.measure("hunting", heads, u)["scores"]) / args.hunt for u in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda u: on_hunting[u])

    none = bench.measure("unseen")
    rows = [row_of("none", none, none)]
    real = (
        "true_cfg_scale" in inspect.signature(type(bench.pipe).__call__).parameters
    )  # FLUX: the other one is embedded
    guidance = {"true_cfg_scale": 1.5, "negative_prompt": ""} if real else {"guidance_scale": 1.5}
    guided = bench.measure("unseen", **guidance)
    rows.append(row_of("CFG 1.5, for comparison", guided, none))
    whole = bench.measure("unseen", [(layer, head) for head in range(shape[1])])
    rows.append(row_of("best whole layer", whole, none, layer=layer, strength=1.0, layers_on_hunting=layer_means))
    rng = random.Random(0)
    pool = [(a, b) for a in range(shape[0]) for b in range(shape[1])]
    draws = [rng.sample(pool, len(heads)) for _ in range(args.draws)]
    chance = {}
    for u in RANDOM_STRENGTHS:
        chance[u] = averaged([bench.measure("unseen", draw, u) for draw in draws])
        rows.append(row_of("random heads", chance[u], none, strength=u, draws=draws))
    ours = {}
    for u in STRENGTHS:
        ours[u] = bench.measure("unseen", heads, u)
        rows.append(row_of("found heads", ours[u], none, strength=u, heads=heads, on_hunting=on_hunting[u]))

    others = {"none": none, "best whole layer": whole} | {f"random heads, {u}": chance[u] for u in RANDOM_STRENGTHS}
    against = [
        {
            "variant": "found heads against",
            "against": name,
            "strength": chosen,
            "score_more": intervals.difference(ours[chosen]["scores"], other["scores"]).to_dict(),
            "right_more": intervals.share_difference(ours[chosen]["right"], other["right"]).to_dict(),
        }
        for name, other in others.items()
    ]
    return rows, against


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=120)
    for variant, colour in (("found heads", "tab:blue"), ("random heads", "tab:orange")):
        mine = [r for r in rows if r["variant"] == variant]
        x, y = [r["strength"] for r in mine], [r["score"]["value"] for r in mine]
        spread = [[r["score"]["value"] - r["score"]["low"] for r in mine]]
        spread.append([r["score"]["high"] - r["score"]["value"] for r in mine])
        axis.errorbar(x, y, yerr=spread, label=variant, color=colour, marker="o", capsize=3)
    for variant, style in (("none", ":"), ("best whole layer", "--"), ("CFG 1.5, for comparison", "-.")):
        (one,) = [r for r in rows if r["variant"] == variant]
        axis.axhline(one["score"]["value"], linestyle=style, color="grey", label=variant)
    axis.set_xlabel("strength u")
    axis.set_ylabel("score, 0 to 1")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def show(rows: list[dict[str, Any]], against: list[dict[str, Any]]) -> None:
    for r in rows:
        s, d = r["score"], r["score_more_than_none"]
        print(
            f"{r['variant']:26} {r.get('strength', ''):>5} score {s['value']:.4f} right {r['right']['value']:.3f}"
            f"  more than none {d['value']:+.4f} [{d['low'] or 0:+.4f}, {d['high'] or 0:+.4f}]"
            f"  {r['seconds_a_sample']:.3f} s"
        )
    for r in against:
        s = r["score_more"]
        print(f"found at {r['strength']} over {r['against']}: {s['value']:+.4f} [{s['low']:+.4f}, {s['high']:+.4f}]")


def main() -> int:
    import rows as kept

    args = arguments()
    torch.set_num_threads(args.threads)
    pipe = patchkit.zoo.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(pipe, args, captions(args.hunt + args.unseen))
    rows, against = experiment(bench)
    show(rows, against)
    if not args.dry:
        shared = kept.conditions() | {
            n: getattr(args, n) for n in ("model", "steps", "hunt", "unseen", "seeds", "scale", "top_k", "rounds")
        }
        for row in rows + against:
            kept.append(kept.RESULTS / "headhunter.jsonl", shared | row)
        more = "" if args.model == "zoo/dit" else f"-{args.model.removeprefix('zoo/')}"
        draw(rows, kept.ROOT / "docs" / f"headhunter{more}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
