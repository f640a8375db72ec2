"""Where the files of a run go, and how they get there: all together at the end, each whole or not at all.

For ``output: out/circle.mp4`` a comparison with dense writes, beside each other::

    out/circle.mp4               the patched result
    out/circle.dense.mp4         the same seed without the patch
    out/circle.side-by-side.mp4  both
    out/circle.frames.png        a picture of frames
    out/metrics.json             times, distances, what the recipe did

For a folder, ``output: out/circle/``, the names are ``patched.mp4``, ``dense.mp4``, ``side-by-side.mp4``,
``frames.png`` and ``metrics.json``. Several results of one call are numbered: ``circle-0.png``, ``circle-1.png``.
Recipes that draw what they did add pictures: ``circle.patched.RECIPE-TITLE.png``, in a folder without ``circle``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from patchkit.errors import InvalidOption, MissingDependency
from patchkit.recipe_files.fields import TEXT_SUFFIXES, VIDEO_SUFFIXES, Output

METRICS = "metrics.json"
# kind of result -> the suffixes it can be written with; the first is taken in a folder
SUFFIXES_OF = {"video": (*VIDEO_SUFFIXES, ".png", ".json"), "image": (".png", ".json"), "text": TEXT_SUFFIXES}


@dataclass(frozen=True)
class Names:
    """Names of a run's files, made from what the user gave as output."""

    output: Output

    @property
    def folder(self) -> Path:
        """The folder that all files of the run lie in."""
        return self.output.path if self.output.folder else self.output.path.parent

    def suffix(self, kind: str) -> str:
        """The suffix of the results."""
        return self.output.suffix or SUFFIXES_OF[kind][0]

    def of(self, label: str, suffix: str, *, primary: bool = False, number: int | None = None) -> str:
        """The name of one file; ``primary`` is the one that bears exactly the name the user gave."""
        count = "" if number is None else f"-{number}"
        if self.output.folder:
            return f"{label}{count}{suffix}"
        stem = self.output.path.stem
        return f"{stem}{count}{suffix}" if primary else f"{stem}.{label}{count}{suffix}"


def check_kind(output: Output, kind: str, where: str = "") -> None:
    """Refuse a suffix that a result of this kind cannot be written with, and a video writer that is not installed."""
    suffix = output.suffix or SUFFIXES_OF[kind][0]
    if suffix not in SUFFIXES_OF[kind]:
        raise InvalidOption(
            f"{kind if kind == 'text' else f'a {kind}'} cannot be written as {suffix}",
            where,
            f"end the output with one of {', '.join(SUFFIXES_OF[kind])}, or with / for a folder",
        )
    if suffix == ".mp4" and not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        raise MissingDependency(
            "writing mp4 needs imageio and imageio-ffmpeg", where, 'pip install "patchkit[video]", or write .gif'
        )


def check_writable(output: Output, where: str = "") -> None:
    """Refuse an output that cannot be written. Leaves nothing behind."""
    names = Names(output)
    folder = names.folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InvalidOption(f"{folder} is a file, not a folder", where, "choose another output")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidOption(
            f"cannot write into {folder}: {error.strerror or error}", where, "choose a folder you can write to"
        ) from None
    if (names.folder / METRICS).is_dir():
        raise InvalidOption(f"{names.folder / METRICS} is a folder", where, "choose another output")


@dataclass
class Staging:
    """A hidden folder beside the destination that files are written to before they appear under their names."""

    folder: Path
    hidden: Path
    names: list[str] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """Where to write the file that will be called ``name``."""
        self.names.append(name)
        return self.hidden / name

    def commit(self) -> list[Path]:
        """Give all files their names."""
        done = []
        for name in self.names:
            target = self.folder / name
            if target.exists():
                self.replaced.append(target)
            os.replace(self.hidden / name, target)
            done.append(target)
        return done


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Staging]:
    """Make the destination and a hidden folder in it; afterwards nothing but committed files is left."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=".patchkit-", dir=folder))
    try:
        yield Staging(folder, hidden)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for made in missing:  # deepest first; one that holds a file stays
            with contextlib.suppress(OSError):
                made.rmdir()
