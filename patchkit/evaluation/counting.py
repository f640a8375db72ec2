"""What a call costs besides time: evaluations of the denoiser, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from patchkit.adapters import adapter_for
from patchkit.adapters.base import unwrap

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Evaluations:
    """Forwards of the denoiser (of a language model: of the model).

    Attributes:
        calls: component -> how often it ran.
        samples: the same, each time with the size of its batch: a batch of both guidance halves counts twice.
    """

    calls: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Sums, and each component where there are several."""
        out: dict[str, Any] = {"calls": sum(self.calls.values()), "samples": sum(self.samples.values())}
        return out | ({"by_component": dict(self.calls)} if len(self.calls) > 1 else {})


@contextlib.contextmanager
def counting(target: Any) -> Iterator[Evaluations]:
    """Count evaluations of a pipeline or model, patched or not; afterwards nothing of it is left.

    A forward hook on the model inside all wrappers sees every forward: those of the pipeline, those that a recipe
    adds around them, and those that a recipe makes by calling the module itself, past the chain. A recipe that
    counts would miss the last kind.
    """
    found = Evaluations()
    handles = []
    try:
        for name, module in adapter_for(target).components().items():
            found.calls[name] = found.samples[name] = 0
            handles.append(unwrap(module).register_forward_pre_hook(_counter(found, name), with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _counter(found: Evaluations, name: str) -> Any:
    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.calls[name] += 1
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 1)
        first = next(tensors, None)  # latents or tokens come first in every model's call
        found.samples[name] += 1 if first is None else int(first.shape[0])

    return count


@dataclass
class Peak:
    """Peak memory of a block of code.

    Attributes:
        bytes: None where it cannot be measured.
        meaning: what was measured, in words.
    """

    bytes: int | None = None
    meaning: str = ""


ON_CPU = "growth of the resident set above its level at the start of the call, at its highest; without the weights"
ON_GPU = "the allocator's peak on the accelerator, with the weights"
UNKNOWN = "not measured: this system does not tell the peak of a process"


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measure the peak of a block.

    On a GPU it is read by whoever calls the model (:class:`patchkit.runs.calls.Produced`), here only its meaning is
    told. On the CPU Linux keeps the peak of the resident set and lets a process reset it. Memory that was freed earlier
    but not given back to the system would hide growth, so it is given back first.
    """
    peak = Peak(None, ON_GPU)
    if device.startswith("cpu"):
        before = _reset()
        peak.meaning = UNKNOWN if before is None else ON_CPU
    yield peak
    if device.startswith("cpu") and before is not None:
        highest = _resident("VmHWM")
        peak.bytes = None if highest is None else max(0, highest - before)


def _reset() -> int | None:
    """Start a new peak; the resident set as it is now, or None where that does not work."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
