"""What is finished stays: a folder with one row a sample in ``samples.jsonl``, and the samples themselves beside it.

A row is appended at once when its sample is finished, in one write, after the sample's file is there. So whatever
stops a run, what the rows say is true, and the run that follows takes it up.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchkit.errors import InvalidOption, PatchkitError
from patchkit.evaluation.measures import Result
from patchkit.locking import LOCK
from patchkit.media import replacing
from patchkit.runs.writing import finite

ROWS, FRAMES = "samples.jsonl", "frames"
FORMAT = 1


class Store:
    """The folder of one comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[str, Any]] = {}  # by key; a later row wins
        self.superseded = 0  # lines that count no more: cut off, without their sample, or followed by a newer row

    @property
    def path(self) -> Path:
        """The file of rows."""
        return self.folder / ROWS

    def read(self) -> None:
        """Take up the rows whose samples are there."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            row = _row(line)
            if row is None or not self._file(row).is_file():
                self.superseded += 1
            else:
                self.superseded += row["key"] in self.rows
                self.rows[row["key"]] = row
        self.tidy()

    def _file(self, row: Mapping[str, Any]) -> Path:
        return self.folder / FRAMES / row["file"]

    def drop(self, keys: Iterable[str]) -> None:
        """Forget rows, and remove their samples."""
        gone = [self.rows.pop(key) for key in list(keys)]
        self.superseded += len(gone)
        self.tidy()
        for row in gone:
            self._file(row).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Write the file anew if some of its lines count no more."""
        if self.superseded:
            with replacing(self.path) as part:
                part.write_text("".join(_line(row) for row in self.rows.values()), encoding="utf-8")
            self.superseded = 0

    def add(self, row: dict[str, Any], result: Result) -> dict[str, Any]:
        """Keep a finished sample."""
        row = {"format": FORMAT, **finite(row), "file": f"{row['key']}{'.txt' if result.kind == 'text' else '.npz'}"}
        try:
            self._save(self._file(row), result)
            with self.path.open("ab") as stream:
                stream.write(_line(row).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise PatchkitError(
                f"cannot write: {error.strerror or error}",
                str(self.folder),
                "make room; what is finished is kept, and the same command goes on from there",
            ) from None
        self.superseded += row["key"] in self.rows
        self.rows[row["key"]] = row
        return row

    def _save(self, path: Path, result: Result) -> None:
        with replacing(path) as part:
            if result.kind == "text":
                part.write_text(result.text, encoding="utf-8")
            else:
                assert result.pixels is not None
                with part.open("wb") as stream:
                    np.savez_compressed(stream, pixels=result.pixels.numpy())

    def result(self, row: Mapping[str, Any]) -> Result:
        """A finished sample."""
        path = self._file(row)
        if path.suffix == ".txt":
            return Result("text", text=path.read_text(encoding="utf-8"))
        try:
            with np.load(path) as archive:
                return Result(row["kind"], torch.from_numpy(archive["pixels"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise PatchkitError(
                f"a finished sample cannot be read: {error}", str(path), "remove that file; it is computed again then"
            ) from None


def check_folder(folder: Path, where: str = "--output") -> None:
    """Refuse a folder that holds something else than a comparison. Leaves nothing behind."""
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK} and not _ours(folder / ROWS):
        raise InvalidOption(
            f"{folder} exists and holds no comparison that could be gone on with",
            where,
            "choose a new folder, or one that `patchkit compare` wrote before",
        )


def _ours(path: Path) -> bool:
    """Whether a file holds rows, of whichever version; lines that are none are left out when it is written anew."""
    if not path.is_file():
        return False
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return not lines or any({"format", "key", "file"} <= set(_parsed(line)) for line in lines)


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _row(line: str) -> dict[str, Any] | None:
    row = _parsed(line)
    return row if row.get("format") == FORMAT and {"key", "file", "kind", "values"} <= set(row) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n"
