"""What a language model costs and how well it predicts, with recipes and without: perplexity, speed, bytes of cache.

    python benchmarks/text.py                                    Gemma 3 270M, unpatched
    python benchmarks/text.py --recipes a.yaml b.yaml            the same, and with each of these recipes

Perplexity is that of the text that ships with the project (no model has read it), in windows of 1,024 tokens that
overlap by half. Speed is prefill of a prompt and greedy decoding token by token; variants take turns, and medians and
ranges are given. A variant's ``logit_error`` is the relative RMS distance of its logits to the unpatched ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions

import patchkit
from patchkit import zoo
from patchkit.text_metrics import Speed, perplexity, speed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def variant(model: Any, recipe: str | None) -> Iterator[None]:
    if recipe is None:
        yield
        return
    with patchkit.apply(model, recipe):
        yield


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def speeds(model: Any, names: dict[str, str | None], ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Median and range of each variant's speeds; the first round warms up."""
    found: dict[str, list[Speed]] = {name: [] for name in names}
    for turn in range(args.repeats + 1):
        for name, recipe in names.items():
            with variant(model, recipe):
                one = speed(model, ids, args.generated)
            if turn:
                found[name].append(one)
    out = {}
    for name, every in found.items():
        row: dict[str, Any] = {"cache_bytes": every[-1].cache_bytes}
        for what in ("prefill_tokens_s", "decode_tokens_s"):
            values = [getattr(one, what) for one in every]
            row[what] = round(statistics.median(values), 2)
            row[f"{what}_range"] = [round(min(values), 2), round(max(values), 2)]
        out[name] = row
    return out


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a variant."""
    model, tokenizer = zoo.load(args.model, torch_dtype=DTYPES[args.dtype], device=args.device)
    text = args.text.read_text(encoding="utf-8") if args.text else zoo.prose()
    ids = tokenizer(text, return_tensors="pt").input_ids
    prompt = ids[:, torch.arange(args.prompt) % ids.shape[1]]  # longer prompts begin the text again
    names: dict[str, str | None] = {"dense": None, **{Path(r).stem: r for r in args.recipes}}
    costs = speeds(model, names, prompt, args)
    reference = logits_of(model, ids[:, : args.window])
    rows = []
    for name, recipe in names.items():
        with variant(model, recipe):
            quality = perplexity(model, tokenizer, text, args.window, args.stride)
            error = float((logits_of(model, ids[:, : args.window]) - reference).norm() / reference.norm())
        rows.append(
            {
                "model": args.model,
                "variant": name,
                "dtype": args.dtype,
                "text": args.text.name if args.text else "the-tide-mill.txt",
                "window": args.window,
                "stride": args.stride,
                "perplexity": round(quality.value, 4),
                "perplexity_error": round(quality.error, 4),
                "predicted_tokens": quality.tokens,
                "logit_error": round(error, 6),
                "prompt": args.prompt,
                "generated": args.generated,
                "repeats": args.repeats,
                **costs[name],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'variant':20} {'perplexity':>18} {'prefill tok/s':>14} {'decode tok/s':>13} {'cache MiB':>10} {'logits':>9}"
    )
    for r in rows:
        cache = "-" if r["cache_bytes"] is None else f"{r['cache_bytes'] / 2**20:.1f}"
        print(
            f"{r['variant']:20} {r['perplexity']:9.3f} +- {r['perplexity_error']:5.2f} {r['prefill_tokens_s']:14.1f} "
            f"{r['decode_tokens_s']:13.1f} {cache:>10} {r['logit_error']:9.1e}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo/gemma", help="a language model of the zoo")
    parser.add_argument("--recipes", nargs="*", default=[], help="recipe files or names, each a variant")
    parser.add_argument("--text", type=Path, help="another text for the perplexity")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt for the speeds")
    parser.add_argument("--generated", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "text.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        rows = measure(args)
    except patchkit.PatchkitError as error:
        print(f"error: {error}")
        return 2
    show(rows)
    for row in rows:
        append(args.out, conditions(args.device) | row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
