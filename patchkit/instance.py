"""Override methods of one *instance*: it gets a subclass of its own that nobody else sees.

``isinstance`` holds, ``forward`` and the state dict are untouched (so offloading and compiling keep working), the
class keeps its name (so ``save_pretrained`` writes the original one), and setting ``__class__`` back restores it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from patchkit.errors import PatchkitError
from patchkit.journal import Journal

MARK = "__patchkit__"


def mark_of(obj: Any) -> Any:
    """What was put on the subclass of ``obj`` as its mark; None for an object that is not overridden."""
    return getattr(type(obj), MARK, None)


def original_class(obj: Any) -> type:
    """The class that ``obj`` had before it was overridden, also when others have subclassed it again since."""
    for cls in type(obj).__mro__:
        if MARK in vars(cls):
            return cls.__bases__[0]
    return type(obj)


def override(journal: Journal, owner: object, obj: Any, methods: dict[str, Callable[..., Any]], mark: Any) -> None:
    """Give ``obj`` a subclass in which ``methods`` stand before its own; ``mark`` is found again by :func:`mark_of`."""
    journal.set(owner, obj, "__class__", subclass_of(type(obj), methods, mark))


def subclass_of(original: type, methods: dict[str, Callable[..., Any]], mark: Any) -> type:
    """The subclass that :func:`override` gives to an instance; several instances can share it."""
    return subclass(original, methods, mark, _posing(type(original)))


def _posing(kind: type) -> type:
    """A metaclass whose classes equal the one they stand for: ``from_pipe`` asks ``type(component) in (...)``."""

    def base(cls: Any) -> Any:
        return cls.__bases__[0] if MARK in vars(cls) else cls

    body: dict[str, Any] = {
        "__eq__": lambda cls, other: cls is other or base(cls) is other,
        "__hash__": lambda cls: type.__hash__(base(cls)),
    }
    return type(kind.__name__, (kind,), body)


def subclass(
    original: type, methods: dict[str, Callable[..., Any]], mark: Any, kind: Callable[..., type] | None = None
) -> type:
    """A subclass of ``original`` that looks like it, and whose copies and new instances are plain ``original``."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # pipe.__class__(**pipe.components) and scheduler.__class__.from_config(...) are common: they make a new object
        if MARK in vars(cls):
            return original(*args, **kwargs)
        return object.__new__(cls)  # somebody's subclass of ours

    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__new__": new,
        "__deepcopy__": _deepcopy,
        "__copy__": _copy,
        "__reduce_ex__": _refuse_pickle,
        MARK: mark,
    }
    for name, method in methods.items():
        inherited = getattr(original, name)
        body[name] = functools.wraps(inherited)(method)
    return (kind or type(original))(original.__name__, (original,), body)


def _parts(obj: Any) -> tuple[Any, tuple[Any, ...], Any]:
    original: Any = original_class(obj)
    # asking the original class: our own __reduce_ex__ refuses
    func, args, *rest = original.__reduce_ex__(obj, 4)
    args = tuple(original if a is type(obj) else a for a in args)
    func = original if func is type(obj) else func
    state = rest[0] if rest else None
    if isinstance(state, dict):  # what a patch hung on the instance stays behind
        state = {name: value for name, value in state.items() if not name.startswith("_patchkit_")}
    return func, args, state


def _fill(new: Any, state: Any) -> Any:
    if state is not None:
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
        else:
            new.__dict__.update(state)
    return new


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    func, args, state = _parts(self)
    if len(args) == 1 and isinstance(args[0], type):  # the usual case: make it first, so that cycles find it
        new = func(*args)
        memo[id(self)] = new
        return _fill(new, copy.deepcopy(state, memo))
    return _fill(func(*copy.deepcopy(args, memo)), copy.deepcopy(state, memo))


def _copy(self: Any) -> Any:
    func, args, state = _parts(self)
    return _fill(func(*args), dict(state) if isinstance(state, dict) else state)


def _refuse_pickle(self: Any, protocol: Any) -> Any:
    raise PatchkitError(
        f"a patched {type(self).__name__} cannot be pickled",
        remedy="call patch.remove() first, or write it with save_pretrained, which works while patched",
    )
