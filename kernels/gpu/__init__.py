"""What the Triton kernels share: when they can be used, how they are launched, and how they are compiled for a check.

Triton is imported by the ``triton*.py`` files of the operators only, and these only once a GPU call needs them.
"""

from .device import launching, obstacle
from .variant import Variant

__all__ = ["Variant", "launching", "obstacle"]
