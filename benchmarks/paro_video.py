"""PAROAttention on zoo/video: plans from two prompts, judged on prompts and seeds that they never saw.

    python benchmarks/paro_video.py [--prompts 20] [--steps 20] [--densities 0.5 0.3 0.2] [--resume]

For every density: the plan, the plan with INT8 products, masks of the same density made without reordering (the
paper's ablation), and AdaSpa; all from the same seeds, against the dense video. A row is written as soon as a variant
is done, and `--resume` leaves out those that are there. Draws the orders of each layer's heads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, spinning threads stop each other

DENSITIES = (0.5, 0.3, 0.2)
SHAPE = "1088 video + 20 text tokens, 4 heads x 32, 6 layers, batch 2 (CFG)"
CALIBRATION = ("a green square moving left on a white background", "a yellow triangle moving up on a black background")


def generate(pipe: Any, prompt: str, seed: int, steps: int) -> tuple[Any, float]:
    """One clip as (F, 3, H, W) in [0, 1], and the seconds of its denoising."""
    import torch

    from patchkit import zoo

    inputs = dict(zoo.defaults("video")) | {"prompt": prompt, "num_inference_steps": steps}
    begun = time.perf_counter()
    frames = pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **inputs).frames[0]
    return frames.float(), time.perf_counter() - begun


def plans_of(pipe: Any, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """A plan with the chosen orders, and one whose heads all keep the model's order: same prompts, same density."""
    from patchkit import zoo
    from patchkit.recipes.paro import PermutePlan, calibrate

    inputs = {n: v for n, v in zoo.defaults("video").items() if n not in ("prompt", "num_inference_steps", "fps")}
    options = {"num_inference_steps": args.steps, "block_size": args.block_size, "select": args.select, **inputs}
    found = {}
    for name, forced in (("reordered", False), ("model order", True)):
        path = args.folder / f"{name.replace(' ', '-')}-{args.select}-{density}-{args.steps}.safetensors"
        if not path.is_file():
            plan = calibrate(pipe, CALIBRATION, density, **options, codes=(0,) if forced else None)
            plan.save(path)
        found[name] = PermutePlan.load(path)
    return found


def variants_of(pipe: Any, density: float, args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any], Any]]:
    """Name -> (recipe, options, plan)."""
    plans = plans_of(pipe, density, args)
    reordered, plain = plans["reordered"], plans["model order"]
    sparse = {"density": density, "block_size": args.block_size, "min_tokens": 0}
    return {
        "paro": ("paro", {"plan": reordered}, reordered),
        "paro, INT8": ("paro", {"plan": reordered, "qk": "int8", "pv": "int8"}, reordered),
        "paro, model order": ("paro", {"plan": plain}, plain),
        "paro, 0.2 dense": ("paro", {"plan": reordered, "warmup_steps": 0.2}, reordered),
        "adaspa": ("adaspa", sparse, None),
    }


def measure(pipe: Any, recipe: str, options: dict[str, Any], references: list[Any], args: Any) -> dict[str, list[Any]]:
    """Every prompt from its seed: distance to its dense video, detector scores, seconds, report."""
    import patchkit
    from patchkit import metrics
    from patchkit.zoo import detect

    found: dict[str, list[Any]] = {"seconds": [], "scores": [], "psnr": [], "ssim": [], "reports": []}
    for seed, (prompt, reference, _) in enumerate(references):
        with patchkit.apply(pipe, recipe, **options) as patch:
            video, seconds = generate(pipe, prompt, seed, args.steps)
            report = patch.report().to_dict()["recipes"][0]
        found["seconds"].append(seconds)
        found["scores"].append(detect.score(video, prompt))
        found["psnr"].append(float(metrics.psnr(video, reference)))
        found["ssim"].append(float(metrics.ssim(video, reference)))
        found["reports"].append(report["means"])
    return found


def row_of(found: dict[str, list[Any]], dense_seconds: float) -> dict[str, Any]:
    reports = found["reports"]
    names = [n for n in ("actual_density", "density", "kept_mass", "recall") if all(n in r for r in reports)]
    mean = {n: statistics.mean(r[n] for r in reports) for n in names}
    return {
        "clips": len(found["seconds"]),
        "psnr_db": round(statistics.mean(found["psnr"]), 2),
        "psnr_worst_db": round(min(found["psnr"]), 2),
        "ssim": round(statistics.mean(found["ssim"]), 4),
        "right": rights(found["scores"]),
        "seconds_a_clip": round(statistics.median(found["seconds"]), 3),
        "seconds_over_dense": round(statistics.median(found["seconds"]) / dense_seconds, 3),
        **{name: round(value, 4) for name, value in mean.items()},
    }


def rights(scores: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(statistics.mean(s[name] for s in scores), 3) for name in scores[0]}


def draw(plan: Any, path: Path) -> None:
    """The orders of each layer's heads as a stacked bar."""
    import matplotlib.pyplot as plt

    from patchkit.kernels.reorder import NAMES

    counts = plan.histogram()
    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    bottom = counts[:, 0] * 0
    for code, name in enumerate(NAMES):
        axes.bar(range(len(counts)), counts[:, code], bottom=bottom, label=name)
        bottom = bottom + counts[:, code]
    axes.set(xlabel="layer", ylabel="heads", title="orders of tokens chosen for the heads of zoo/video")
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    import torch
    from rows import RESULTS, append, conditions, read

    from patchkit import zoo
    from patchkit.zoo import detect, world

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--select", choices=("score", "kept_mass"), default="score")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/paro"))
    parser.add_argument("--picture", type=Path, default=Path("docs/paro-orders.png"))
    parser.add_argument("--results", type=Path, default=RESULTS / "paro_video.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        args.results.unlink(missing_ok=True)
    done = {(r["variant"], r["density"]) for r in read(args.results)}
    pipe = zoo.load("video")
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(1234)
    prompts = [world.sample_scene(rng).caption for _ in range(args.prompts)]
    generate(pipe, prompts[0], 0, 2)
    references = [(p, *generate(pipe, p, seed, args.steps)) for seed, p in enumerate(prompts)]
    dense = statistics.median(seconds for *_, seconds in references)
    shared = conditions() | {"what": "paro on zoo/video", "shape": SHAPE, "steps": args.steps, "select": args.select}
    if ("dense", 1.0) not in done:
        scores = rights([detect.score(video, prompt) for prompt, video, _ in references])
        row = {"variant": "dense", "density": 1.0, "seconds_a_clip": round(dense, 3), "right": scores}
        append(args.results, shared | row | {"clips": len(references)})
    for density in args.densities:
        variants = variants_of(pipe, density, args)
        if density == args.densities[0]:
            draw(variants["paro"][2], args.picture)
        for name, (recipe, options, _) in variants.items():
            if (name, density) in done:
                continue
            found = measure(pipe, recipe, options, references, args)
            row = shared | {"variant": name, "density": density, "block_size": args.block_size} | row_of(found, dense)
            append(args.results, row)
            print(
                json.dumps(
                    {n: row[n] for n in ("variant", "density", "psnr_db", "ssim", "right", "seconds_over_dense")}
                )
            )
    print(args.results, args.picture)


if __name__ == "__main__":
    main()
