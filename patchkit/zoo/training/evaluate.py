"""Score a zoo video model through its real pipeline: ``python -m patchkit.zoo.training.evaluate --out DIR``.

Prompts are drawn without replacement from all that the world's grammar can say, noise seeds are fixed, and the pixel
detectors judge the decoded clips. The same is done for a denoiser with random weights, which shows what the figures
are worth. Writes ``evaluation.json`` and contact sheets.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit import media, zoo
from patchkit.intervals import wilson
from patchkit.zoo import world
from patchkit.zoo.detect import ATTRIBUTES, Detection, detect
from patchkit.zoo.world import Scene

logger = logging.getLogger(__name__)


def share_of(flags: Sequence[bool]) -> dict[str, Any]:
    """Share of flags that are set, with its 95 % interval."""
    low, high = wilson(sum(flags), len(flags))
    share = sum(flags) / len(flags)
    return {"of": len(flags), "share": round(share, 4), "interval95": [round(low, 4), round(high, 4)]}


def draw_scenes(n: int, seed: int) -> list[Scene]:
    """``n`` scenes with different captions (the captions start over when there are no more)."""
    rng = random.Random(seed)
    order: list[tuple[str, str, str, str]] = []
    while len(order) < n:
        order += rng.sample(world.combinations(), len(world.combinations()))
    return [world.sample_scene(rng, combination) for combination in order[:n]]


def untrained(pipe: Any, seed: int = 0) -> Any:
    """``pipe`` with a denoiser of random weights."""
    torch.manual_seed(seed)
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).to(pipe.dtype).eval()
    return pipe


def generate(pipe: Any, prompts: list[str], seed: int, batch: int, **call: Any) -> Tensor:
    """(n, F, 3, H, W) clips; clip i starts from noise of seed ``seed + i`` whatever the batch size."""
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        clips.append(pipe(part, generator=generators, output_type="pt", **call).frames)
        logger.info("%d of %d clips", start + len(part), len(prompts))
    return torch.cat(clips)


def summarise(wanted: list[Scene], read: list[Detection]) -> dict[str, Any]:
    """Share right per attribute and for all together, with intervals; what was mistaken for what."""
    n = len(wanted)
    rights = [d.right(Detection.of_scene(s)) for s, d in zip(wanted, read, strict=True)]
    summary: dict[str, Any] = {"n": n}
    for name in (*ATTRIBUTES, "all"):
        right = sum(all(r.values()) if name == "all" else r[name] for r in rights)
        low, high = wilson(right, n)
        summary[name] = {"right": right, "share": round(right / n, 4), "interval95": [round(low, 4), round(high, 4)]}
    mistakes: dict[str, int] = {}
    for s, d in zip(wanted, read, strict=True):
        for name in ATTRIBUTES:
            if getattr(s, name) != getattr(d, name):
                key = f"{name}: {getattr(s, name)} read as {getattr(d, name)}"
                mistakes[key] = mistakes.get(key, 0) + 1
    summary["mistakes"] = dict(sorted(mistakes.items(), key=lambda item: -item[1]))
    summary["mean_template_iou"] = round(sum(d.iou for d in read) / n, 4)
    return summary


def evaluate(pipe: Any, n: int, seed: int, batch: int, **call: Any) -> tuple[dict[str, Any], list[Scene], Tensor]:
    """Scores of ``n`` clips, and the scenes and clips themselves."""
    scenes = draw_scenes(n, seed)
    begun = time.time()
    clips = generate(pipe, [s.caption for s in scenes], seed * 1000, batch, **call)
    seconds = (time.time() - begun) / n
    summary = summarise(scenes, [detect(clip) for clip in clips])
    summary |= {"seed": seed, "seconds_per_clip": round(seconds, 2), "threads": torch.get_num_threads(), "call": call}
    return summary, scenes, clips


def sheet(scenes: list[Scene], clips: Tensor, rows: int = 12) -> Tensor:
    """A contact sheet whose labels say what was asked for and, where it differs, what was read."""
    videos = {}
    for index, (scene, clip) in enumerate(zip(scenes[:rows], clips[:rows], strict=True)):
        read = detect(clip)
        wrong = [f"{k} {getattr(read, k)}" for k, ok in read.right(Detection.of_scene(scene)).items() if not ok]
        videos[f"{index}: {scene.caption}" + (f"   (read: {', '.join(wrong)})" if wrong else "")] = clip
    return media.contact_sheet(videos, scale=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the packaged model by default")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--control", type=int, default=20, help="clips of the untrained control; 0 for none")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=zoo.defaults("video")["num_inference_steps"])
    parser.add_argument("--guidance", type=float, default=zoo.defaults("video")["guidance_scale"])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pipe = zoo.load_folder(args.model or zoo.path("video"), "CogVideoXPipeline")
    trained, scenes, clips = evaluate(pipe, args.n, args.seed, args.batch, **call)
    result = {"trained": trained}
    media.save_image(sheet(scenes, clips), args.out / "contact-sheet.png", scale=1)
    if args.control:
        result["untrained_control"], _, _ = evaluate(untrained(pipe), args.control, args.seed, args.batch, **call)
    with media.replacing(args.out / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    for name, summary in result.items():
        logger.info("%s: %s", name, {k: summary[k]["share"] for k in (*ATTRIBUTES, "all")})


if __name__ == "__main__":
    main()
