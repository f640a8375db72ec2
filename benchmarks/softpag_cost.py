"""What SoftPAG adds to a step, against one more forward: by the first perturbed block, at 4,429 tokens.

    python benchmarks/softpag_cost.py [--layers 4] [--heads 2] [--repeats 3] [--device cpu]

A Stable Diffusion 3 transformer (random weights) at the sequence of 1024x1024 pictures: 4,096 image, 333 text tokens.
Variants take turns. Memory is the largest tensor made by any operator (a map would have tokens x tokens numbers a head)
and, on a GPU, the peak. Writes a row a variant to benchmarks/results/softpag_cost.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

import patchkit
from patchkit.recipes.headhunter import SoftPAG

SIDE, TEXT = 128, 333  # of the latents; tokens


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def model_of(layers: int, heads: int, device: str, side: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=side,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        caption_projection_dim=64 * heads,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, side, side),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([500.0]),
    }
    return model.eval().to(device), {n: x.to(device) for n, x in inputs.items()}


def timed(model: Any, inputs: dict[str, Any], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.no_grad():
        model(**inputs, return_dict=False)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def variants_of(layers: int, heads: int) -> dict[str, SoftPAG | None]:
    found: dict[str, SoftPAG | None] = {"unpatched": None}
    for first in (0, layers // 4, layers // 2):
        found[f"l0 = {first}"] = SoftPAG(heads=[(first, 0), (layers - 1, 0)], strength=0.5)
    found["l0 = 0, scope image"] = SoftPAG(heads=[(0, 0), (layers - 1, 0)], strength=0.5, scope="image")
    last = layers - 1
    found[f"l0 = {last}, whole layer, u = 1"] = SoftPAG(heads=[(last, h) for h in range(heads)], strength=1.0)
    return found


def measure(layers: int, heads: int, repeats: int, device: str, side: int = SIDE) -> list[dict[str, Any]]:
    model, inputs = model_of(layers, heads, device, side)
    tokens = (side // 2) ** 2 + TEXT
    times: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    variants = variants_of(layers, heads)
    for turn in range(repeats + 1):  # the first warms up, and is watched
        for name, recipe in variants.items():
            with patchkit.apply(model, [recipe] if recipe else [SoftPAG(heads=[])]):
                if turn:
                    times.setdefault(name, []).append(timed(model, inputs, device))
                    continue
                if device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                with Largest() as largest:
                    timed(model, inputs, device)
                facts[name] = {"largest_tensor": largest.numel, "tokens": tokens, "map_of_a_head": tokens**2}
                if device.startswith("cuda"):
                    facts[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    base = statistics.median(times["unpatched"])
    rows = []
    for name, recipe in variants.items():
        middle = statistics.median(times[name])
        row = {"variant": name, "seconds": round(middle, 4), "repeats": repeats, **facts[name]}
        if recipe is not None:
            row["extra_forwards"] = round(middle / base - 1, 4)
            row["extra_forwards_predicted"] = round(1 - recipe.first / layers, 4)  # type: ignore[operator]
        rows.append(row)
    return rows


def main() -> int:
    import rows as kept

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args.layers, args.heads, args.repeats, args.device)
    shared = kept.conditions(args.device) | {"layers": args.layers, "heads": args.heads}
    for row in found:
        print(row, flush=True)
        if not args.dry:
            kept.append(kept.RESULTS / "softpag_cost.jsonl", shared | row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
