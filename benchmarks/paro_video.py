"""PAROAttention on zoo/video: plans from two prompts, judged on prompts and seeds that they never saw.

    python benchmarks/paro_video.py [--prompts 20] [--steps 20] [--densities 0.5 0.3 0.2] [--resume]
    python benchmarks/paro_video.py --time            adds rows of seconds; on a machine that does nothing else

For every density: the plan, the plan with INT8 products, masks of the same density made without reordering (the
paper's ablation), and AdaSpa; all from the same seeds, against the dense video. A row is written as soon as a variant
is done, and `--resume` goes on, with more prompts too. Draws the orders of each layer's heads.
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
VARIANTS = ("paro", "paro, model order", "adaspa", "paro, INT8", "paro, 0.2 dense", "adaspa, 0.2 dense")
REORDERED, PLAIN = "reordered", "model order"
SHAPE = "1088 video + 20 text tokens, 4 heads x 32, 6 layers, batch 2 (CFG)"
CALIBRATION = ("a green square moving left on a white background", "a yellow triangle moving up on a black background")


def generate(pipe: Any, prompt: str, seed: int, steps: int) -> tuple[Any, float]:
    """One clip as (F, 3, H, W) in [0, 1], and its seconds by :func:`clock`."""
    import torch

    from patchkit import zoo

    inputs = dict(zoo.defaults("video")) | {"prompt": prompt, "num_inference_steps": steps}
    begun = clock()
    frames = pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **inputs).frames[0]
    return frames.float(), clock() - begun


def clock() -> float:
    """Seconds: with one thread those of the processor, which do not count what others do on a shared machine."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def plans_of(pipe: Any, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """A plan with the chosen orders, and one whose heads all keep the model's order: same prompts, same density."""
    from patchkit import zoo
    from patchkit.recipes.paro import calibrate

    inputs = {n: v for n, v in zoo.defaults("video").items() if n not in ("prompt", "num_inference_steps", "fps")}
    options = {"num_inference_steps": args.steps, "block_size": args.block_size, "select": args.select, **inputs}
    found = {}
    for name, codes in ((REORDERED, None), (PLAIN, (0,))):
        kept = args.folder / f"{name.replace(' ', '-')}-{args.select}-{args.steps}-{args.block_size}"
        if args.select != "score":
            kept = kept / str(density)
        found[name] = calibrate(pipe, CALIBRATION, density, **options, codes=codes, folder=kept)
    return found


def unseen_mass(pipe: Any, plans: dict[str, Any], prompts: list[str], args: argparse.Namespace) -> dict[str, list[Any]]:
    """Block masses of dense runs of prompts that no plan was made with, in each plan's orders."""
    import torch

    import patchkit
    from patchkit.recipes.paro.figures import MassFigures, Seen
    from patchkit.recipes.paro.observing import Observe

    found: dict[str, list[Any]] = {}
    for name, plan in plans.items():
        for seed, prompt in enumerate(prompts):
            path = args.folder / f"unseen-{name.replace(' ', '-')}-{seed}-{args.steps}-{args.block_size}"
            if path.with_suffix(".pt").is_file():
                found.setdefault(name, []).append(torch.load(path.with_suffix(".pt"), weights_only=True))
                continue
            seen = Seen(geometry=geometry_of(plan))
            watcher = MassFigures(plan.facts.block, seen, plan.order, plan.facts.masks, path)
            with patchkit.apply(pipe, Observe(watcher=watcher)), torch.no_grad():
                generate(pipe, prompt, seed, args.steps)
            found.setdefault(name, []).append(watcher.sums.clone())
            torch.save(found[name][-1], path.with_suffix(".pt"))
            path.unlink()
    return found


def references_of(pipe: Any, prompts: list[str], args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The dense clip of every prompt; kept in the folder."""
    import torch

    found = []
    for seed, prompt in enumerate(prompts):
        path = args.folder / f"dense-{seed}-{args.steps}.pt"
        if not path.is_file():
            torch.save(generate(pipe, prompt, seed, args.steps)[0], path)
        found.append((prompt, torch.load(path, weights_only=True)))
    return found


def geometry_of(plan: Any) -> Any:
    """The sequences that a plan was made for."""
    from patchkit.context import Grid
    from patchkit.recipes.paro.geometry import Geometry

    grid, text = Grid(*plan.facts.grid), plan.facts.text[0]
    return Geometry(grid.tokens + text, grid, text if plan.facts.text_first else 0, plan.facts.block)


def held(plan: Any, masses: list[Any]) -> float:
    """Share of the mass of image blocks that a plan keeps, averaged over masks, layers and heads."""
    shares = [(mass * plan.masks).sum((-1, -2)) / mass.sum((-1, -2)) for mass in masses]
    return statistics.mean(float(share.mean()) for share in shares)


def variants_of(plans: dict[str, Any], density: float, args: argparse.Namespace) -> dict[str, tuple[str, dict, Any]]:
    """Name -> (recipe, options, plan)."""
    reordered, plain = plans[REORDERED], plans[PLAIN]
    sparse = {"density": density, "block_size": args.block_size, "min_tokens": 0}
    return {
        "paro": ("paro", {"plan": reordered}, REORDERED),
        "paro, model order": ("paro", {"plan": plain}, PLAIN),
        "adaspa": ("adaspa", sparse | {"warmup_steps": 0}, None),
        "paro, INT8": ("paro", {"plan": reordered, "qk": "int8", "pv": "int8"}, REORDERED),
        "paro, 0.2 dense": ("paro", {"plan": reordered, "warmup_steps": 0.2}, REORDERED),
        "adaspa, 0.2 dense": ("adaspa", sparse | {"warmup_steps": 0.2}, None),
    }


def measure(
    pipe: Any, recipe: str, options: dict[str, Any], references: list[Any], args: Any, kept: Path
) -> dict[str, list[Any]]:
    """Every prompt from its seed: distance to its dense video, detector scores, report. Clips in ``kept`` are done."""
    import patchkit
    from patchkit import metrics
    from patchkit.zoo import detect

    found: dict[str, list[Any]] = {"scores": [], "psnr": [], "ssim": [], "reports": []}
    clips = json.loads(kept.read_text()) if kept.is_file() else []
    for seed, (prompt, reference) in list(enumerate(references))[len(clips) :]:
        with patchkit.apply(pipe, recipe, **options) as patch:
            video, _ = generate(pipe, prompt, seed, args.steps)
            report = patch.report().to_dict()["recipes"][0]
        seen = {**report["means"], "dense": report["dense"], "counts": report["counts"]}
        near = {"psnr": float(metrics.psnr(video, reference)), "ssim": float(metrics.ssim(video, reference))}
        clips.append({"scores": detect.score(video, prompt), **near, "reports": seen})
        kept.write_text(json.dumps(clips))
    for clip in clips[: len(references)]:
        for name, value in clip.items():
            found[name].append(value)
    return found


def row_of(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Means over the clips."""
    reports = found["reports"]
    names = [n for n in ("actual_density", "density", "kept_mass", "recall") if all(n in r for r in reports)]
    mean = {n: statistics.mean(r[n] for r in reports) for n in names}
    sparse = statistics.mean(r["counts"].get("sparse", 0) for r in reports)
    dense = statistics.mean(sum(r["dense"].values()) for r in reports)
    return {
        "clips": len(found["psnr"]),
        "psnr_db": round(statistics.mean(found["psnr"]), 2),
        "psnr_worst_db": round(min(found["psnr"]), 2),
        "psnr_each": [round(x, 2) for x in found["psnr"]],
        "ssim": round(statistics.mean(found["ssim"]), 4),
        "right": rights(found["scores"]),
        "sparse_calls": round(sparse, 1),
        "dense_calls": round(dense, 1),
        **{name: round(value, 4) for name, value in mean.items()},
    }


def timed(pipe: Any, prompt: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a clip, dense and with plans of every density, in turns. INT8 is simulated on a CPU: not timed."""
    import patchkit

    cases: dict[tuple[str, float], Any] = {("dense", 1.0): None}
    for density in args.densities:
        plans = plans_of(pipe, density, args)
        cases |= {("paro", density): plans[REORDERED], ("paro, model order", density): plans[PLAIN]}
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    phases: dict[tuple[str, float], float] = {}
    for _ in range(args.rounds):
        for case, plan in cases.items():
            if plan is None:
                seconds[case].append(generate(pipe, prompt, 0, args.steps)[1])
                continue
            with patchkit.apply(pipe, "paro", plan=plan) as patch:
                seconds[case].append(generate(pipe, prompt, 0, args.steps)[1])
                phases[case] = patch.report().to_dict()["recipes"][0]["seconds"].get("sparse", 0.0)
    dense = min(seconds["dense", 1.0])
    return [
        {"variant": name, "density": density, "rounds": args.rounds, "seconds_a_clip": round(min(times), 3)}
        | {"over_dense": round(min(times) / dense, 3), "seconds_in_attention": round(phases.get((name, density), 0), 3)}
        for (name, density), times in seconds.items()
    ]


def rights(scores: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(statistics.mean(s[name] for s in scores), 3) for name in scores[0]}


def draw(plan: Any, path: Path) -> None:
    """The orders of each layer's heads as a stacked bar."""
    import matplotlib.pyplot as plt

    from patchkit.kernels.reorder import NAMES

    counts = plan.histogram()
    figure, axes = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    bottom = counts[:, 0] * 0
    for code, name in enumerate(NAMES):
        axes.bar(range(len(counts)), counts[:, code], bottom=bottom, label=f"{code} {name}")
        bottom = bottom + counts[:, code]
    heads = int(counts[0].sum())
    axes.set(xlabel="layer", ylabel="heads", title="Order of tokens chosen for each head of zoo/video")
    axes.set(xticks=range(len(counts)), yticks=range(heads + 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", title="order", fontsize="small")
    figure.savefig(path, dpi=120)


def judge(pipe: Any, args: argparse.Namespace, prompts: list[str], shared: dict[str, Any]) -> None:
    """Quality of all variants at all densities; the ones that matter most come first."""
    from rows import read

    from patchkit.zoo import detect

    rows = {(r["variant"], r["density"]): r for r in read(args.results) if r["what"] == shared["what"]}
    done = {case for case, row in rows.items() if row["clips"] >= len(prompts)}
    plans = {density: plans_of(pipe, density, args) for density in args.densities}
    draw(plans[args.densities[0]][REORDERED], args.picture)
    masses = unseen_mass(pipe, plans[args.densities[0]], prompts[:2], args)
    references = references_of(pipe, prompts, args)
    if ("dense", 1.0) not in done:
        scores = rights([detect.score(video, prompt) for prompt, video in references])
        row = {"variant": "dense", "density": 1.0, "right": scores, "clips": len(references)}
        put(args.results, shared | row)
    wanted = [(n, d) for some in (args.variants[:3], args.variants[3:]) for d in args.densities for n in some]
    for name, density in [case for case in wanted if case not in done][: args.rows]:
        recipe, options, used = variants_of(plans[density], density, args)[name]
        kept = args.folder / f"{name.replace(' ', '-').replace(',', '')}-{density}-{args.steps}-{args.block_size}.json"
        row = row_of(measure(pipe, recipe, options, references, args, kept))
        if used is not None:
            row["kept_mass_unseen"] = round(held(plans[density][used], masses[used]), 4)
        head = {"variant": name, "density": density, "block_size": args.block_size}
        put(args.results, shared | head | row)
        print(json.dumps({**head, **{n: row[n] for n in ("clips", "psnr_db", "ssim", "right")}}), flush=True)


def put(path: Path, row: dict[str, Any]) -> None:
    """Add a row in the place of one of the same variant and density."""
    from rows import read

    key = ("what", "variant", "density")
    others = [r for r in read(path) if [r[k] for k in key] != [row[k] for k in key]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in [*others, row]))


def main() -> None:
    import torch
    from rows import RESULTS, conditions

    from patchkit import zoo
    from patchkit.zoo import world

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--select", choices=("score", "kept_mass"), default="score")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/paro"))
    parser.add_argument("--picture", type=Path, default=Path("docs/paro-orders.png"))
    parser.add_argument("--results", type=Path, default=RESULTS / "paro_video.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--rows", type=int, default=None, help="stop after so many rows; all")
    parser.add_argument("--time", action="store_true", help="add rows of seconds a clip instead of quality")
    parser.add_argument("--rounds", type=int, default=2, help="with --time: clips of each variant")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    pipe = zoo.load("video")
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(1234)
    prompts = [world.sample_scene(rng).caption for _ in range(args.prompts)]
    generate(pipe, prompts[0], 0, 2)
    shared = conditions() | {"what": "paro on zoo/video", "shape": SHAPE, "steps": args.steps, "select": args.select}
    if args.time:
        for row in timed(pipe, prompts[0], args):
            head = {"clock": "processor" if args.threads == 1 else "wall", "block_size": args.block_size}
            put(args.results, shared | head | {"what": "seconds of paro on zoo/video"} | row)
        return
    if not args.resume:
        args.results.unlink(missing_ok=True)
    judge(pipe, args, prompts, shared)


if __name__ == "__main__":
    main()
