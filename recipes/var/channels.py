"""Sink channels: which numbers of the hidden state are huge at attention sinks, by model.

They come from the language model that a vision-language model is built on. A registry ships with the package; what a
probe finds goes into the user's own file, which is asked first.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from patchkit.errors import PatchkitError, UnsupportedModel

Status = Literal["published", "probed", "given", "candidate"]


@dataclass(frozen=True)
class Identity:
    """What a model's channels are filed under.

    Attributes:
        model: type of the whole model, ``"llava"``.
        text: type of its language model, ``"llama"``.
        hidden: width of the residual stream.
        layers: decoder blocks.
        vocabulary: tokens; tells LLaMA-2 and LLaMA-3 apart, which have the other numbers in common.
    """

    model: str
    text: str
    hidden: int
    layers: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.model} ({self.text}, {self.hidden} wide, {self.layers} layers, {self.vocabulary} tokens)"


@dataclass(frozen=True)
class Channels:
    """The channels of one model, and where they come from.

    Attributes:
        dims: channel numbers; empty = no token is ever a sink.
        status: ``"published"`` with the method, ``"probed"`` on the user's model, ``"given"`` as an option, or a
            ``"candidate"`` that somebody reported and nobody has checked here.
        source: who says so.
    """

    dims: tuple[int, ...]
    status: Status
    source: str


def identity_of(target: Any, text: Any) -> Identity:
    """Of a model whose attention modules in the language model have the config ``text``."""
    return Identity(
        str(getattr(target.config, "model_type", type(target).__name__)),
        str(getattr(text, "model_type", "")),
        int(text.hidden_size),
        int(text.num_hidden_layers),
        int(getattr(text, "vocab_size", 0)),
    )


def user_file() -> Path:
    """Where probed channels are kept: ``PATCHKIT_DATA``, else ``patchkit`` in the user's data folder."""
    chosen = os.environ.get("PATCHKIT_DATA")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return (Path(chosen) if chosen else data / "patchkit").expanduser() / "var-channels.json"


def find(identity: Identity, path: Path | None = None) -> Channels:
    """The channels of a model: the user's own, else the registry's.

    Raises:
        UnsupportedModel: nobody knows them.
        PatchkitError: the user's file cannot be read.
    """
    for entry in (*_user_entries(path or user_file()), *registry()):
        if _fits(entry, identity):
            return Channels(tuple(entry["channels"]), entry["status"], f"{entry['who']}: {entry['source']}")
    raise UnsupportedModel(
        f"the sink channels of {identity} are not known",
        "recipe 'var', option 'sink_dims'",
        "find them once: run patchkit.recipes.var.probe(model, inputs_list).save() or `patchkit calibrate var FILE`, "
        "or give sink_dims=[...] yourself",
    )


def registry() -> list[dict[str, Any]]:
    """The entries that ship with the package."""
    found: list[dict[str, Any]] = json.loads(
        (resources.files("patchkit.recipes.var") / "channels.json").read_text(encoding="utf-8")
    )
    return found


def remember(identity: Identity, dims: Iterable[int], source: str, path: Path | None = None) -> Path:
    """File the channels of a model in the user's registry, in place of what stood there. Returns the file."""
    path = path or user_file()
    entry = {
        "models": [identity.model],
        "text": identity.text,
        "hidden": identity.hidden,
        "layers": identity.layers,
        "vocabulary": [identity.vocabulary, identity.vocabulary],
        "channels": list(dims),
        "status": "probed",
        "who": str(identity),
        "source": source,
    }
    entries = [entry, *(e for e in _user_entries(path) if not _fits(e, identity))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
    os.replace(file.name, path)
    return path


def _user_entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            _fits(entry, Identity("", "", 0, 0, 0))
            tuple(entry["channels"]), entry["status"], entry["who"], entry["source"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchkitError(
            f"the file of probed sink channels cannot be read: {error}", str(path), "mend or delete it, and probe again"
        ) from None
    return entries


def _fits(entry: dict[str, Any], identity: Identity) -> bool:
    low, high = entry.get("vocabulary", (0, 1 << 62))
    same = (entry["text"], entry["hidden"], entry["layers"]) == (identity.text, identity.hidden, identity.layers)
    return same and identity.model in entry["models"] and low <= identity.vocabulary <= high
