"""MoH on language models: what heads that are off cost untuned, and what tuning gets back.

    python benchmarks/moh_tuning.py preview zoo/gemma --text out/gemma-writes.txt   perplexity at several budgets
    python benchmarks/moh_tuning.py training out/moh-gemma --label gemma --threads 2   a row of a training

``preview``: perplexity of the end of the text, cut as `patchkit train` cuts it, so its figures stand beside that
command's. Budgets are (shared, active); where the two are equal nothing is chosen, and the same heads are on for every
token: what choosing gains shows beside those. ``recovered`` of a training is the share of the loss (mean negative
log-likelihood) lost untuned that tuning got back, against the dense model tuned as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions

import patchkit
from patchkit import zoo
from patchkit.finetune.rows import split
from patchkit.text_metrics import perplexity

TABLE = RESULTS / "moh_tuning.jsonl"
BUDGETS = ((0.5, 1.0), (0.5, 0.75), (0.75, 0.75), (0.25, 0.5), (0.5, 0.5))


def load(name: str) -> tuple[Any, Any]:
    """A model of the zoo (``zoo/NAME``), or a folder, with its tokenizer."""
    if name.startswith("zoo/"):
        return zoo.load(name.removeprefix("zoo/"))[:2]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def preview(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else zoo.prose()
    _, held = split(text, args.held_out)
    about = {"benchmark": "moh_tuning", "what": "preview", "model": args.label or args.model, "window": args.window}
    about |= {"text": args.text.name if args.text else "prose", "heads": model.config.num_attention_heads}
    for budget in [None, *BUDGETS]:
        patch: Any = contextlib.nullcontext()
        if budget is not None:
            patch = patchkit.apply(model, "moh", shared=budget[0], active=budget[1])
        with patch:
            found = perplexity(model, tokenizer, held, args.window, args.window // 2)
        options = {} if budget is None else {"shared": budget[0], "active": budget[1]}
        row = about | options | {"perplexity": round(found.value, 4), "error": round(found.error, 4)}
        append(TABLE, conditions("cpu") | row | {"tokens": found.tokens})
        print(f"{options or 'dense'}: {found.value:.3f} +- {found.error:.3f}", flush=True)


def training(args: argparse.Namespace) -> None:
    found = json.loads((args.folder / "training.json").read_text())
    facts, dense, tuned = found["facts"], found["dense"]["perplexity"], found["tuned"]
    base = found.get("baseline")
    row = {"benchmark": "moh_tuning", "what": "training", "model": args.label, "recipe": facts["recipe"]}
    row |= {"section": facts["section"], "dense": dense, "before": tuned["before"], "after": tuned["after"]}
    row |= {"tokens": tuned["tokens"], "minutes": round(tuned["seconds"] / 60, 1), "curve": tuned["curve"]}
    if base is not None:
        lost, left = (math.log(tuned[when] / base["after"]) for when in ("before", "after"))
        row |= {"baseline": base["after"], "baseline_minutes": round(base["seconds"] / 60, 1)}
        row |= {"baseline_curve": base["curve"], "recovered": round(1 - left / lost, 4)}
    append(TABLE, conditions("cpu") | {"threads": args.threads} | row)
    print(json.dumps(row, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("preview")
    one.add_argument("model", help="zoo/NAME or a folder")
    one.add_argument("--text", type=Path, help="the story that ships with the project")
    one.add_argument("--held-out", type=float, default=0.05)
    one.add_argument("--window", type=int, default=256)
    one.add_argument("--label", default="")
    one.add_argument("--threads", type=int, default=os.cpu_count())
    one.set_defaults(do=preview)
    two = parts.add_parser("training")
    two.add_argument("folder", type=Path)
    two.add_argument("--label", required=True)
    two.add_argument("--threads", type=int, required=True, help="that it had")
    two.set_defaults(do=training)
    args = parser.parse_args()
    args.do(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
