"""What a hunt has found so far, in one JSON file: written after every measurement, so that a hunt can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchkit.errors import InvalidOption, PatchkitError

FORMAT = 1
Head = tuple[int, int]


def text_of(head: Head) -> str:
    """``L3H7``."""
    return f"L{head[0]}H{head[1]}"


class Store:
    """Scores by round, head and pair of prompt and seed.

    Args:
        path: the file; None keeps everything in memory.
        terms: everything that a score depends on, as plain data. A file with other terms is not gone on with.
    """

    def __init__(self, path: Path | None, terms: Mapping[str, Any]) -> None:
        self.path = path
        self.terms = json.loads(json.dumps(terms))  # as it will be read back
        # for each round: head -> score of each pair, a number or several by name
        self.rounds: list[dict[str, list[Any]]] = []
        self.selected: list[list[list[int]]] = []  # for each finished round: the heads that it added
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            terms, rounds, selected = found["terms"], found["rounds"], found["selected"]
            known = found["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PatchkitError(f"the store cannot be read: {error}", str(path), "move it away to start anew") from None
        if not known:
            raise PatchkitError("the store is of another version of patchkit", str(path), "move it away to start anew")
        if terms != self.terms:
            differing = sorted(k for k in {*terms, *self.terms} if terms.get(k) != self.terms.get(k))
            raise InvalidOption(
                f"the store is of another hunt: {', '.join(differing)} differ",
                str(path),
                "give the same arguments to go on with it, or another store",
            )
        self.rounds, self.selected = rounds, selected

    def scores(self, number: int) -> dict[str, list[Any]]:
        """Of a round, to be read; heads without all of their scores have a shorter list."""
        return self.rounds[number] if number < len(self.rounds) else {}

    def add(self, number: int, found: Mapping[Head, list[Any]]) -> None:
        """Keep the scores of some heads in a round; the file is replaced in one step."""
        while len(self.rounds) <= number:
            self.rounds.append({})
        self.rounds[number].update({text_of(head): scores for head, scores in found.items()})
        self._write()

    def finish(self, heads: list[Head]) -> None:
        """A round is over and has added these heads."""
        self.selected.append([list(head) for head in heads])
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        data = {"format": FORMAT, "terms": self.terms, "rounds": self.rounds, "selected": self.selected}
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        except OSError as error:
            raise PatchkitError(
                f"the store cannot be written: {error}", str(self.path), "make room; what it holds is still whole"
            ) from None
