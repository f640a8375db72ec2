"""Every write that a patch makes to somebody else's object, so that it can be taken back exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


class _Absent:
    def __repr__(self) -> str:
        return "<absent>"


ABSENT = _Absent()


def read(obj: Any, name: str) -> Any:
    """What ``obj`` itself holds under ``name``, not what its class provides; ``ABSENT`` if nothing."""
    if name == "__class__":
        return type(obj)
    own = vars(obj)
    if name in own:
        return own[name]
    for table in ("_modules", "_parameters", "_buffers"):  # where nn.Module keeps some attributes
        if name in own.get(table, ()):
            return own[table][name]
    return ABSENT


@dataclass(eq=False)
class Entry:
    """One write. ``take_back`` stands in for an attribute when the write was something else."""

    owner: object
    obj: Any
    name: str
    old: Any
    new: Any
    take_back: Callable[[], None] | None = None

    @property
    def place(self) -> str:
        """How messages call it: by its site where it has one."""
        return f"{getattr(self.owner, 'full_name', type(self.obj).__name__)}.{self.name}"


class Journal:
    """Records (object, attribute, old value or absent) before each write; undoing replays backwards."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def record(self, entry: Entry) -> None:
        """Remember a write that is about to happen."""
        self.entries.append(entry)

    def set(self, owner: object, obj: Any, name: str, value: Any) -> None:
        """Record and do ``obj.name = value`` (``__class__`` too)."""
        self.record(Entry(owner, obj, name, read(obj, name), value))
        setattr(obj, name, value)

    def do(self, owner: object, action: Callable[[], None], take_back: Callable[[], None], what: str) -> None:
        """Record and do something that is no attribute write; ``take_back`` must bear a half-done ``action``."""
        self.record(Entry(owner, None, what, None, None, take_back))
        action()

    def undo(self, owner: object = None) -> list[str]:
        """Take back the writes of ``owner`` (None: all), newest first.

        Something that others replaced meanwhile is left as they set it, and named in the returned list.
        """
        drift: list[str] = []
        mine = [e for e in self.entries if owner is None or e.owner is owner]
        for entry in reversed(mine):
            try:
                what = _take_back(entry)
            except Exception as error:  # one object that refuses must not keep the others patched
                what = f"{entry.place} could not be taken back: {error}"
            if what is not None:
                drift.append(what)
        self.entries = [e for e in self.entries if e not in mine] if owner is not None else []
        return drift

    def drift(self) -> list[str]:
        """What others have replaced since we wrote it."""
        return [
            f"{e.place} is now {_name(read(e.obj, e.name))}"
            for e in self.entries
            if e.take_back is None and read(e.obj, e.name) is not e.new
        ]


def _take_back(entry: Entry) -> str | None:
    if entry.take_back is not None:
        entry.take_back()
        return None
    current = read(entry.obj, entry.name)
    if current is entry.new:
        if entry.old is ABSENT:
            delattr(entry.obj, entry.name)
        else:
            setattr(entry.obj, entry.name, entry.old)
    elif current is not entry.old:
        return f"{entry.place} is now {_name(current)}: left as it is"
    return None


def _name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
