"""DeltaLLM on Gemma 3 270M: perplexity against sparsity and kept rows, ablations, rivals, continuations.

    python benchmarks/deltallm_quality.py                  everything that results/deltallm_quality.jsonl lacks
    python benchmarks/deltallm_quality.py --seconds 150    as much of it as begins within that time

Perplexity is that of tokens 1,024 to 2,047 of the text that ships with the project (no model has read it), each
predicted from all tokens before it in one forward. Thresholds are calibrated on tokens 2,048 and later, which are not
predicted. Elements mode works on all 18 layers, runs mode and what it is compared with on the 3 that attend to
everything. What a variant is: see :func:`variants` and deltallm_rivals.py.
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
PROMPT, CONTINUED, PLACES = 1024, 64, (0, 900, 1800)
RIVALS = ("runs", "evict", "merge, counted", "merge", "no window", "first value")
One = dict[str, Any]


def variants() -> list[One]:
    """What to measure, the questions that matter most first.

    ``rival`` rows say how many rows a query reads (``kept``), so they stand beside each other at equal cache bytes; of
    these ``runs`` is the recipe's own rule. ``shared``: one threshold for all layers, at the same mean sparsity.
    """
    runs: One = {"variant": "runs", "metric": "euclidean", "target": 0.5}
    elements: One = {"variant": "elements", "target": 0.5, "window_kind": "block"}
    found: list[One] = [{"variant": "dense"}, elements]
    found += [{**runs, "metric": m} for m in ("euclidean", "max", "cosine")]
    found += [_rival(how, 0.5) for how in RIVALS]
    found += [{"variant": "continuation", "mode": "runs", "target": 0.5}]
    found += [_rival(how, target) for target in (0.7, 0.85) for how in RIVALS[:3]]
    found += [{**runs, "run_key": "mean"}, {**runs, "shared": True}, {**runs, "window_kind": "block"}]
    found += [{**elements, "target": 0.3}, {**elements, "target": 0.7}, {**elements, "shared": True}]
    found += [{**elements, "window_kind": "sliding"}, {**elements, "window": 0}]
    found += [_rival("no window", 0.7), _rival("first value", 0.7)]
    return [*found, {"variant": "continuation", "mode": "elements", "target": 0.5}]


def _rival(how: str, target: float) -> One:
    return {"variant": "rival", "how": how, "metric": "euclidean", "target": target}


class Bench:
    """The model, its text, and the thresholds that have been found."""

    def __init__(self, thetas: Path) -> None:
        self.model, tokenizer = zoo.load("zoo/gemma", torch_dtype=torch.float32)
        self.ids = tokenizer(zoo.prose(), return_tensors="pt").input_ids
        self.file = thetas
        self.known: dict[str, One] = {row["key"]: row["options"] for row in read(thetas)}
        self.keys: list[list[torch.Tensor]] = []
        self.dense: torch.Tensor | None = None
        self.plain: list[list[int]] = []
        self.runs: dict[float, torch.Tensor] = {}  # losses of the recipe's own rule, by target

    def options(self, one: One) -> One:
        """Options with calibrated thresholds."""
        elements = one["variant"] == "elements"
        setting: One = {"mode": "elements"} if elements else {"metric": one["metric"]}
        setting |= {k: one[k] for k in ("window_kind", "window") if k in one}
        key = str((setting, one["target"])) + (" shared" if one.get("shared") else "")
        if key not in self.known:
            if not self.keys:  # of all layers, for every setting
                self.keys = keys_of(self.model, [self.ids[:, TOKENS:]], DeltaLLM(mode="elements"))
            recipe = DeltaLLM(**setting)
            keys = [mine if elements or layer % 6 == 5 else [] for layer, mine in enumerate(self.keys)]
            if one.get("shared"):
                (theta,) = thresholds([[k for mine in keys for k in mine]], recipe, one["target"])
                self.known[key] = {**setting, "theta": theta}
            else:
                self.known[key] = {**setting, "theta": thresholds(keys, recipe, one["target"])}
            append(self.file, {"key": key, "options": self.known[key]})
        return self.known[key]

    def recipe(self, one: One) -> Any:
        options = self.options(one)
        if one["variant"] == "rival":
            return Rival(how=one["how"], theta=options["theta"], metric=one["metric"])
        more: One = {} if one["variant"] == "elements" else {"min_tokens": 0, "run_key": one.get("run_key", "first")}
        return DeltaLLM(**options, **more)

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        ids = self.ids[:, :TOKENS]
        logits = self.model(ids, use_cache=False, logits_to_keep=PREDICTED + 1).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), ids[0, -PREDICTED:], reduction="none").double()

    def row(self, one: One) -> One:
        if self.dense is None:  # what every other row is compared with, token by token
            self.dense = self.losses()
        if one["variant"] == "dense":
            return {"perplexity": round(math.exp(float(self.dense.mean())), 4)}
        recipe = self.recipe(one)
        with patchkit.apply(self.model, recipe) as patch:
            losses = self.losses()
            means = patch.report()["recipes"][0]["means"]
        out: One = {"perplexity": round(math.exp(float(losses.mean())), 4)}
        out |= {k: round(v, 4) for k, v in means.items() if k in ("sparsity", "unchanged", "removed", "kept")}
        out |= paired("loss_change", losses, self.dense)
        if one.get("how") == "runs":
            self.runs[one["target"]] = losses
        elif one["variant"] == "rival":
            out |= paired("beyond_runs", losses, self.losses_of_runs(one))
        return out | {"theta": recipe.theta}

    def losses_of_runs(self, one: One) -> torch.Tensor:
        """What a rival is compared with, token by token."""
        if one["target"] not in self.runs:
            with patchkit.apply(self.model, self.recipe({**one, "how": "runs"})):
                self.runs[one["target"]] = self.losses()
        return self.runs[one["target"]]

    def continuations(self, recipe: Any = None) -> list[list[int]]:
        """Greedy ones, one a prompt."""
        run: One = {"max_new_tokens": CONTINUED, "min_new_tokens": CONTINUED, "do_sample": False}

        def all_of() -> list[list[int]]:
            return [self.model.generate(self.ids[:, at : at + PROMPT], **run)[0, PROMPT:].tolist() for at in PLACES]

        if recipe is None:
            return all_of()
        with patchkit.apply(self.model, recipe):
            return all_of()

    def continued(self, one: One) -> One:
        """How long each continuation is dense's, and how many of its tokens are."""
        self.plain = self.plain or self.continuations()
        setting: One = {"variant": one["mode"], "target": one["target"]}
        setting |= {"metric": "euclidean"} if one["mode"] == "runs" else {"window_kind": "block"}
        pairs = list(zip(self.plain, self.continuations(self.recipe(setting)), strict=True))
        same = [[x == y for x, y in zip(a, b, strict=True)] for a, b in pairs]
        until = [row.index(False) if False in row else len(row) for row in same]
        return {"same_until": until, "same": [round(sum(row) / len(row), 3) for row in same], "prompt": PROMPT}


def paired(name: str, losses: torch.Tensor, others: torch.Tensor) -> One:
    """Mean difference of two sets of losses, token by token, and its standard error."""
    change = losses - others
    error = float(change.std()) / math.sqrt(len(change))
    return {name: round(float(change.mean()), 5), f"{name}_error": round(error, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "deltallm_quality.jsonl")
    parser.add_argument("--thetas", type=Path, default=RESULTS / "deltallm_thetas.jsonl")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    done = [{k: r[k] for k in r["asked"]} for r in read(args.out)]
    pending = [one for one in variants() if one not in done]
    if not pending:
        return 0
    bench = Bench(args.thetas)
    for one in pending:
        if time.monotonic() - begun > args.seconds:
            return 0
        continuing = one["variant"] == "continuation"
        found = bench.continued(one) if continuing else bench.row(one)
        row = conditions("cpu") | {"model": "zoo/gemma", "dtype": "fp32"}
        row |= {} if continuing else {"tokens": TOKENS, "predicted": PREDICTED}
        append(args.out, row | one | found | {"asked": list(one)})
        print(one, {k: v for k, v in found.items() if k != "theta"}, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
