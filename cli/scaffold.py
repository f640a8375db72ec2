"""The command that starts a new recipe."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.console import Debug, Json, Output, Quiet, heavy

RECIPE = '''"""{title}: what it does, for whom.

Apply it once this module has been imported::

    import patchkit
    import {module}  # registers the recipe

    with patchkit.apply(pipe, "{name}", strength=0.5) as patch:
        result = pipe("a prompt")
    print(patch.report())

To make it known wherever your package is installed (also to ``patchkit run``), name it in your pyproject.toml::

    [project.entry-points."patchkit.recipes"]
    {name} = "{module}:{cls}"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from patchkit import Recipe, recipe
from patchkit.context import AttentionCall


@recipe("{name}")
@dataclass(frozen=True, kw_only=True)
class {cls}(Recipe):
    """One line on the idea.

    Args:
        strength: how much of the change is applied, from 0 (none) to 1.
    """

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    summary: ClassVar[str] = "does nothing yet"
    paper: ClassVar[str] = ""

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:  # noqa: A002
        """Stand around one attention op: ``call.q`` is (B, H, Nq, D), ``next(call)`` the op itself."""
        out = next(call)
        changed = out  # your method comes here
        call.ledger.count("attended")
        return torch_lerp(out, changed, self.strength)


def torch_lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """``start`` at weight 0, ``end`` at weight 1."""
    return start if end is start else start + weight * (end - start)
'''

TEST = '''"""While the recipe changes nothing, the patched model gives bit for bit what the model gives."""

from __future__ import annotations

import patchkit
import pytest
import torch
from diffusers import PixArtTransformer2DModel

import {module}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        caption_channels=32,
        cross_attention_dim=24,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    ).eval()


def call(model):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, 32, generator=generator)
    with torch.no_grad():
        return model(latents, encoder_hidden_states=text, timestep=torch.tensor([10])).sample


def test_identity(model):
    before = call(model)
    with patchkit.apply(model, "{name}") as patch:
        patched = call(model)
        assert patch.report()["recipes"][0]["counts"]["attended"] > 0
    assert torch.equal(before, patched)
    assert torch.equal(before, call(model))


def test_strength_out_of_range():
    with pytest.raises(patchkit.InvalidOption):
        {module}.{cls}(strength=2)
'''


def new_recipe(
    name: Annotated[str, typer.Argument(help="Name of the recipe, such as my-method.")],
    folder: Annotated[Path, typer.Option("--path", help="Folder to write into.")] = Path(),
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a recipe that works but changes nothing yet, and its test, into the current folder."""
    with Output(json=json_, quiet=quiet, debug=debug).guarded() as out:
        from patchkit.errors import InvalidOption

        module = name.replace("-", "_")
        if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(module):
            raise InvalidOption(f"{name!r} is no name for a recipe", "new-recipe NAME", "small letters: my-method")
        heavy(out)
        from patchkit import registry

        if name in registry.all_recipes():
            raise InvalidOption(f"there is a recipe {name!r} already", "new-recipe NAME", "choose another name")
        files = {folder / f"{module}.py": RECIPE, folder / f"test_{module}.py": TEST}
        _refuse_existing(folder, list(files))
        words = {
            "name": name,
            "module": module,
            "cls": "".join(part.capitalize() for part in module.split("_")),
            "title": name.replace("-", " ").replace("_", " ").capitalize(),
        }
        _write({path: text.format(**words) for path, text in files.items()})
        recipe_file, test_file = files
        out.text(f"wrote {recipe_file}\nwrote {test_file}\ntry it: pytest {test_file}")
        out.data({"recipe": str(recipe_file), "test": str(test_file)})


def _refuse_existing(folder: Path, paths: list[Path]) -> None:
    from patchkit.errors import InvalidOption

    if not folder.is_dir():
        raise InvalidOption(f"there is no folder {folder}", "--path", "make it first, or leave --path out")
    for path in paths:
        if path.exists():
            raise InvalidOption(f"{path} exists already", "new-recipe NAME", "choose another name or folder")


def _write(files: dict[Path, str]) -> None:
    from patchkit.errors import InvalidOption

    done: list[Path] = []
    try:
        for path, text in files.items():
            with path.open("x", encoding="utf-8") as stream:  # never over a file that appeared meanwhile
                done.append(path)
                stream.write(text)
    except BaseException as error:
        for path in done:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InvalidOption(f"cannot write: {error}", "new-recipe NAME", "choose another folder") from None
        raise
