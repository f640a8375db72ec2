"""Score zoo/dit or zoo/flux through its real pipeline: ``python -m patchkit.zoo.training.flow_evaluate dit|flux ...``.

The groups of captions, the detectors and the sheets are those of :mod:`patchkit.zoo.training.image_evaluate`. All
groups are scored with the default guidance and, since guidance methods are judged there, without any; then fewer
pictures, from other seeds, with other guidance and other numbers of steps. Writes ``evaluation.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from patchkit import media, zoo
from patchkit.zoo import stills
from patchkit.zoo.training.flow_assemble import PIPELINES
from patchkit.zoo.training.image_evaluate import draw_wanted, evaluate, generate, summarise, untrained

logger = logging.getLogger(__name__)

STEPS, GUIDANCE = 20, 1.5
SWEEP_SEED = 77  # not that of the report, because the default guidance was chosen by it
GUIDANCES, STEP_COUNTS = (1.0, 1.5, 2.0, 3.0), (5, 10, 20, 40)


def options(name: str, steps: int, guidance: float) -> dict[str, Any]:
    """Call arguments for ``steps`` steps with classifier-free guidance of ``guidance``; 1 is none."""
    call: dict[str, Any] = {"num_inference_steps": steps}
    if name == "dit":
        return call | {"guidance_scale": guidance}
    return call | ({"true_cfg_scale": guidance, "negative_prompt": ""} if guidance > 1 else {})


def sweep(pipe: Any, name: str, n: int, steps: int, guidance: float) -> dict[str, Any]:
    """Scores of one and two objects by guidance, and by the number of steps with and without guidance."""
    calls = {(steps, g) for g in GUIDANCES} | {(s, g) for s in STEP_COUNTS for g in (1.0, guidance)}
    result = {}
    for count, scale in sorted(calls, key=lambda c: (c[1], c[0])):
        key = f"{count} steps, guidance {scale:g}"
        result[key] = evaluate(pipe, n, SWEEP_SEED, None, ("one", "two"), **options(name, count, scale))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=PIPELINES)
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=200, help="pictures of each group")
    parser.add_argument("--sweep", type=int, default=64, help="pictures of each group and setting; 0 for no sweep")
    parser.add_argument("--control", type=int, default=20, help="pictures of the untrained control; 0 for none")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    pipe = zoo.load_folder(args.model, PIPELINES[args.name])
    result: dict[str, Any] = {}
    for key, guidance in (("guided", args.guidance), ("unguided", 1.0)):
        sheets, call = args.out / key, options(args.name, args.steps, guidance)
        sheets.mkdir(parents=True, exist_ok=True)
        result[key] = evaluate(pipe, args.n, args.seed, sheets, **call)
        empty = list(stills.descriptions(0)) * 5
        result[key]["none"] = summarise(empty, generate(pipe, [d.caption for d in empty], args.seed * 1000, **call))
    if args.sweep:
        result["sweep"] = sweep(pipe, args.name, args.sweep, args.steps, args.guidance)
    if args.control:
        wanted = draw_wanted(args.control, args.seed, "one")
        call = options(args.name, args.steps, args.guidance)
        pictures = generate(untrained(pipe), [w.caption for w in wanted], args.seed * 1000, **call)
        result["untrained_control"] = summarise(wanted, pictures)
    with media.replacing(args.out / "evaluation.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
