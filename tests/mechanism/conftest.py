"""Whatever a test does to the registry of recipes or leaves compiled is gone after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from patchkit import registry


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    known = dict(registry._recipes)
    yield
    registry._recipes.clear()
    registry._recipes.update(known)
    torch.compiler.reset()
