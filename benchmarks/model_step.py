"""One denoising step of HunyuanVideo and Wan at their true sizes, dense and in AdaSpa's phases; a run composed of them.

    python benchmarks/model_step.py --model hunyuanvideo --layer-share 0.1     minutes on one GPU
    python benchmarks/model_step.py --smoke                                    anywhere: tiny models, nothing written

Weights are random: what a step costs does not depend on them, what it shows does, so no quality is judged here. One
layer of each kind is initialised; the others are modules of their own whose parameters are that layer's (0.4 GB a layer
of HunyuanVideo in bf16, which no cache holds). So the model fits any card that holds its activations. --own-weights
copies them instead. With --layer-share below 1 fewer layers are run and times are scaled up to all of them.

The dense baseline has no attention mask: with one torch cannot use its flash kernel, and HunyuanVideo passes one even
where nothing is masked. The model as diffusers runs it stands in shipped_ms.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions, kernels_hash
from step_models import SUBJECTS

import patchkit
from patchkit import registry

OUT = RESULTS / "model_step.jsonl"
# Steps of one measured sequence: warm-up, fused search, sparse, cached search and sparse, sparse.
PHASES = ("dense", "fused_search", "sparse", "cached_search", "sparse")
WARM_UP, SEARCH = 2, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unmasked(patchkit.Recipe):
    """Leaves out a mask that masks nothing, and times the op."""

    kinds = ("self", "joint")
    name = "unmasked"

    def attend(self, call: Any, next: Callable[[Any], Any]) -> Any:
        padding = call.key_padding()
        plain = call.replace(mask=None) if padding is not None and bool(padding.all()) else call
        with call.ledger.time("dense", call.q.device):
            return next(plain)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one step: so long that the clock on the wall is exact enough."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    out = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) * 1e3, out


def step_of(model: Any, inputs: dict[str, Any], number: int) -> Any:
    """One call of the denoiser; its timestep falls, by which the mechanism counts steps of a bare model."""
    device, dtype = inputs["hidden_states"].device, torch.long
    timestep = torch.full((1,), 1000 - 20 * number, device=device, dtype=dtype)
    with torch.no_grad():
        return model(**inputs, timestep=timestep, return_dict=False)[0]


def sequence(model: Any, inputs: dict[str, Any], recipe: Any, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Time of each step of one run with a recipe: the whole step, and its self-attention."""
    found, before = [], 0.0
    with patchkit.apply(model, recipe) as patch:
        for number in range(steps):
            ms, out = timed(lambda number=number: step_of(model, inputs, number), device)
            account = patch.report().to_dict()["recipes"][0]
            attention = 1e3 * sum(account["seconds"].values())
            finite = bool(torch.isfinite(out).all())
            found.append({"ms": ms, "attention_ms": attention - before, "finite": finite, "account": account})
            before = attention
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    subject, device = SUBJECTS[name], torch.device(args.device)
    model, scale = subject.build(args)
    inputs = subject.inputs(model, args)
    shipped, dense, phases = [], [], {phase: [] for phase in PHASES}
    options = {"block_size": 16, "min_tokens": 0} if args.smoke else {"block_size": args.block}
    adaspa = registry.get("adaspa").build(
        {"density": args.density, "warmup_steps": WARM_UP, "search_steps": [SEARCH], **options}
    )
    for turn in range(args.repeats + 1):  # the first compiles
        ms, out = timed(lambda: step_of(model, inputs, 0), device)
        plain = sequence(model, inputs, Unmasked(), 1, device)
        run = sequence(model, inputs, adaspa, len(PHASES), device)
        if turn:
            shipped.append(ms)
            dense += plain
            for phase, step in zip(PHASES, run, strict=True):
                phases[phase].append(step)
        finite = bool(torch.isfinite(out).all()) and all(s["finite"] for s in [*plain, *run])
    counts = run[-1]["account"]["counts"]
    row = {
        "model": name,
        "tokens": max(r["q"][2] for r in _shapes(model, inputs)),
        "layers": {a: len(getattr(model, a)) for a in subject.lists},
        "scaled_by": round(scale, 3),
        "weights": "own" if args.own_weights else "shared between layers",
        "dtype": "float32" if args.smoke else "bfloat16",
        "density": args.density,
        "actual_density": round(run[-1]["account"]["means"].get("actual_density", 1.0), 4),
        "block": args.block if not args.smoke else 16,
        "repeats": args.repeats,
        "shipped_ms": round(scale * statistics.median(shipped), 2),
        "dense_ms": _median(dense, "ms", scale),
        "dense_attention_ms": _median(dense, "attention_ms", scale),
        **{f"{phase}_ms": _median(steps, "ms", scale) for phase, steps in phases.items() if phase != "dense"},
        **{f"{p}_attention_ms": _median(steps, "attention_ms", scale) for p, steps in phases.items() if p != "dense"},
        "counts": counts,
        "ran_dense": run[-1]["account"]["dense"],
        "passed": finite and counts.get("sparse", 0) > 0 and counts.get("cached_search", 0) > 0,
    }
    return row | composed(row)


def _shapes(model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Shapes of q at the sites, from one short call."""
    found: list[dict[str, Any]] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Look(patchkit.Recipe):
        kinds = ("self", "joint")
        name = "look"
        layers: str | int | list[int] | None = 0

        def attend(self, call: Any, next: Callable[[Any], Any]) -> Any:
            found.append({"q": tuple(call.q.shape)})
            return next(call)

    with patchkit.apply(model, Look()):
        step_of(model, inputs, 0)
    return found


def _median(steps: list[dict[str, Any]], what: str, scale: float) -> float:
    return round(scale * statistics.median(step[what] for step in steps), 2)


def composed(row: dict[str, Any], steps: int = 50, warm_up: int = 10, searches: int = 1) -> dict[str, Any]:
    """A run of the paper's schedule out of the phases: 9 dense, 1 fused search, 39 sparse, 1 cached search."""
    found: dict[str, Any] = {"run_steps": steps, "run_warm_up": warm_up}
    for label, kind in (("whole", ""), ("attention", "attention_")):
        dense, fused, sparse, cached = (
            row[f"{phase}_{kind}ms"] for phase in ("dense", "fused_search", "sparse", "cached_search")
        )
        total = (warm_up - 1) * dense + fused + (steps - warm_up - searches) * sparse + searches * cached
        found[f"{label}_run_s"] = round(total / 1e3, 3)
        found[f"{label}_dense_run_s"] = round(steps * dense / 1e3, 3)
        found[f"{label}_speed_up"] = round(steps * dense / total, 3)
    found["attention_share"] = round(row["dense_attention_ms"] / row["dense_ms"], 4)
    return found


def show(row: dict[str, Any]) -> None:
    print(f"{row['model']}: {row['tokens']} tokens, density {row['actual_density']}, times {row['scaled_by']}")
    print(f"  {'phase':14} {'step ms':>10} {'attention ms':>13}")
    print(f"  {'as shipped':14} {row['shipped_ms']:10.1f}")
    for phase in dict.fromkeys(PHASES):
        print(f"  {phase:14} {row[f'{phase}_ms']:10.1f} {row[f'{phase}_attention_ms']:13.1f}")
    print(
        f"  run of {row['run_steps']} steps: {row['whole_dense_run_s']:.1f} s dense, "
        f"{row['whole_run_s']:.1f} s with AdaSpa, {row['whole_speed_up']:.2f} x; "
        f"attention alone {row['attention_speed_up']:.2f} x ({row['attention_share']:.0%} of a dense step)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=["wan-1.3b", "wan-14b", "hunyuanvideo"])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--layer-share", type=float, default=1.0, help="run this share of the layers, scale the times")
    parser.add_argument("--own-weights", action="store_true", help="each layer has weights of its own")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--smoke", action="store_true", help="tiny models, nothing written")
    args = parser.parse_args()
    if not args.smoke and not args.device.startswith("cuda"):
        print("models of this size take a GPU; --smoke tries the benchmark anywhere")
        return 2
    failed = 0
    for name in args.model:
        row = measure(name, args)
        show(row)
        if not row.pop("passed"):
            failed += 1
            print(f"  no sparse step, or a result that is not finite: row not written ({row['ran_dense']})")
        elif not args.smoke:
            append(args.out, conditions(args.device) | {"kernels": kernels_hash()} | row)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
