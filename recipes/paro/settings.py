"""How a plan is chosen: the options of a calibration, checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from patchkit.errors import InvalidOption
from patchkit.recipes.paro import scoring
from patchkit.recipes.paro.buckets import mask_numbers

Scope = Literal["head", "layer", "timestep", "global"]
SCOPES = ("head", "layer", "timestep", "global")


@dataclass(frozen=True)
class Settings:
    """How a plan is chosen; kept beside the figures, so that a run is only gone on with as it was begun."""

    density: float = 0.3
    buckets: int = 10
    share_from: float = 0.5
    select: scoring.Select = "score"
    alpha: float = 0.5
    scope: Scope = "layer"
    eps: float | Literal["rel"] = 1e-3
    sigma: float = 0.9
    block_size: int = 64
    order_steps: int = 4
    query_stride: int = 1
    empty_below: float = 0.01
    seed: int = 0
    codes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shares = {"density": self.density, "alpha": self.alpha, "sigma": self.sigma, "empty_below": self.empty_below}
        for name, value in shares.items():
            if not 0 <= value <= 1 or (name == "density" and value == 0):
                refuse(name, value, "a share between 0 and 1")
        for name in ("block_size", "order_steps", "query_stride", "buckets"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "1 or more")
        if self.select not in ("score", "kept_mass"):
            refuse("select", self.select, "'score' or 'kept_mass'")
        if self.scope not in SCOPES:
            refuse("scope", self.scope, f"one of {', '.join(SCOPES)}")
        if self.eps != "rel" and not (isinstance(self.eps, float) and 0 < self.eps < 1):
            refuse("eps", self.eps, "a number between 0 and 1, or 'rel'")
        if self.codes is not None and (not self.codes or not set(self.codes) <= set(range(6))):
            refuse("codes", self.codes, "some of the orders 0 to 5")
        mask_numbers(self.buckets, self.share_from)


def refuse(name: str, value: Any, wanted: str) -> None:
    """Raise :class:`InvalidOption`."""
    raise InvalidOption(f"{name} is {value!r}", f"calibrate, option {name!r}", f"give {wanted}")


def described(value: Any) -> str:
    """A call's argument as text that is the same in another process: of pictures and tensors what is in them."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):
        size = tuple(value.shape if hasattr(value, "shape") else value.size)
        return f"{type(value).__name__} {size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(described(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{n}: {described(v)}' for n, v in sorted(value.items()))}}}"
    plain = type(value).__repr__ is not object.__repr__ and not callable(value)
    return repr(value) if plain else getattr(value, "__qualname__", type(value).__qualname__)
