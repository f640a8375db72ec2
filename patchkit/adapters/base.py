"""What the mechanism asks of a library's adapter."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.context import AttentionCall
from patchkit.journal import Journal
from patchkit.sites import Site
from patchkit.tracker import Frame, GridRule


class Adapter(abc.ABC):
    """One loaded pipeline or model, seen through what is common to all of them."""

    family: str

    def __init__(self, target: Any) -> None:
        self.target = target
        self.outer = target

    def within(self, outer: Any) -> Adapter:
        """The user holds ``outer``, a wrapper around the target."""
        self.outer = outer
        return self

    @property
    def name(self) -> str:
        """How messages call the target."""
        return type(self.target).__name__

    @property
    def is_pipeline(self) -> bool:
        """Whether calls of the target are whole runs."""
        return False

    @abc.abstractmethod
    def components(self) -> dict[str, torch.nn.Module]:
        """The models that are called once per step (or per forward), by name, as their caller holds them."""

    def holders(self) -> dict[str, torch.nn.Module]:
        """As :meth:`components`, but of a target that has lost them, what is left."""
        return self.components()

    @abc.abstractmethod
    def sites(self) -> list[Site]:
        """Every attention module, in execution order, also those that cannot be patched."""

    @abc.abstractmethod
    def block_name(self, name: str) -> str:
        """Name of the transformer block that an attention module stands in, relative to :meth:`root`."""

    @abc.abstractmethod
    def root(self, component: str) -> torch.nn.Module:
        """The module that names of sites of a component are relative to."""

    def chained(self, component: str) -> bool:
        """Whether each block of a list hands what it returns to the next one and to nothing else."""
        return False

    @abc.abstractmethod
    def install(self, site: Site, journal: Journal, owner: object, slot: Any) -> None:
        """Lead the op of ``site`` to its chain."""

    def is_taken(self, site: Site) -> bool:
        """Whether the op of ``site`` leads to another patch."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """The last patch has left."""

    def grid_rules(self) -> dict[str, GridRule]:
        """How to read the shape of the visual tokens from a component's inputs."""
        return {}

    @abc.abstractmethod
    def place(self, call: AttentionCall, frame: Frame, memory: dict[str, Any]) -> None:
        """Fill in grid, text span and the like of one attention call; ``memory`` lasts until the run ends."""

    def scheduler(self) -> Any:
        """The object whose ``set_timesteps`` and ``step`` tell the time, or None."""
        return None

    def foreign(self) -> list[str]:
        """What others have attached that a patch may meet."""
        return []

    def blockers(self) -> list[str]:
        """What others have attached that no patch can work with."""
        return []

    def tokens(self) -> int | None:
        """Sequence length at the model's default size, for predictions; None if it cannot be told."""
        return None


def layers_of(module: Any) -> Iterator[Any]:
    """``module`` and what the wrappers of ``torch.compile`` and peft hold, from the outside in."""
    while True:
        yield module
        if hasattr(type(module), "get_base_model"):
            module = module.get_base_model()
        elif isinstance(module, torch.nn.Module) and "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return


def unwrap(module: Any) -> Any:
    """The model inside all wrappers."""
    *_, inner = layers_of(module)
    return inner
