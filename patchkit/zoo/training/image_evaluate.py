"""Score a zoo image model through its real pipeline: ``python -m patchkit.zoo.training.image_evaluate --model DIR``.

Captions are drawn with fixed seeds in groups: one object, two objects, and two kinds of what the training never saw.
The pixel detectors judge the decoded pictures. Inversion and word swaps are measured on new renders. Writes
``evaluation.json`` and contact sheets.
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
from patchkit.zoo import stills
from patchkit.zoo.detect_stills import ATTRIBUTES, detect
from patchkit.zoo.stills import Description
from patchkit.zoo.training.evaluate import share_of
from patchkit.zoo.training.inversion import draw_stills, round_trip, swaps

logger = logging.getLogger(__name__)

GROUPS = {"one": ("", 1), "two": ("", 2), "new_items": ("item", 2), "new_scenes": ("scene", 2)}
STEPS, GUIDANCE = 25, 2.0


def draw_wanted(n: int, seed: int, group: str) -> list[Description]:
    """``n`` different descriptions of a group (they start over when there are no more)."""
    held_out, count = GROUPS[group]
    pool = [d for d in stills.descriptions(count) if d.held_out == held_out]
    rng = random.Random(f"{group}/{seed}")
    order: list[Description] = []
    while len(order) < n:
        order += rng.sample(pool, len(pool))
    return order[:n]


def generate(pipe: Any, prompts: list[str], seed: int, batch: int = 25, **call: Any) -> Tensor:
    """(n, 3, H, W) pictures; picture i starts from noise of seed ``seed + i`` whatever the batch size."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        negative = {"negative_prompt": [call["negative_prompt"]] * len(part)} if "negative_prompt" in call else {}
        pictures.append(pipe(part, generator=generators, output_type="pt", **call | negative).images)
    return torch.cat(pictures).float()


def summarise(wanted: list[Description], pictures: Tensor) -> dict[str, Any]:
    """Share right per attribute, of those descriptions that speak of it, and for all together, with intervals."""
    reads = [detect(p) for p in pictures]
    rights = [read.right(w) for read, w in zip(reads, wanted, strict=True)]
    summary: dict[str, Any] = {"n": len(wanted)}
    for name in (*ATTRIBUTES, "all"):
        flags = [all(r.values()) if name == "all" else r[name] for r in rights if name == "all" or name in r]
        if flags:
            summary[name] = share_of(flags)
    outlines = [o.iou for read in reads for o in read.objects]
    summary["mean_template_iou"] = round(sum(outlines) / max(1, len(outlines)), 4)
    return summary


def untrained(pipe: Any, seed: int = 0) -> Any:
    """``pipe`` with a denoiser of random weights."""
    torch.manual_seed(seed)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, name)
    setattr(pipe, name, type(denoiser).from_config(denoiser.config).to(pipe.dtype).eval())
    return pipe


def sheet(wanted: list[Description], pictures: Tensor, columns: int = 8) -> Tensor:
    """(1, 3, H, W) pictures side by side, those that the detectors call wrong in a red frame."""
    tiles = torch.ones(len(pictures), 3, pictures.shape[2] + 8, pictures.shape[3] + 8)
    for tile, picture, description in zip(tiles, pictures, wanted, strict=True):
        if not all(detect(picture).right(description).values()):
            tile[:] = torch.tensor([0.9, 0.0, 0.0]).view(3, 1, 1)
        tile[:, 4:-4, 4:-4] = picture
    rows = [torch.cat(list(tiles[n : n + columns]), dim=2) for n in range(0, len(tiles) // columns * columns, columns)]
    return torch.cat(rows, dim=1)[None]


def evaluate(
    pipe: Any, n: int, seed: int, out: Path | None, groups: Sequence[str] = tuple(GROUPS), **call: Any
) -> dict[str, Any]:
    """The scores of every group; their contact sheets go to ``out``."""
    result: dict[str, Any] = {}
    for group in groups:
        number = list(GROUPS).index(group)  # of the noise, the same whatever other groups are asked for
        wanted, begun = draw_wanted(n, seed, group), time.time()
        pictures = generate(pipe, [w.caption for w in wanted], seed * 1000 + 100_000 * number, **call)
        seconds = (time.time() - begun) / n
        result[group] = summarise(wanted, pictures) | {"seconds_per_picture": round(seconds, 3)}
        if n >= 8 and out is not None:
            media.save_image(sheet(wanted[:40], pictures[:40]), out / f"{group}.png", scale=2)
        logger.info("%s: %s", group, {k: v["share"] for k, v in result[group].items() if isinstance(v, dict)})
    return result | {"seed": seed, "threads": torch.get_num_threads(), "call": call}


def inversions(pipe: Any, n: int, seed: int, steps: Sequence[int] = (20, 50)) -> dict[str, Any]:
    """Round trips with both kinds of scheduler, with words and without, and word swaps at guidance 1 and 2."""
    pipe.set_progress_bar_config(disable=True)
    pictures, result = draw_stills(n, seed), {}
    for kind, count in [(kind, count) for kind in ("ddim", "dpm++") for count in steps]:
        for with_words in (True, False):
            name = f"{kind}, {count} steps, {'caption' if with_words else 'no words'}"
            result[name] = round_trip(pipe, pictures, kind, count, with_words)
            logger.info("%s: %s", name, result[name])
    for guidance in (1.0, 2.0):
        name = f"swaps, guidance {guidance:g}"
        result[name] = swaps(pipe, pictures, steps[-1], guidance, seed)
        logger.info("%s: %s", name, result[name])
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100, help="pictures of each group")
    parser.add_argument("--inversions", type=int, default=50, help="renders that are inverted; 0 for none")
    parser.add_argument("--control", type=int, default=20, help="pictures of the untrained control; 0 for none")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pipe = zoo.load_folder(args.model, "StableDiffusionPipeline")
    result: dict[str, Any] = {"trained": evaluate(pipe, args.n, args.seed, args.out, **call)}
    if args.inversions:
        result["inversion"] = inversions(pipe, args.inversions, args.seed)
    if args.control:
        wanted = draw_wanted(args.control, args.seed, "one")
        pictures = generate(untrained(pipe), [w.caption for w in wanted], args.seed * 1000, **call)
        result["untrained_control"] = summarise(wanted, pictures)
    with media.replacing(args.out / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
