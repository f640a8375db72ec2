"""The types of our adapters, as adapter files name them."""

from __future__ import annotations

from enum import Enum

from patchkit.finetune.registration import tuners

TunerType = Enum("TunerType", {name: name for name in tuners()}, type=str, module=__name__)  # type: ignore[misc]
