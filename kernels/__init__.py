"""patchkit.kernels: attention operators over block layouts.

    from patchkit.kernels import BlockLayout, block_sparse_attention, block_mass, merge_states, dense_attention

One folder per operator: ``reference.py`` is the formula, ``blocked`` the fast plain-torch path, ``triton`` the GPU
kernels, each one file or a folder of them; ``__init__.py`` the public operator, which picks the implementation. Depends
on torch only; triton is imported when a GPU call needs it.
"""

# In a script that is started in the checkout, ``kernels`` is this folder, and transformers imports that name to see
# which version of the Hugging Face library it is. A second copy of the operators would replace the registered ones.
if __name__ == "patchkit.kernels":
    from .classes import class_attention
    from .deadband import dead_band
    from .dense import dense_attention
    from .errors import GradientError, KernelTypeError, KernelValueError, LayoutError
    from .layout import BlockLayout, ElementRule
    from .mass import block_mass
    from .merge import merge_states
    from .packed import packed_attention
    from .quantised import Format, Reorder, quantised_attention
    from .redistribute import redistribute
    from .reorder import reorder_heads
    from .routed import routed_attention, routed_path
    from .runs import Packed, find_runs, pack_runs
    from .sparse import Path, block_sparse_attention, choose_path
    from .statistics import block_statistics
    from .survey import Finding, paths, survey
    from .topk import row_topk

__all__ = [
    "BlockLayout",
    "ElementRule",
    "Finding",
    "Format",
    "GradientError",
    "KernelTypeError",
    "KernelValueError",
    "LayoutError",
    "Packed",
    "Path",
    "Reorder",
    "block_mass",
    "block_sparse_attention",
    "block_statistics",
    "choose_path",
    "class_attention",
    "dead_band",
    "dense_attention",
    "find_runs",
    "merge_states",
    "pack_runs",
    "packed_attention",
    "paths",
    "quantised_attention",
    "redistribute",
    "reorder_heads",
    "routed_attention",
    "routed_path",
    "row_topk",
    "survey",
]
