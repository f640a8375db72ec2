"""When Triton kernels can be used on a device, and the context to launch them in."""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch

# Ampere. On Turing (the T4 of free notebooks) Triton 3.6 emits no tensor-core instruction, not even for fp16, and a
# sparse kernel would lose to torch's dense one.
FIRST_CAPABILITY = (8, 0)


def obstacle(device: torch.device) -> str | None:
    """Why Triton kernels are not used on ``device``; None when they are."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    # a graph that is traced looks behind the cache anyway, and warns of it
    found = _obstacle.__wrapped__ if torch.compiler.is_compiling() else _obstacle
    return found(device.type, index)


@functools.lru_cache(maxsize=64)
def _obstacle(kind: str, index: int | None) -> str | None:
    if kind == "cpu":
        return "Triton needs a GPU"
    if kind != "cuda":
        return f"no Triton kernels for {kind}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < FIRST_CAPABILITY:
            found = ".".join(map(str, capability))
            return f"compute capability {found}: Triton emits no tensor-core code below 8.0"
    return None


def launching(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current while a kernel is launched on its tensors.

    Triton launches on the *current* device; a model spread over several GPUs calls with tensors of another one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
