"""Decoding with heads that are off, on this CPU: whole steps of a language model, and its attention op alone.

    python benchmarks/moh_decode.py [--tokens 2048 8192] [--kv-heads 12 4] [--threads 1]

A Llama of 100M parameters with random weights and 12 query heads, once with a key-value head for each (multi-head),
once with 4 for all (grouped queries), on a static cache full of random keys. ``step_ms`` is a whole forward of one
token, ``op_ms`` one layer's op on the same shapes. Variants take turns; medians. Unpatched is ``active`` 1; ``read`` is
the share of the key-value heads that the op reads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions, kernels_hash

import patchkit
from patchkit.kernels import routed_attention

HEADS, LAYERS, WIDTH = 12, 12, 768
BUDGETS = ((0.5, 1.0), (0.5, 0.75), (0.25, 0.5))


def llama(kv_heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def filled(model: Any, tokens: int, room: int) -> Any:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=tokens + room)
    shape = (1, model.config.num_key_value_heads, tokens, WIDTH // HEADS)
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        layer.update(*(torch.randn(shape, generator=generator) for _ in range(2)))
    return cache


@torch.no_grad()
def measure(kv_heads: int, tokens: int, steps: int) -> list[dict[str, Any]]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    models = {budget: llama(kv_heads) for budget in BUDGETS}
    caches = {budget: filled(model, tokens, steps + 1) for budget, model in models.items()}
    for (shared, active), model in models.items():
        if active < 1:
            patchkit.apply(model, "moh", shared=shared, active=active)
    whole: dict[Any, list[float]] = {budget: [] for budget in BUDGETS}
    for turn in range(steps + 1):
        token = torch.randint(0, 32000, (1, 1), generator=torch.Generator().manual_seed(turn))
        for budget, model in models.items():
            begun = clock()
            model(input_ids=token, past_key_values=caches[budget], use_cache=True)
            if turn:
                whole[budget].append((clock() - begun) * 1e3)
    ops, read = op(kv_heads, tokens, steps)
    rows = []
    for budget in BUDGETS:
        now, alone = (statistics.median(found[budget]) for found in (whole, ops))
        dense, dense_alone = (statistics.median(found[BUDGETS[0]]) for found in (whole, ops))
        rows.append(
            {
                "benchmark": "moh_decode",
                "heads": HEADS,
                "kv_heads": kv_heads,
                "tokens": tokens,
                "dtype": "fp32",
                "shared": budget[0],
                "active": budget[1],
                "read": round(read[budget], 3),
                "step_ms": round(now, 2),
                "step_speedup": round(dense / now, 3),
                "op_ms": round(alone, 3),
                "op_speedup": round(dense_alone / alone, 3),
                "turns": steps,
            }
        )
    return rows


def op(kv_heads: int, tokens: int, turns: int) -> tuple[dict[Any, list[float]], dict[Any, float]]:
    """Milliseconds of the op for each budget, heads drawn anew each turn, and the share of key-value heads read."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, HEADS, 1, WIDTH // HEADS, generator=g)
    k, v = (torch.randn(1, kv_heads, tokens, WIDTH // HEADS, generator=g) for _ in range(2))
    times: dict[Any, list[float]] = {budget: [] for budget in BUDGETS}
    read: dict[Any, list[float]] = {budget: [] for budget in BUDGETS}
    for turn in range(turns + 1):
        for budget in BUDGETS:
            shared, chosen = int(HEADS * budget[0]), int(HEADS * budget[1]) - int(HEADS * budget[0])
            active = torch.zeros(1, HEADS, 1, dtype=torch.bool)
            active[:, torch.randperm(HEADS - shared, generator=g)[:chosen] + shared] = True
            begun = clock()
            out = routed_attention(q, k, v, active, shared=shared, path="dense" if budget[1] == 1 else None)
            if turn:
                times[budget].append((clock() - begun) * 1e3)
                read[budget].append(float(out.view(1, kv_heads, -1).any(-1).float().mean()))
    return times, {budget: statistics.mean(shares) for budget, shares in read.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[12, 4])
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for kv_heads in args.kv_heads:
        for tokens in args.tokens:
            load = os.getloadavg()[0]
            for row in measure(kv_heads, tokens, args.turns):
                print(row, flush=True)
                if not args.dry:
                    facts = conditions("cpu") | {"load_before": load, "load_after": os.getloadavg()[0]}
                    append(RESULTS / "moh_decode.jsonl", facts | {"kernels": kernels_hash()} | row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
