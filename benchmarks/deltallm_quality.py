"""DeltaLLM's element mode on Gemma 3 270M: perplexity against the paper's sparsity.

    python benchmarks/deltallm_quality.py                  everything that results/deltallm_quality.jsonl lacks
    python benchmarks/deltallm_quality.py --seconds 150    as much of it as begins within that time

Perplexity is that of tokens 1,024 to 2,047 of the text that ships with the project (no model has read it), each
predicted from all tokens before it in one forward. Thresholds are calibrated on tokens 2,048 and later, which are not
predicted.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions, read

import patchkit
from patchkit import zoo
from patchkit.recipes.deltallm import DeltaLLM
from patchkit.recipes.deltallm.calibration import keys_of, thresholds

TOKENS, PREDICTED = 2048, 1024
TARGETS = (0.3, 0.5, 0.7)


def variants() -> list[dict[str, Any]]:
    """What to measure."""
    found: list[dict[str, Any]] = [{"variant": "dense"}]
    return found + [{"variant": "elements", "target": t, "window_kind": "block"} for t in TARGETS]


class Bench:
    """The model, its text, and the thresholds that have been found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, tokenizer = zoo.load("zoo/gemma", torch_dtype=torch.float32)
        self.ids = tokenizer(zoo.prose(), return_tensors="pt").input_ids
        self.known: dict[str, dict[str, Any]] = {}
        self.thetas: Path = args.thetas
        self.keys: list[list[torch.Tensor]] = []

    def options(self, one: dict[str, Any]) -> dict[str, Any]:
        """Options with calibrated thresholds."""
        setting: dict[str, Any] = {"mode": "elements", "window_kind": one["window_kind"]}
        key = str((setting, one["target"]))
        if key not in self.known:
            for row in read(self.thetas):
                self.known[row["key"]] = row["options"]
        if key not in self.known:
            if not self.keys:  # of all layers, for every setting
                self.keys = keys_of(self.model, [self.ids[:, TOKENS:]], DeltaLLM(mode="elements"))
            recipe = DeltaLLM(**setting)
            found = {**setting, "theta": thresholds(self.keys, recipe, one["target"])}
            self.known[key] = found
            append(self.thetas, {"key": key, "options": found})
        return self.known[key]

    @torch.no_grad()
    def perplexity(self) -> dict[str, Any]:
        ids = self.ids[:, :TOKENS]
        logits = self.model(ids, use_cache=False, logits_to_keep=PREDICTED + 1).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[0, -PREDICTED:], reduction="none").double()
        return {"perplexity": round(math.exp(float(losses.mean())), 4), "losses": losses}

    def row(self, one: dict[str, Any], dense: torch.Tensor | None) -> dict[str, Any]:
        if one["variant"] == "dense":
            return self.perplexity()
        options = self.options(one)
        recipe = DeltaLLM(**options)
        with patchkit.apply(self.model, recipe) as patch:
            out = self.perplexity()
            means = patch.report()["recipes"][0]["means"]
        out |= {k: round(v, 4) for k, v in means.items() if k in ("sparsity", "unchanged")}
        out["theta"] = options["theta"]
        if dense is not None:
            change = out["losses"] - dense
            out["loss_change"] = round(float(change.mean()), 5)
            out["loss_change_error"] = round(float(change.std()) / math.sqrt(len(change)), 5)
        return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--calibrate", action="store_true", help="only find the thresholds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "deltallm_quality.jsonl")
    parser.add_argument("--thetas", type=Path, default=RESULTS / "deltallm_thetas.jsonl")
    parser.add_argument("--losses", type=Path, default=Path("dense-losses.pt"), help="of the dense model, kept here")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    done = [{k: r[k] for k in r["asked"]} for r in read(args.out)]
    pending = [one for one in variants() if one not in done]
    if not pending:
        return 0
    bench = Bench(args)
    dense = torch.load(args.losses) if args.losses.is_file() else None
    for one in pending if args.calibrate else ():
        if "target" in one:
            print(one, bench.options(one), flush=True)
    for one in pending if not args.calibrate else ():
        if time.monotonic() - begun > args.seconds:
            return 0
        found = bench.row(one, dense)
        if one["variant"] == "dense":
            dense = found["losses"]
            torch.save(dense, args.losses)
        found.pop("losses")
        row = conditions("cpu") | {"model": "zoo/gemma", "dtype": "fp32", "tokens": TOKENS, "predicted": PREDICTED}
        append(args.out, row | one | found | {"asked": list(one)})
        print(one, {k: v for k, v in found.items() if k != "theta"}, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
