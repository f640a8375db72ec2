"""Errors of the kernel package. Each message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class KernelValueError(ValueError):
    """A tensor or number that an operator cannot accept: wrong shape, size, device or range."""


class KernelTypeError(TypeError):
    """An argument of the wrong type or dtype."""


class LayoutError(KernelValueError):
    """A block layout that contradicts itself or the tensors it is used with."""


class GradientError(KernelValueError):
    """A gradient was asked of an operator that has no backward."""


def value_error(what: str, where: str, remedy: str) -> KernelValueError:
    """Build a :class:`KernelValueError` in the house form."""
    return KernelValueError(f"{where}: {what}. {remedy}")


def type_error(what: str, where: str, remedy: str) -> KernelTypeError:
    """Build a :class:`KernelTypeError` in the house form."""
    return KernelTypeError(f"{where}: {what}. {remedy}")


def layout_error(what: str, where: str, remedy: str) -> LayoutError:
    """Build a :class:`LayoutError` in the house form."""
    return LayoutError(f"{where}: {what}. {remedy}")


def refuse_gradient(where: str, **tensors: object) -> None:
    """Raise when autograd would record this call: the forward-only operators never return silently wrong gradients.

    Raises:
        GradientError: if gradients are enabled and one of ``tensors`` requires one.
    """
    import torch

    if not torch.is_grad_enabled():
        return
    names = [name for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    if names:
        raise GradientError(
            f"{where}: {', '.join(names)} require a gradient, and this operator has no backward. "
            "Call it under torch.no_grad(), pass detached tensors, or use dense_attention with a mask for training."
        )
