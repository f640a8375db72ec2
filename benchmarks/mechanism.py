"""What the mechanism costs: import, apply and remove, and an identity recipe per attention call.

python benchmarks/mechanism.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, spinning threads stop each other


def import_cost() -> dict[str, Any]:
    code = (
        "import time, sys, json; t = time.perf_counter(); import patchkit; a = time.perf_counter() - t; "
        "before = set(sys.modules); t = time.perf_counter(); patchkit.apply; b = time.perf_counter() - t; "
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'triton', 'pydantic') if m in before]; "
        "after = [m for m in ('torch', 'diffusers', 'transformers', 'triton', 'pydantic') if m in sys.modules]; "
        "print(json.dumps([a, b, heavy, after]))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-P", "-c", code])) for _ in range(5)]
    return {
        "what": "import",
        "import_patchkit_s": round(statistics.median(r[0] for r in runs), 4),
        "first_use_of_apply_s": round(statistics.median(r[1] for r in runs), 3),
        "imported_by_import": runs[0][2],
        "imported_by_first_use": runs[0][3],
    }


def wan(layers: int, heads: int = 4, width: int = 64) -> Any:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=heads * width * 4,
        num_layers=layers,
        rope_max_seq_len=64,
    ).eval()


def identity() -> Any:
    import patchkit

    @patchkit.recipe("identity-benchmark")
    @dataclasses.dataclass(frozen=True)
    class Identity(patchkit.Recipe):
        """Changes nothing."""

        def attend(self, call: Any, next: Any) -> Any:
            return next(call)

    return Identity()


def apply_cost(recipe: Any) -> dict[str, Any]:
    import patchkit

    model = wan(60, heads=2, width=12)
    on, off = [], []
    for _ in range(7):
        begun = time.perf_counter()
        patch = patchkit.apply(model, recipe)
        middle = time.perf_counter()
        patch.remove()
        on.append(middle - begun)
        off.append(time.perf_counter() - middle)
    return {
        "what": "apply and remove",
        "layers": 60,
        "sites": 120,
        "apply_ms": round(statistics.median(on) * 1e3, 2),
        "remove_ms": round(statistics.median(off) * 1e3, 2),
    }


def overhead(recipe: Any) -> dict[str, Any]:
    """One attention module at 1,024 tokens, patched and not, in turn; the ratio of medians."""
    import torch

    import patchkit

    model = wan(1)
    latents = torch.randn(1, 16, 4, 32, 32)
    text = torch.randn(1, 16, 32)
    inputs = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([500])}

    def measure() -> float:
        begun = time.perf_counter()
        model(**inputs)
        return time.perf_counter() - begun

    plain, patched = [], []
    with torch.no_grad():
        for _ in range(5):
            measure()
        patch = patchkit.apply(model, recipe)
        for i in range(200):
            patch.enable() if i % 2 else patch.disable()
            (patched if i % 2 else plain).append(measure())
        patch.remove()
        bare = [measure() for _ in range(100)]
    calls = _per_call(recipe)
    return {
        "what": "identity recipe, one Wan block, 1,024 tokens, 4 heads x 64, fp32",
        "tokens": 1024,
        "model_ms": round(statistics.median(bare) * 1e3, 3),
        "enabled_over_disabled": round(statistics.median(patched) / statistics.median(plain), 4),
        "enabled_over_removed": round(statistics.median(patched) / statistics.median(bare), 4),
        **calls,
    }


def _per_call(recipe: Any) -> dict[str, Any]:
    """The chain alone, around an op that takes no time."""
    import torch

    import patchkit

    model = wan(1)
    with patchkit.apply(model, recipe):
        site = model.blocks[0].attn1.processor._patchkit_site
        q = torch.zeros(1, 4, 1, 64)
        own, site.terminal = site.terminal, lambda call: call.q
        site.tracker._frames.clear()
        from patchkit import api

        api.find(model).rebuild()
        begun = time.perf_counter()
        for _ in range(20000):
            site.run(q, q, q, None, None, False, 0, {})
        micro = (time.perf_counter() - begun) / 20000 * 1e6
        site.terminal = own
    q = torch.randn(1, 4, 1024, 64)
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        times.append(time.perf_counter() - begun)
    op = statistics.median(times) * 1e6
    return {"chain_us": round(micro, 2), "op_us": round(op, 1), "share_of_op": round(micro / op, 5)}


def main() -> None:
    rows = [import_cost()]
    import torch

    torch.set_num_threads(1)
    recipe = identity()
    import patchkit.registry

    patchkit.registry._loaded = True
    rows += [apply_cost(recipe), overhead(recipe)]
    from rows import write

    for row in rows:
        print(json.dumps(row))
    print(write("mechanism", rows))


if __name__ == "__main__":
    main()
