"""When DeltaLLM's runs pay on this machine: the attention op in prefill, whole decoding steps, bytes of the cache.

    python benchmarks/deltallm_speed.py --what prefill|decode [--models llama100m gemma] [--tokens 4096 16384]

Prefill: one attention op (12 heads, 4 KV heads, D 64, fp32) over keys of a random walk, of which half of the rows are
removed, against torch's own causal kernel. Decoding: whole forwards of one token, by a Llama of 100M parameters with
random weights or by Gemma 3 270M, on caches that are filled with the same random walk (a prefill of 32K tokens would
take this machine many minutes, and the time of a step does not depend on what the keys say). Variants take turns;
medians and ranges.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from rows import RESULTS, append, conditions
from torch import Tensor

import patchkit
from patchkit.kernels import find_runs
from patchkit.recipes.deltallm import DeltaLLM, batch
from patchkit.text_metrics import cache_bytes

HALF = 0.5  # share of rows removed


def walk(heads: int, tokens: int, D: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, tokens, D, generator=g).mul_(0.3).cumsum_(2).remainder_(8.0) - 4.0


def theta_for(k: Tensor, share: float) -> float:
    """The Euclidean threshold at which that share of the rows goes, from the first 4,096."""
    low, high = 0.0, 50.0
    for _ in range(14):
        middle = (low + high) / 2
        removed = 1 - float(find_runs(k[:, :, :4096], middle, metric="euclidean").float().mean())
        low, high = (low, middle) if removed >= share else (middle, high)
    return high


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the calls taking turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn:
                found[name].append((time.perf_counter() - begun) * 1e3)
    return found


def spread(found: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, values in found.items():
        row[f"{name}_ms"] = round(statistics.median(values), 2)
        row[f"{name}_range"] = [round(min(values), 2), round(max(values), 2)]
    row["speed_up"] = round(row["dense_ms"] / row["runs_ms"], 3)
    return row


def prefill(n: int, repeats: int) -> dict[str, Any]:
    k, v, q = walk(4, n, 64), torch.randn(1, 4, n, 64), torch.randn(1, 12, n, 64)
    recipe = DeltaLLM(metric="euclidean", theta=theta_for(k, HALF), min_tokens=0)
    site: Any = type("Site", (), {"layer": 0})()
    rule = recipe.rule(site)
    _, (past,) = batch.attend_at_once(q, k, v, [0], rule, None)
    found = timed(
        {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            "runs": lambda: batch.attend_at_once(q, k, v, [0], rule, None),
            "scan": lambda: find_runs(k, rule.theta, metric="euclidean"),
        },
        repeats,
    )
    removed = past.removed()
    assert removed is not None
    return {"what": "prefill", "tokens": n, "removed": round(float(removed.mean()), 3)} | spread(found)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def gemma() -> Any:
    from patchkit import zoo

    return zoo.load("zoo/gemma", torch_dtype=torch.float32)[0]


def filled(model: Any, tokens: int) -> tuple[Any, float]:
    """A dense cache of that many tokens, and the threshold that removes half of its rows."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    heads = config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    tokens += 64  # past the 32 tokens after min_tokens in which everything is still kept for a crop
    k = walk(heads, tokens, D)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    for layer in cache.layers:
        layer.update(k.clone(), v.clone())
    return cache, theta_for(k, HALF)


@torch.no_grad()
def decode(model: Any, name: str, tokens: int, steps: int) -> dict[str, Any]:
    dense, theta = filled(model, tokens)
    packed = copy.copy(dense)
    packed.layers = [copy.copy(layer) for layer in dense.layers]
    recipe = DeltaLLM(metric="euclidean", theta=theta)
    token = torch.tensor([[5]])

    def step(cache: Any) -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    found: dict[str, list[float]] = {"dense": [], "runs": []}
    with patchkit.apply(model, recipe) as patch:
        begun = time.perf_counter()
        step(packed)
        first = (time.perf_counter() - begun) * 1e3
        full = sum(type(layer).__name__ != "DynamicSlidingWindowLayer" for layer in packed.layers)
        removed = patch.report()["recipes"][0]["means"].get("removed", 0.0)
        for turn in range(steps + 1):
            for variant, cache in (("dense", dense), ("runs", packed)):
                (patch.disable if variant == "dense" else patch.enable)()
                begun = time.perf_counter()
                step(cache)
                if turn:
                    found[variant].append((time.perf_counter() - begun) * 1e3)
        row = {
            "what": "decode",
            "model": name,
            "tokens": tokens,
            "packed_layers": full,
            "removed": round(removed, 3),
            "dense_cache_bytes": cache_bytes(dense),
            "runs_cache_bytes": cache_bytes(packed),
            "packing_step_ms": round(first, 1),
        }
    return row | spread(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("prefill", "decode"), required=True)
    parser.add_argument("--models", nargs="+", choices=("llama100m", "gemma"), default=["llama100m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "deltallm_speed.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models if args.what == "decode" else ("op",):
        model = None if name == "op" else (llama() if name == "llama100m" else gemma())
        for tokens in args.tokens:
            row = prefill(tokens, args.repeats) if model is None else decode(model, name, tokens, args.repeats)
            append(args.out, conditions("cpu") | {"dtype": "fp32"} | row)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
