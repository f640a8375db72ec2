"""Measuring attention: one shape, our block-sparse operator beside torch's dense kernels and FlexAttention.

    from patchkit.kernels.bench import Bench, Shape

    bench = Bench(Shape("mine", tokens=32_760, heads=12, head_dim=128), torch.bfloat16, "cuda")
    row = bench.row(block=64, density=0.2)

``benchmarks/sparse_attention.py`` and ``patchkit bench`` both measure through this.
"""

from .measure import Bench
from .shapes import MODELS, Shape
from .timing import Timing, time_calls

__all__ = ["MODELS", "Bench", "Shape", "Timing", "time_calls"]
