"""Finding the layout object again behind a custom op, which is handed bare tensors.

A layout carries what implementations derived from it (``BlockLayout.derived``). torch's custom ops take tensors and
numbers only, so a layout rebuilt inside one would derive everything anew in every call. Tensors are passed as the same
objects, so the one that a layout owns leads back to it.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .block_layout import BlockLayout

_known: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def remember(layout: BlockLayout) -> None:
    """Let :func:`recall` find ``layout`` for as long as it lives, or until another one with the same lists is used."""
    with _lock:
        known = _known.get(layout.kv_num)
        if known is None or known() is not layout:
            _known[layout.kv_num] = weakref.ref(layout)


def recall(made: BlockLayout) -> BlockLayout:
    """The remembered layout that consists of the same tensors and numbers as ``made``, or else ``made`` itself."""
    with _lock:
        found = _known.get(made.kv_num)
    layout = found() if found is not None else None
    if layout is None:
        return made
    for name in made.__dataclass_fields__:
        mine, other = getattr(made, name), getattr(layout, name)
        same = mine is other if isinstance(mine, Tensor) or isinstance(other, Tensor) else mine == other
        if not same:
            return made
    return layout
