"""SoftPAG as one would write it down, and what its tests watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchkit import Recipe, recipe
from patchkit.blocks import Block
from patchkit.context import AttentionCall, DenoiseCall, Moment
from patchkit.guidance import conditional
from patchkit.recipes.headhunter import weak

NAIVE = "naive"


def sample(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


@recipe("toy-naive-softpag")
@dataclass(frozen=True, kw_only=True)
class Naive(Recipe):
    """A whole second forward with pushed heads, sharing nothing; keeps (step, eps_cond, eps_weak), changes nothing."""

    pairs: list[tuple[int, int]]
    u: float = 0.5
    names: str = r".*"  # of the attention modules
    kinds = ("self", "joint")

    def validate(self) -> None:
        object.__setattr__(self, "found", [])

    def accepts(self, site: Any) -> str | None:
        return None if site.order == 0 or "attn2" in self.names else "second attention"

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        out = next(call)
        if call.branch == "uncond":
            return out
        cond = sample(out)
        cond = cond[cond.shape[0] // 2 :] if call.branch == "batched" else cond
        cached = getattr(call.module, "cache_context", None)
        with cached(NAIVE) if cached else contextlib.nullcontext():
            faint = next(conditional(call).replace(moment=Moment(call.step, call.total, NAIVE)))
        self.found.append((call.step, cond, sample(faint)))
        return out

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        import re

        heads = [h for layer, h in self.pairs if layer == call.site.layer]
        out = next(call)
        if call.branch != NAIVE or not heads or not re.fullmatch(self.names, call.site.name):
            return out
        v = call.v.repeat_interleave(out.shape[1] // call.v.shape[1], dim=1)
        if call.index > 0 and call.k.shape[2] == 4:
            return out  # of the IP-Adapter
        out = out.clone()
        out[:, heads] = (1 - self.u) * out[:, heads] + self.u * v[:, heads]
        return out


@recipe("toy-weak-predictions")
@dataclass(frozen=True, kw_only=True)
class Inside(Recipe):
    """Stands inside softpag; keeps (step, branch, prediction) of every pass, the weak one too."""

    after = ("softpag",)

    def validate(self) -> None:
        object.__setattr__(self, "found", [])

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        out = next(call)
        self.found.append((call.step, call.branch, sample(out)))
        return out

    def weak(self) -> list[Tensor]:
        return [out for _, branch, out in self.found if branch == weak.WEAK]


@recipe("toy-residuals")
@dataclass(frozen=True, kw_only=True)
class Residuals(Recipe):
    """Stands outside softpag and hands the denoiser what a ControlNet would."""

    before = ("softpag",)
    make: Any = None

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        call = call.replace()
        call.kwargs |= self.make(call)
        return next(call)


@contextlib.contextmanager
def nothing_shared(monkeypatch: Any) -> Iterator[None]:
    """The weak pass runs whole."""
    with monkeypatch.context() as patch:
        patch.setattr(Block, "must_run", property(lambda self: "a test says so"))
        patch.setattr(weak, "_keep", lambda *_: None)
        yield


def steered(pipe: Any) -> list[Tensor]:
    """What the scheduler is given from now on, a tensor a step."""
    given: list[Tensor] = []
    inner = pipe.scheduler.step

    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(model_output)
        return inner(model_output, *args, **kwargs)

    pipe.scheduler.step = step
    return given


def close(found: Tensor, expected: Tensor, limit: float = 2e-5) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert error < limit, error


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
