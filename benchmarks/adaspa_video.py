"""AdaSpa on zoo/video over densities: distance to the dense video, what the detectors read, recall, seconds.

    python benchmarks/adaspa_video.py [--prompts 20] [--steps 20]

The same prompts and seeds for every density; dense and patched runs alternate, so that the machine's moods hit both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, spinning threads stop each other

DENSITIES = (0.1, 0.2, 0.3, 0.5)


def generate(pipe: Any, prompt: str, seed: int, steps: int) -> tuple[Any, float]:
    """One clip as (F, 3, H, W) in [0, 1], and the seconds of its denoising."""
    import torch

    from patchkit import zoo

    inputs = dict(zoo.defaults("video")) | {"prompt": prompt, "num_inference_steps": steps}
    begun = time.perf_counter()
    frames = pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **inputs).frames[0]
    return frames.float(), time.perf_counter() - begun


def summary(report: dict[str, Any]) -> dict[str, Any]:
    recipe = report["recipes"][0]
    means = recipe["means"]
    return {
        "actual_density": round(means.get("actual_density", 1.0), 4),
        "recall": round(means.get("recall", 1.0), 4),
        "searches": recipe["counts"].get("searches", 0),
        "sparse_calls": recipe["counts"].get("sparse", 0),
        "dense_calls": sum(recipe["dense"].values()),
        "seconds_by_phase": recipe["seconds"],
    }


def measure(pipe: Any, prompts: list[str], steps: int, block_size: int) -> dict[Any, dict[str, list[Any]]]:
    """Each prompt dense and at each density, from the same seed: times, scores, distances to dense, reports."""
    import patchkit
    from patchkit import metrics
    from patchkit.zoo import detect

    results: dict[Any, dict[str, list[Any]]] = {
        d: {"seconds": [], "scores": [], "psnr": [], "ssim": [], "reports": []} for d in ("dense", *DENSITIES)
    }
    for seed, prompt in enumerate(prompts):
        reference, seconds = generate(pipe, prompt, seed, steps)
        results["dense"]["seconds"].append(seconds)
        results["dense"]["scores"].append(detect.score(reference, prompt))
        for density in DENSITIES:
            options = {"density": density, "block_size": block_size, "min_tokens": 0}
            with patchkit.apply(pipe, "adaspa", **options) as patch:
                video, seconds = generate(pipe, prompt, seed, steps)
                report = patch.report().to_dict()
            entry = results[density]
            entry["seconds"].append(seconds)
            entry["scores"].append(detect.score(video, prompt))
            entry["psnr"].append(float(metrics.psnr(video, reference)))
            entry["ssim"].append(float(metrics.ssim(video, reference)))
            entry["reports"].append(summary(report))
    return results


def row_of(entry: dict[str, list[Any]], dense_seconds: float) -> dict[str, Any]:
    """Medians and means of one density."""
    row: dict[str, Any] = {
        "clips": len(entry["seconds"]),
        "seconds_a_clip": round(statistics.median(entry["seconds"]), 3),
        "seconds_over_dense": round(statistics.median(entry["seconds"]) / dense_seconds, 3),
        "right": {name: round(statistics.mean(s[name] for s in entry["scores"]), 3) for name in entry["scores"][0]},
    }
    if entry["psnr"]:
        row |= {
            "psnr_db": round(statistics.mean(entry["psnr"]), 2),
            "psnr_worst_db": round(min(entry["psnr"]), 2),
            "ssim": round(statistics.mean(entry["ssim"]), 4),
            **entry["reports"][-1],
            "recall": round(statistics.mean(r["recall"] for r in entry["reports"]), 4),
        }
    return row


def main() -> None:
    import torch
    from rows import write

    from patchkit import zoo
    from patchkit.zoo import world

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = zoo.load("video")
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(1234)
    prompts = [world.sample_scene(rng).caption for _ in range(args.prompts)]
    generate(pipe, prompts[0], 0, 2)
    results = measure(pipe, prompts, args.steps, args.block_size)
    dense_seconds = statistics.median(results["dense"]["seconds"])
    rows = []
    for density, entry in results.items():
        row = {
            "what": "adaspa on zoo/video",
            "density": density,
            "block_size": args.block_size,
            "steps": args.steps,
            "shape": "1088 video + 20 text tokens, 4 heads x 32, 6 layers, batch 2 (CFG)",
        } | row_of(entry, dense_seconds)
        rows.append(row)
        print(json.dumps(row))
    print(write("adaspa_video", rows))


if __name__ == "__main__":
    main()
