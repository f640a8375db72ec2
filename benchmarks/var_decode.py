"""What VAR adds to a decoding step on a CPU: a random LLaVA, 4 layers, 1,024 wide, one prompt full of image tokens.

    python benchmarks/var_decode.py

Plain and patched models (the same weights) take turns, a step each, in an order drawn anew for each token; the
overhead is the median of the ratios of steps of the same token. ``edited``: planted sinks and open thresholds, so that
every head is edited; ``gates``: no head passes, and what is left is finding that out; ``nothing``: a recycled share of
0, which leaves only the patch; ``control``: the plain model a second time.
``error`` is the relative RMS error of one edited attention output of these sizes, against the explicit map.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rows import RESULTS, append, conditions
from transformers import LlavaConfig, LlavaForConditionalGeneration

import patchkit

IMAGE, WIDTH, CHANNEL, TEXT = 31999, 1024, 7, 40


def build(layers: int, kv_heads: int) -> Any:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 16, "num_key_value_heads": kv_heads, "vocab_size": 32000}
    text |= {"max_position_embeddings": 8192, "pad_token_id": 0}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def prompt(visual: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 30000, (1, TEXT), generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.cat((ids[:, :1], torch.full((1, visual), IMAGE), ids[:, 1:]), 1)}


def planted(model: Any, visual: int) -> torch.utils.hooks.RemovableHandle:
    """Sinks: the first token and every hundredth image token."""
    where = torch.zeros(1 + visual, dtype=torch.bool)
    where[0] = True
    where[5:visual:100] = True

    def hook(module: Any, args: Any) -> Any:
        hidden = args[0].clone()
        if hidden.shape[1] > 1:
            hidden[0, : len(where), CHANNEL] += 40.0 * where
        return (hidden, *args[1:])

    return model.model.language_model.layers[0].register_forward_pre_hook(hook)


class Decoding:
    """One model on a prompt of its own cache, with or without the recipe."""

    def __init__(self, model: Any, visual: int, kind: dict[str, Any] | None) -> None:
        self.model, self.seconds = model, []
        self.patch = patchkit.apply(model, "var", **kind) if kind is not None else None
        hook = planted(model, visual)
        self.out = model(**prompt(visual), use_cache=True)
        hook.remove()

    def step(self, token: int) -> None:
        begun = time.perf_counter()
        ids = torch.tensor([[token]])
        self.out = self.model(input_ids=ids, past_key_values=self.out.past_key_values, use_cache=True)
        self.seconds.append(time.perf_counter() - begun)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[2:])

    def against(self, other: Decoding) -> float:
        """Seconds over those of another, less one; tokens one by one."""
        return statistics.median(a / b for a, b in zip(self.seconds[2:], other.seconds[2:], strict=True)) - 1

    def rate(self) -> float:
        if self.patch is None:
            return 0.0
        return float(self.patch.report()["recipes"][0]["means"].get("selected_rate", 0.0))


def error_of(visual: int, kv_heads: int) -> float:
    """Of one edited attention output of these sizes."""
    from patchkit.kernels.redistribute import redistribute
    from patchkit.kernels.redistribute.reference import redistribute_reference

    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, n, 64, generator=g) for h, n in ((16, 1), (kv_heads, visual), (kv_heads, visual)))
    classes = torch.randint(0, 4, (1, visual), generator=g).to(torch.uint8)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    gates = {"recycle": 0.6, "rho": 0.0, "least": 0.0}
    wanted = redistribute_reference(q, k, v, classes, **gates)[0]
    return float((redistribute(out, q, k, v, classes, **gates).out - wanted).norm() / wanted.norm())


@torch.no_grad()
def measure(args: argparse.Namespace, visual: int, kv_heads: int) -> list[dict[str, Any]]:
    """Rows for each choice of layers and each kind."""
    error = error_of(visual, kv_heads)
    if error > 2e-5:
        raise SystemExit(f"error {error:.1e}: no row is written")
    base: dict[str, Any] = {"sink_dims": [CHANNEL], "tau": 15.0, "rho": 0.0, "min_visual": 0.0}
    kinds = {"edited": base, "gates": base | {"min_visual": 1.0}, "nothing": base | {"recycle": 0.0}, "control": None}
    first = build(4, kv_heads)
    runs: dict[tuple[str, str], Decoding] = {("", "plain"): Decoding(first, visual, None)}
    for layers in args.layers:
        for name, kind in kinds.items():
            model = copy.deepcopy(first)
            model.load_state_dict(first.state_dict(), assign=True)  # the same weights in the same memory
            runs[layers, name] = Decoding(model, visual, kind | {"layers": layers} if kind else None)
    turns, order = list(runs.values()), random.Random(0)
    for n in range(args.tokens):
        order.shuffle(turns)
        for run in turns:
            run.step(100 + n)
    plain = runs.pop(("", "plain"))
    return [
        {
            "benchmark": "var_decode",
            "visual": visual,
            "heads": 16,
            "kv_heads": kv_heads,
            "layers": layers,
            "kind": name,
            "selected_rate": round(run.rate(), 3),
            "plain_ms": round(plain.median * 1e3, 3),
            "step_ms": round(run.median * 1e3, 3),
            "overhead": round(run.against(plain), 4),
            "steps": args.tokens - 2,
            "error": float(f"{error:.1e}"),
        }
        for (layers, name), run in runs.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, nargs="+", default=[640, 4096])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--layers", nargs="+", default=["2:-1", "0-"], help="the recipe's option")
    parser.add_argument("--tokens", type=int, default=22, help="decoded by each, the first two are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dry", action="store_true", help="write no rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for visual in args.visual:
        for kv_heads in args.kv_heads:
            for row in measure(args, visual, kv_heads):
                print(
                    f"N {visual:5} KV heads {kv_heads:2}, {row['layers']:5} {row['kind']:7} {row['plain_ms']:7.2f}"
                    f" -> {row['step_ms']:8.2f} ms ({row['overhead']:+.1%}), heads edited {row['selected_rate']:.0%}"
                )
                if not args.dry:
                    append(RESULTS / "var_decode.jsonl", conditions("cpu") | row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
