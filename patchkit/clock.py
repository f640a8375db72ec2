"""Hear a scheduler: when it is given its timesteps and when it steps."""

from __future__ import annotations

from typing import Any

from patchkit import instance
from patchkit.journal import Journal
from patchkit.tracker import Tracker


class _Listeners(list[Tracker]):
    """Marks a scheduler that is heard; pipelines may share one."""


def listens(scheduler: Any, tracker: Tracker) -> bool:
    """Whether ``tracker`` hears ``scheduler`` already."""
    mark = instance.mark_of(scheduler)
    return isinstance(mark, _Listeners) and any(t is tracker for t in mark)


def listen(journal: Journal, owner: object, scheduler: Any, tracker: Tracker) -> None:
    """Let ``tracker`` hear ``scheduler`` until the journal is undone."""
    mark = instance.mark_of(scheduler)
    if not isinstance(mark, _Listeners):
        mark = _Listeners()
        original = type(scheduler)

        def attach() -> None:
            scheduler.__class__ = _heard(original, mark)
            mark.append(tracker)
    else:

        def attach() -> None:
            mark.append(tracker)

    def detach() -> None:
        mark[:] = [t for t in mark if t is not tracker]
        # not if somebody has subclassed it again since: without listeners ours only passes calls on
        if not mark and vars(type(scheduler)).get(instance.MARK) is mark:
            scheduler.__class__ = instance.original_class(scheduler)

    journal.do(owner, attach, detach, "scheduler clock")
    tracker.clocked = True
    tracker.reset()


def _heard(original: type, listeners: _Listeners) -> type:
    set_timesteps, step = original.set_timesteps, original.step  # type: ignore[attr-defined]

    def heard_set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(self, *args, **kwargs)
        for tracker in listeners:
            tracker.timesteps_set(len(self.timesteps))
        return result

    def heard_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        for tracker in listeners:
            tracker.stepped()
        return result

    return instance.subclass(original, {"set_timesteps": heard_set_timesteps, "step": heard_step}, listeners)
