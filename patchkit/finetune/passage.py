"""What a tuned recipe does around the model's forward."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import compiled


class Passage:
    """Stands around every forward of a model, by two hooks. Copies and pickles of the model take theirs along."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def open(self, model: torch.nn.Module) -> None:
        """Put the hooks in place."""
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def close(self) -> None:
        """Take them away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def began(self, model: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """A forward begins; ``arguments`` are all that it was given, by name."""

    def ended(self, model: torch.nn.Module, arguments: dict[str, Any], output: Any) -> Any:
        """A forward has ended; returns the output to go on with."""
        return output

    def _before(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.began(model, named(model, args, kwargs))

    def _after(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.ended(model, named(model, args, kwargs), output)


def named(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a model's call by name."""
    return dict(zip(compiled.parameters(type(model)), args, strict=False)) | kwargs if args else kwargs
