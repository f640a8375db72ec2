"""A second progress bar, under the pipeline's own, that counts the clips of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Bar:
    """Counts forwards; begins anew with each step."""

    def __init__(self, bar: Any, clips: int) -> None:
        self._bar, self._clips = bar, clips
        self._at: Any = None

    def forwarded(self, when: Any, number: int) -> None:
        """Clip ``number`` has been forwarded in the denoiser's call ``when``."""
        if self._at != when:
            self._at = when
            self._bar.reset(total=self._clips)
        self._bar.n = number + 1
        self._bar.refresh()


@contextlib.contextmanager
def bar(pipe: Any, clips: int) -> Iterator[Bar]:
    """A bar as the pipeline makes them: shown, or not, as its own."""
    shown = pipe.progress_bar(total=clips)
    shown.leave = False
    shown.set_description("clips of this step")
    try:
        yield Bar(shown, clips)
    finally:
        shown.close()
