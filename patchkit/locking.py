"""One process at a time in a folder that a long run keeps its results in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from patchkit.errors import PatchkitError

LOCK = ".running"  # a file that is left behind; what counts is who holds it, so a killed run blocks nobody


@contextlib.contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[None]:
    """Hold ``folder`` until the end of the block; it is made if need be.

    Args:
        folder: where rows or checkpoints are written.
        doing: what for, as a message says it: ``"a comparison"``.

    Raises:
        PatchkitError: another process (or another part of this one) holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise PatchkitError(
            f"{doing} is already running in this folder",
            str(folder),
            "wait until it has finished, or choose another folder",
        ) from None
    except OSError as error:
        raise PatchkitError(
            f"cannot write: {error.strerror or error}", str(folder), "choose a folder that can be written"
        ) from None
    try:
        yield
    finally:
        lock.release()
