"""The standard suite: recipes on a zoo model, on prompts and seeds that are always the same.

    python benchmarks/shapeworld.py [FILE|NAME ...] [--model zoo/video] [--output out/shapeworld-video]

Writes what `patchkit compare` writes: a page to look at, a table, a row a sample; and a row a variant to
benchmarks/results/shapeworld.jsonl. Stopped, it goes on where it was. Steps, guidance and size are the model's own,
whatever the recipe files say.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, spinning threads stop each other

PROMPTS, SEEDS = 24, 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=["adaspa"], help="recipe files or names; adaspa if none is given")
    parser.add_argument("--model", default="zoo/video")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=None, help="fewer than the model's own, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def request_of(args: argparse.Namespace) -> Any:
    """The request, with the model's own inputs in the place of those of the recipe files."""
    from patchkit import zoo
    from patchkit.evaluation import request
    from patchkit.recipe_files import files
    from patchkit.recipe_files.fields import Output

    name = args.model.removeprefix("zoo/")
    inputs = {n: v for n, v in zoo.defaults(name).items() if n != "prompt"} | {"seed": 0}
    if args.steps is not None:
        inputs["num_inference_steps"] = args.steps
    output = Output(args.output or Path("out") / f"shapeworld-{name}", folder=True)
    sources = []
    for source in args.recipes:
        document = files.locate(source)
        for field, value in (("model", f"zoo/{name}"), ("inputs", inputs), ("compare", None), ("output", None)):
            document.put((field,), value, "benchmarks/shapeworld.py")
        sources.append((Path(source).stem, dataclasses.replace(files.parse(document), output=output)))
    return request.make(sources, prompts=str(args.prompts), seeds=args.seeds)


def run(request: Any, **options: Any) -> Any:
    from patchkit.evaluation import suite

    return suite.run(request, **options)


def keep(found: Any) -> Path:
    """A row a variant, beside those of other models and days."""
    import rows

    path = rows.RESULTS / "shapeworld.jsonl"
    summary = found.summary
    shared = rows.conditions() | {n: summary[n] for n in ("model", "inputs", "prompts", "seeds", "dtype", "date")}
    for name, variant in summary["variants"].items():
        rows.append(path, shared | {"variant": name, "recipes": variant["recipes"], "figures": variant["figures"]})
    return path


def show(found: Any, kept: Path) -> None:
    print(found.files["table"].read_text())
    print(found.files["page"], kept, sep="\n")


def main() -> int:
    import torch

    from patchkit.errors import PatchkitError

    args = arguments()
    torch.set_num_threads(args.threads)
    try:
        request = request_of(args)
        found = run(request, say=print, progress=print)
    except PatchkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found, keep(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
