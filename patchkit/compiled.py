"""Tell the tracker of a denoiser call from inside a compiled graph.

``torch.compile`` around a model that is patched already traces our override of its call away: at run time there is only
the graph. So the graph gets an opaque op that hears the call's inputs and hands them on as new tensors, which makes
everything that uses them come after it. Recipes around the call itself cannot be served that way. In the same way the
blocks inside show what enters them.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchkit.installation import Installation

_numbers = itertools.count(1)
_by_number: weakref.WeakValueDictionary[int, Installation] = weakref.WeakValueDictionary()
_blocks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_listeners: dict[int, weakref.WeakMethod[Callable[[Any, Tensor], None]]] = {}


def register(installation: Installation) -> Tensor:
    """What a graph knows an installation by."""
    new = next(_numbers)
    _by_number[new] = installation
    return torch.tensor(new, device="cpu")


def parameters(cls: type) -> tuple[str, ...]:
    """Names of the inputs of ``cls.forward``, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def heard(
    installation: Tensor, component: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the installation hear of a call; returns the arguments to go on with. Is traced."""
    named = [*zip(names, args, strict=False), *kwargs.items()]
    tensors = [(name, value) for name, value in named if isinstance(value, Tensor)]
    plain = [(name, value) for name, value in named if type(value) in (int, float)]
    fresh = iter(
        hear(
            [value for _, value in tensors],
            " ".join([name for name, _ in tensors]),
            [float(value) for _, value in plain],
            " ".join([name for name, _ in plain]),
            component,
            installation,
        )
    )
    args = tuple(next(fresh) if isinstance(value, Tensor) else value for value in args)
    return args, {name: next(fresh) if isinstance(value, Tensor) else value for name, value in kwargs.items()}


@torch.library.custom_op("patchkit::hear", mutates_args=())
def hear(
    tensors: list[Tensor], names: str, numbers: list[float], number_names: str, component: str, installation: Tensor
) -> list[Tensor]:
    """Tell an installation of a call of ``component``. Returns copies: an op must not return its inputs."""
    found = _by_number.get(int(installation))
    if found is not None:
        inputs: dict[str, Any] = dict(zip(names.split(), tensors, strict=True))
        found.heard(component, inputs | dict(zip(number_names.split(), numbers, strict=True)))
    return [t.clone() for t in tensors]


@hear.register_fake
def _(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.numbers = len(inputs[2])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return grads, None, [None] * ctx.numbers, None, None, None


hear.register_autograd(_backward, setup_context=_remember)


# --- blocks ---------------------------------------------------------------------------------------------------------


def number(block: Any, listener: Callable[[Any, Tensor], None]) -> Tensor:
    """What a graph knows a block (or another place) by. ``listener``, a method, is shown what comes by."""
    new = next(_numbers)
    _blocks[new], _listeners[new] = block, weakref.WeakMethod(listener)
    weakref.finalize(block, _listeners.pop, new, None)
    return torch.tensor(new, device="cpu")


@torch.library.custom_op("patchkit::enter", mutates_args=())
def enter(hidden: Tensor, block: Tensor) -> Tensor:
    """Show the hidden states (B, N, width) that enter a block. Returns a copy: an op must not return its inputs."""
    found = _blocks.get(int(block))
    told = _listeners[int(block)]() if found is not None else None
    if found is not None and told is not None:
        told(found, hidden)
    return hidden.clone()


@enter.register_fake
def _(hidden: Tensor, block: Tensor) -> Tensor:
    return torch.empty_like(hidden)


enter.register_autograd(lambda ctx, grad: (grad, None))
