"""Whatever a test does to the registry of recipes or leaves compiled is gone after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from patchkit import registry


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    known = registry.all_recipes()  # with our own ones, which register when they are first imported
    yield
    registry._recipes.clear()
    registry._recipes.update(known)
    torch.compiler.reset()
