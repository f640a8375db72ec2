"""DeltaLLM on Gemma 3 270M: perplexity against sparsity and kept rows, ablations, rivals, continuations.

    python benchmarks/deltallm_quality.py                  everything that results/deltallm_quality.jsonl lacks
    python benchmarks/deltallm_quality.py --seconds 150    as much of it as begins within that time

Perplexity is that of tokens 1,024 to 2,047 of the text that ships with the project (no model has read it), each
predicted from all tokens before it in one forward. Thresholds are calibrated on tokens 2,048 and later, which are not
predicted. Runs mode works on the 3 layers of 18 that attend to everything; elements mode on all.
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
from deltallm_rivals import Rival
from rows import RESULTS, append, conditions, read

import patchkit
from patchkit import zoo
from patchkit.recipes.deltallm import DeltaLLM
from patchkit.recipes.deltallm.calibration import keys_of, thresholds

TOKENS, PREDICTED = 2048, 1024
TARGETS = (0.3, 0.5, 0.7)
PROMPT, CONTINUED = 512, 64


def variants() -> list[dict[str, Any]]:
    """Name and what to do, the questions that matter most first."""
    found: list[dict[str, Any]] = [{"variant": "dense"}]
    found += [{"variant": "elements", "target": t, "window_kind": "block"} for t in TARGETS[:2]]
    found += [{"variant": "runs", "metric": m, "target": 0.5} for m in ("max", "euclidean", "cosine")]
    found += [{"variant": "runs", "metric": "euclidean", "target": 0.5, "run_key": "mean"}]
    found += [
        {"variant": "rival", "how": how, "metric": "euclidean", "target": 0.5}
        for how in ("evict", "merge", "first value", "no window", "runs")
    ]
    found += [{"variant": "runs", "metric": "euclidean", "target": t} for t in (0.3, 0.7, 0.85)]
    found += [
        {"variant": "rival", "how": h, "metric": "euclidean", "target": t}
        for t in (0.7, 0.85)
        for h in ("evict", "merge")
    ]
    found += [{"variant": "runs", "metric": "euclidean", "target": 0.5, "window_kind": "block"}]
    found += [{"variant": "runs", "metric": "euclidean", "target": 0.5, "shared": True}]
    found += [{"variant": "rival", "how": "no window", "metric": "euclidean", "target": 0.7}]
    found += [{"variant": "elements", "target": 0.5, "window_kind": "block", "shared": True}]
    found += [{"variant": "elements", "target": 0.7, "window_kind": "block"}]
    found += [{"variant": "elements", "target": 0.5, "window_kind": "sliding"}]
    return found


class Bench:
    """The model, its text, and the thresholds that have been found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, tokenizer = zoo.load("zoo/gemma", torch_dtype=torch.float32)
        self.ids = tokenizer(zoo.prose(), return_tensors="pt").input_ids
        self.known: dict[str, dict[str, Any]] = {}
        self.thetas: Path = args.thetas
        self.keys: list[list[torch.Tensor]] = []

    def options(self, one: dict[str, Any]) -> dict[str, Any]:
        """Options with calibrated thresholds; ``shared``: their mean for all layers."""
        elements = one["variant"] == "elements"
        setting: dict[str, Any] = {"mode": "elements"} if elements else {"metric": one["metric"]}
        setting |= {k: one[k] for k in ("window_kind",) if k in one}
        key = str((setting, one["target"]))
        if key not in self.known:
            for row in read(self.thetas):
                self.known[row["key"]] = row["options"]
        if key not in self.known:
            if not self.keys:  # of all layers, for every setting
                self.keys = keys_of(self.model, [self.ids[:, TOKENS:]], DeltaLLM(mode="elements"))
            recipe = DeltaLLM(**setting)
            keys = [mine if elements or layer % 6 == 5 else [] for layer, mine in enumerate(self.keys)]
            found = {**setting, "theta": thresholds(keys, recipe, one["target"])}
            self.known[key] = found
            append(self.thetas, {"key": key, "options": found})
        found = dict(self.known[key])
        if one.get("shared"):
            used = [t for t in found["theta"] if t]
            found["theta"] = sum(used) / len(used)
        return found

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
        if one["variant"] == "rival":
            recipe: Any = Rival(how=one["how"], theta=options["theta"], metric=one["metric"])
        else:
            more = {} if one["variant"] == "elements" else {"min_tokens": 0}
            recipe = DeltaLLM(**options, **more, **({"run_key": "mean"} if "run_key" in one else {}))
        with patchkit.apply(self.model, recipe) as patch:
            out = self.perplexity()
            means = patch.report()["recipes"][0]["means"]
        out |= {k: round(v, 4) for k, v in means.items() if k in ("sparsity", "unchanged", "removed", "kept")}
        out["theta"] = options["theta"]
        if dense is not None:
            change = out["losses"] - dense
            out["loss_change"] = round(float(change.mean()), 5)
            out["loss_change_error"] = round(float(change.std()) / math.sqrt(len(change)), 5)
        return out

    def continuation(self, recipe: Any) -> list[int]:
        run = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED, "do_sample": False}
        if recipe is None:
            return self.model.generate(self.ids[:, :PROMPT], **run)[0, PROMPT:].tolist()
        with patchkit.apply(self.model, recipe):
            return self.model.generate(self.ids[:, :PROMPT], **run)[0, PROMPT:].tolist()


def agreement(a: list[int], b: list[int]) -> dict[str, Any]:
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return {"same_until": first, "same": round(sum(x == y for x, y in zip(a, b, strict=True)) / len(a), 3)}


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
    continued = [{"variant": "continuation", "mode": m} for m in ("runs", "elements")]
    pending += [one for one in continued if one not in done]
    if not pending:
        return 0
    bench = Bench(args)
    dense = torch.load(args.losses) if args.losses.is_file() else None
    plain: list[int] | None = None
    for one in pending if args.calibrate else ():
        if "target" in one:
            print(one, bench.options(one), flush=True)
    for one in pending if not args.calibrate else ():
        if time.monotonic() - begun > args.seconds:
            return 0
        if one["variant"] == "continuation":
            setting = {"variant": one["mode"], "metric": "euclidean", "target": 0.5, "window_kind": "block"}
            setting = setting if one["mode"] == "elements" else {**setting, "window_kind": "sliding"}
            options = bench.options(setting)
            plain = plain or bench.continuation(None)
            more = {"min_tokens": 0} if one["mode"] == "runs" else {}
            found = agreement(plain, bench.continuation(DeltaLLM(**options, **more))) | {"prompt": PROMPT}
        else:
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
