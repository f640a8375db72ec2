"""Recipes for tests of files, runs and commands. Importing this registers them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field
from torch import Tensor

from patchkit import Recipe, recipe
from patchkit.context import AttentionCall


@recipe("dimming")
@dataclass(frozen=True, kw_only=True)
class Dimming(Recipe):
    """Weakens every attention output.

    Args:
        density: what remains of the output.
        mode: means nothing.
        factors: means nothing either,
            on two lines.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    mode: Literal["soft", "no", "1e-3"] = "soft"
    factors: list[int] | None = None
    label: str = ""

    summary: ClassVar[str] = "weakens attention"
    paper: ClassVar[str] = "none (arXiv 0000.00000)"

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        call.ledger.count("dimmed")
        call.ledger.note(density=self.density, recall=0.9)
        return next(call) * self.density

    @classmethod
    def pictures(cls, account: Mapping[str, Any]) -> dict[str, Image.Image]:
        if account["options"]["label"] != "draws":
            return {}
        return {"what is <left>": Image.new("L", (4, 4), round(255 * account["means"]["density"]))}


@recipe("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(Recipe):
    """Sleeps in every attention op."""

    seconds: float = 0.2

    summary: ClassVar[str] = "sleeps"

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        time.sleep(self.seconds)
        return next(call)


@recipe("failing")
@dataclass(frozen=True, kw_only=True)
class Failing(Recipe):
    """Raises in the first attention op."""

    error: Literal["interrupt", "end", "runtime", "value"] = "runtime"

    summary: ClassVar[str] = "fails"

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        if self.error == "end":
            signal.raise_signal(signal.SIGTERM)
        raise {"interrupt": KeyboardInterrupt, "runtime": RuntimeError, "value": ValueError}[self.error]("on purpose")


@recipe("captioned")
@dataclass(frozen=True, kw_only=True)
class Captioned(Recipe):
    """Takes an argument of its own."""

    summary: ClassVar[str] = "reads a caption"
    arguments: ClassVar[dict[str, str]] = {"caption": "a text"}

    def run(self, call: Any, next: Callable[[Any], Any]) -> Any:
        call.ledger.note(caption=call.options.get("caption"))
        return next(call)
