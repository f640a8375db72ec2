"""The recipes that are known: patchkit's own, those of installed packages, and those registered in this process."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import threading
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from patchkit.errors import PatchkitError, UnknownRecipe, nearest
from patchkit.recipe_base import R, Recipe

logger = logging.getLogger(__name__)

GROUP = "patchkit.recipes"  # entry-point group of third parties; the value names a recipe class or its module
_recipes: dict[str, type[Recipe]] = {}
_loaded = False
_loading = threading.RLock()  # re-entrant: a recipe module may ask for the registry while it is imported


def recipe(name: str) -> Callable[[type[R]], type[R]]:
    """Register a recipe class under ``name``: ``@recipe("name")`` above ``@dataclass(frozen=True)``."""

    def register(cls: type[R]) -> type[R]:
        cls.name = name
        add(cls)
        return cls

    return register


def add(cls: type[Recipe]) -> None:
    """Register a recipe class under its name. The same class may come again (a module reloaded), another may not."""
    other = _recipes.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PatchkitError(
            f"two recipes are called {cls.name!r}",
            f"{other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}",
            "rename one of them",
        )
    _recipes[cls.name] = cls


def _load() -> None:
    with _loading:  # another thread must not find half a registry
        if not _loaded:
            _load_all()


def _load_all() -> None:
    global _loaded
    _loaded = True  # before the imports, see above
    try:
        package = importlib.import_module("patchkit.recipes")
        for module in pkgutil.iter_modules(package.__path__, "patchkit.recipes."):
            importlib.import_module(module.name)
    except BaseException:
        _loaded = False  # half a registry must not pass for the whole one at the next call
        raise
    for point in entry_points(group=GROUP):
        try:
            found = point.load()
            if isinstance(found, type) and issubclass(found, Recipe) and not found.name:
                found.name = point.name  # not decorated: called as the entry point is
                add(found)
        except Exception as error:  # somebody else's package must not take ours down; it is named instead
            logger.warning("recipe entry point %r (%s) could not be loaded: %s", point.name, point.value, error)


def get(name: str) -> type[Recipe]:
    """The recipe class of that name; raises :class:`UnknownRecipe` with the nearest name."""
    _load()
    if name not in _recipes:
        raise UnknownRecipe(f"there is no recipe {name!r}", remedy=nearest(name, _recipes))
    return _recipes[name]


def all_recipes() -> dict[str, type[Recipe]]:
    """Every recipe by name."""
    _load()
    return dict(sorted(_recipes.items()))


def describe(cls: type[Recipe]) -> dict[str, Any]:
    """What a table of recipes shows."""
    return {
        "name": cls.name,
        "summary": cls.summary,
        "paper": cls.paper,
        "effect": cls.effect,
        "families": list(cls.families),
        "models": list(cls.models),
        "module": cls.__module__,
    }


# short name of a model, as recipes list those they are tested on -> how people write it
TITLES = {
    "cogvideox": "CogVideoX",
    "hunyuanvideo": "HunyuanVideo",
    "wan": "Wan 2.1 / 2.2",
    "mochi": "Mochi",
    "ltx": "LTX",
    "flux": "FLUX",
    "sd3": "SD3 / 3.5",
    "qwenimage": "Qwen-Image",
    "sd": "SD 1.5 / SDXL",
    "dit": "DiT",
    "pixart": "PixArt",
    "sana": "Sana",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "bitnet": "BitNet",
    "gemma3": "Gemma 3",
    "gpt2": "GPT-2",
    "bert": "BERT",
    "vit": "ViT",
    "llava": "LLaVA",
    "qwenvl": "Qwen2 / 2.5 / 3-VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3 / SmolVLM",
    "paligemma": "PaliGemma",
}


def markdown() -> str:
    """The recipes as a table of methods and models, with a tick where a recipe's tests cover the model."""
    recipes = [cls for cls in all_recipes().values() if cls.__module__.startswith("patchkit.recipes")]
    known = {model for cls in recipes for model in cls.models}
    models = [m for m in TITLES if m in known] + sorted(known - TITLES.keys())
    lines = [
        "| method | " + " | ".join(TITLES.get(m, m) for m in models) + " |",
        "|---|" + ":-:|" * len(models),
    ]
    for cls in recipes:
        ticks = " | ".join("✓" if m in cls.models else "" for m in models)
        lines.append(f"| `{cls.name}`: {cls.summary}. *{cls.paper}* | {ticks} |")
    return "\n".join(lines)
