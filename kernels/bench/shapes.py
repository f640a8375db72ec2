"""Attention shapes: what a model's joint or causal self-attention looks like to a kernel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import value_error

WHERE = "Shape"


@dataclass(frozen=True)
class Shape:
    """One self-attention call.

    Args:
        name: for tables.
        tokens: visual tokens; of a language model all tokens.
        heads: query heads.
        head_dim: D.
        kv_heads: key and value heads; None = as many as query heads.
        text: text tokens behind the visual ones. Their blocks are always kept, rows and columns.
        frame: tokens of one frame; None = a single frame.
        causal: token i sees the tokens up to i.
        batch: samples.

    Raises:
        KernelValueError: sizes below 1, or heads that are no multiple of the KV heads.
    """

    name: str
    tokens: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    text: int = 0
    frame: int | None = None
    causal: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        sizes = {n: getattr(self, n) for n in ("tokens", "heads", "head_dim", "batch", "shared_heads")}
        for name, size in sizes.items():
            if size < 1:
                raise value_error(f"{name} is {size}", WHERE, "Use 1 or more.")
        if self.text < 0:
            raise value_error(f"text is {self.text}", WHERE, "Use 0 or more.")
        if self.heads % self.shared_heads:
            raise value_error(
                f"{self.heads} heads over {self.shared_heads} KV heads", WHERE, "Heads must be a multiple of KV heads."
            )

    @property
    def length(self) -> int:
        """Tokens of the sequence, text included."""
        return self.tokens + self.text

    @property
    def shared_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def flops(self) -> int:
        """FLOPs of the dense call (2 per multiply-add, two matmuls); a causal call has half of the pairs."""
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.head_dim * self.batch * self.heads * pairs

    def smaller(self, tokens: int, heads: int) -> Shape:
        """The same kind of call with at most ``tokens`` tokens and ``heads`` heads, for machines without a GPU."""
        group = self.heads // self.shared_heads
        kv_heads = max(1, min(self.shared_heads, heads // group))
        text = min(self.text, tokens // 8)
        frame = None if self.frame is None else max(16, min(self.frame, tokens // 8))
        return dataclasses.replace(
            self, tokens=min(self.tokens, tokens), heads=kv_heads * group, kv_heads=kv_heads, text=text, frame=frame
        )


# Token counts follow from the models' configurations: 720p is 45 x 80 tokens a frame after patching.
MODELS = {
    s.name: s
    for s in (
        Shape("hunyuanvideo", 118_800, 24, 128, text=256, frame=3600),  # 129 frames of 720p
        Shape("wan-14b", 75_600, 40, 128, frame=3600),  # 81 frames of 720p
        Shape("wan-1.3b", 32_760, 12, 128, frame=1560),  # 81 frames of 480p
        Shape("cogvideox-1.5", 75_600, 48, 64, text=226, frame=3600),  # 161 frames of 720p
        Shape("flux-2k", 16_384, 24, 128, text=512),  # 2048 x 2048
        Shape("llm-prefill", 32_768, 32, 128, kv_heads=8, causal=True),
    )
}
