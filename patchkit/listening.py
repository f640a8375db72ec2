"""What an attention module is given and what its query projection makes, for recipes that need more than the op sees.

The op gets queries after their norm, whose length says nothing any more, and never the hidden states. Two hooks on the
module keep both while it runs. The projection is looked up at each call, because adapters (LoRA) wrap it meanwhile.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from patchkit import compiled
from patchkit.context import AttentionCall

What = Literal["hidden", "queries"]

_NORMS = re.compile(r"(q|query|qk)_?(norm|ln|layer_?norm)|norm_(q|query)")
_PROJECTIONS = ("q_proj", "to_q", "query", "q_lin", "wq")


def has_query_norm(module: torch.nn.Module) -> bool:
    """Whether an attention module normalises its queries before the op."""
    return any(
        _NORMS.fullmatch(name) and child is not None and not isinstance(child, torch.nn.Identity)
        for name, child in module.named_children()
    )


def projection_name(module: torch.nn.Module) -> str | None:
    """Name of the child that makes the queries alone; None where there is none, or it makes keys and values too."""
    children = dict(module.named_children())
    return next((name for name in _PROJECTIONS if name in children), None)


class Ear:
    """Keeps the hidden states (B, N, C) and the projected queries (B, N, H D) of one attention module while it runs.

    Args:
        module: the attention module.
        what: which of the two.
        opaque: whether the op runs outside compiled graphs (as chains do), so that a graph must show what it makes.
    """

    def __init__(self, module: torch.nn.Module, what: frozenset[What], opaque: bool = True) -> None:
        self.module, self.what = module, what
        self.hidden: Tensor | None = None
        self.queries: Tensor | None = None
        self._projection: torch.nn.Module | None = None
        self._on_projection: Any = None
        self._handles: list[Any] = []
        self._numbers: tuple[Tensor, Tensor] | None = None
        if opaque:
            self._numbers = (compiled.number(self, self._hear_hidden), compiled.number(self, self._hear_queries))

    def open(self) -> None:
        """Put the hooks in place."""
        self._handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]
        self._follow()

    def close(self) -> None:
        """Take them away; closing twice does nothing."""
        for handle in (*self._handles, self._on_projection):
            if handle is not None:
                handle.remove()
        self._handles, self._projection, self._on_projection = [], None, None
        self.hidden = self.queries = None

    def tell(self, call: AttentionCall) -> None:
        """Fill in what was kept."""
        call.hidden = self.hidden
        if self.queries is not None and self.queries.ndim == 3:
            batch, tokens = self.queries.shape[:2]
            if (batch, tokens) == (call.q.shape[0], call.q.shape[2]):
                call.queries = self.queries.view(batch, tokens, call.q.shape[1], -1).transpose(1, 2)

    # --- hooks ------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Listen to the projection that the module has now."""
        if "queries" not in self.what:
            return
        name = projection_name(self.module)
        found = self.module.get_submodule(name) if name is not None else None
        if found is not self._projection:
            if self._on_projection is not None:
                self._on_projection.remove()
            self._projection = found
            self._on_projection = found.register_forward_hook(self._projected) if found is not None else None

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._follow()
        if "hidden" not in self.what:
            return None
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._numbers is not None and torch.compiler.is_compiling():
            hidden = compiled.enter(hidden, self._numbers[0])
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        self.hidden = hidden
        return None

    def _projected(self, module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._numbers is not None and torch.compiler.is_compiling():
            return compiled.enter(output, self._numbers[1])
        self.queries = output
        return None

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._numbers is None or not torch.compiler.is_compiling():
            self.hidden = self.queries = None  # tensors as large as the layer's input need not outlive it

    def _hear_hidden(self, _: Any, hidden: Tensor) -> None:
        self.hidden = hidden

    def _hear_queries(self, _: Any, queries: Tensor) -> None:
        self.queries = queries

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model have hooks of their own copies of this. Tensors of a forward stay behind; and a copy of a
        # patched model is unpatched, so nobody needs what would be heard there.
        kept = self.what if self._numbers is None else frozenset()
        return vars(self) | {"hidden": None, "queries": None, "what": kept}
