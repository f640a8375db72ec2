"""Block layouts shared by all block-sparse operators."""

from .block_layout import BlockLayout
from .rules import ElementRule

__all__ = ["BlockLayout", "ElementRule"]
