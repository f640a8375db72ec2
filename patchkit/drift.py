"""What others have done to a patched target meanwhile, and what they keep from the recipes on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchkit.adapters.base import unwrap

if TYPE_CHECKING:
    from patchkit.installation import Installation

_WRAPPED = "torch.compile or peft was put around a patched model; apply to the wrapper instead"


def drift(installation: Installation) -> list[str]:
    """What others have replaced since it was installed, and what they keep from the recipes; a sentence each."""
    found = swapped(installation) + installation.journal.drift()
    if installation.tracker.blind:
        found.append(
            "attention ran outside any call of the model that we see: step, branch and grid were unknown there "
            f"({_WRAPPED})"
        )
    if installation.unheard:
        names = ", ".join(sorted(installation.unheard))
        found.append(f"{names} could not stand around the model's calls ({_WRAPPED})")
    if installation.blocks.missed:
        names = ", ".join(sorted(installation.blocks.missed))
        found.append(f"{names} could not stand around the blocks of a model that is compiled whole")
    return found


def swapped(installation: Installation) -> list[str]:
    """Models of the target that are not those which were patched."""
    present = dict(installation.adapter.holders())
    return [
        f"{name} is now another {type(present.get(name)).__name__}: it runs unpatched"
        for name, inner in installation.entered.items()
        if unwrap(present.get(name)) is not inner
    ]
