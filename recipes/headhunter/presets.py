"""Files that name heads: what was found, on which model, with which perturbation, for which objective."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchkit.adapters.base import unwrap
from patchkit.errors import InvalidOption, PatchkitError, nearest
from patchkit.sites import Site

FORMAT = 1
SHIPPED = Path(__file__).parent / "heads"
Head = tuple[int, int]
Model = dict[str, dict[str, Any]]  # component -> class, layers, heads


@dataclass(frozen=True)
class Preset:
    """Heads and what they were found with.

    Attributes:
        heads: (layer, head) in order of selection.
        model: what tells the model from others: for each component its class, its layers and their heads.
        scope: of the perturbation; heads that were found with one mean nothing in another.
        target: of the perturbation.
        about: the objective, in words.
        found: how: prompts, seeds, scores, arguments. For the reader.
        where: file it was read from.
    """

    heads: list[Head]
    model: Model
    scope: str
    target: str
    about: str = ""
    found: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def save(self, path: Path) -> Path:
        """Write it, in one step."""
        data = {
            "format": FORMAT,
            "heads": [list(head) for head in self.heads],
            "model": self.model,
            "scope": self.scope,
            "target": self.target,
            "about": self.about,
            "found": dict(self.found),
        }
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise PatchkitError(f"the preset cannot be written: {error}", str(path), "give another path") from None
        return path

    def check(self, scope: str, target: str, model: Model) -> None:
        """Refuse another perturbation, or another model (see :func:`model_of`), than it was made for."""
        for name, own, given in (("scope", self.scope, scope), ("target", self.target, target)):
            if own != given:
                raise InvalidOption(
                    f"its heads were found with {name}={own!r} and mean nothing with {given!r}",
                    f"preset {self.where}",
                    f"give {name}={own!r}",
                )
        if list(model.values()) != list(self.model.values()):  # a denoiser alone is called otherwise
            raise InvalidOption(
                f"it is for {_words(self.model)}, not for {_words(model)}",
                f"preset {self.where}",
                "heads of another model mean nothing here; search for some with patchkit.recipes.headhunter.hunt",
            )


def model_of(target: Any, sites: Iterable[Site]) -> Model:
    """What tells a model from others, as far as its heads go: class of each denoiser, layers, heads, attention modules.

    Weights are not compared: heads of a model are worth trying on one that was trained further from it.

    Args:
        target: a pipeline, or a denoiser alone.
        sites: its attention sites; each belongs to one of the target's components.
    """
    found: Model = {}
    for site in sites:
        if site.component not in found:
            module = unwrap(getattr(target, site.component, target))
            # two releases of one class may have the same layers, but a second attention in some of them (SD3, SD3.5)
            attentions = sum(callable(getattr(part, "processor", None)) for part in module.modules())
            found[site.component] = {
                "class": type(module).__name__,
                "layers": site.layers,
                "heads": site.heads,
                "attentions": attentions,
            }
        facts = found[site.component]
        facts["heads"] = max(facts["heads"], site.heads)
    return found


def _words(model: Model) -> str:
    facts = [(name, *(f.get(n) for n in ("class", "layers", "heads", "attentions"))) for name, f in model.items()]
    return ", ".join(
        f"{name} ({cls}) of {layers} layers with {heads} heads and {attentions} attention modules"
        for name, cls, layers, heads, attentions in facts
    )


def folder() -> Path:
    """Where presets without a path are saved: ``PATCHKIT_PRESETS``, else in the user's settings."""
    chosen = os.environ.get("PATCHKIT_PRESETS")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").expanduser() / "patchkit" / "presets"


def place(name: str) -> Path:
    """The file that a name or path means when it is written."""
    return Path(name).expanduser() if _is_path(name) else folder() / f"{name}.json"


def load(name: str) -> Preset:
    """The preset of a name (the user's own win over shipped ones) or path.

    Raises:
        InvalidOption: there is none, or it is no preset.
    """
    if _is_path(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InvalidOption(f"there is no preset {name}", "option 'heads'", "check the path")
    else:
        path = next((p for root in (folder(), SHIPPED) if (p := root / f"{name}.json").is_file()), Path())
        if not path.name:
            raise InvalidOption(f"there is no preset {name!r}", "option 'heads'", nearest(name, names()))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        heads = [(int(layer), int(head)) for layer, head in data["heads"]]
        return Preset(
            heads, data["model"], data["scope"], data["target"], data.get("about", ""), data.get("found", {}), str(path)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidOption(f"this is no preset: {error}", str(path), "write one with Hunt.save_preset") from None


def names() -> list[str]:
    """Presets that are known by name."""
    roots = (folder(), SHIPPED)
    return sorted({p.relative_to(root).with_suffix("").as_posix() for root in roots for p in root.rglob("*.json")})


def _is_path(name: str) -> bool:
    return name.endswith(".json") or name.startswith((".", "/", "~"))
