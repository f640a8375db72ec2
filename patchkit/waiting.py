"""Waits for peft, so that it knows our adapters whenever it is imported, and nothing is imported for that before.

A finder in ``sys.meta_path`` gives peft a loader that registers behind the module's own; once peft has been imported,
nothing of it is left. It costs next to nothing, so this module imports next to nothing.
"""

from __future__ import annotations

import sys
from typing import Any

PEFT = "peft"


def wait() -> None:
    """Register as soon as peft is there: now, or when somebody imports it. Waiting twice is waiting once."""
    if PEFT in sys.modules:
        _register()
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def _register() -> None:
    from patchkit.finetune.registration import try_to_register

    try_to_register()


class Finder:
    """Finds peft as others do, with a loader of ours. Who only asks where peft is triggers nothing."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The spec that others find for peft; None for everything else."""
        if fullname != PEFT or self._asking:
            return None
        from importlib.util import find_spec

        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class Loader:
    """peft's own loader, and our registration behind it."""

    def __init__(self, own: Any, finder: Finder) -> None:
        self._own, self._finder = own, finder

    def create_module(self, spec: Any) -> Any:
        """As peft's own loader does."""
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """As peft's own loader does, which from here on is all that the module knows of; then register."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)  # type: ignore[arg-type]
        module.__loader__ = module.__spec__.loader = self._own
        self._own.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # get_source and the like
