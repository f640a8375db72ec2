"""What the README and the notebooks show is true."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch

import patchkit
from patchkit import registry
from patchkit.recipe_files import files

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_table_is_the_registrys() -> None:
    shown = README.split("checked by tests -->\n")[1].split("\n<!-- /table -->")[0]
    assert shown == registry.markdown()


def test_the_recipe_file_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "circle.yaml"
    path.write_text(text)
    file = files.parse(files.read_file(path))
    assert [r.name for r in file.recipes] == ["adaspa"]


def test_the_recipe_in_one_file_works() -> None:
    (text,) = (b for b in blocks("python") if "class Sharper" in b)
    definition = text.split("patch = patchkit.apply")[0]
    module = types.ModuleType("readme")
    sys.modules["readme"] = module  # dataclasses look their module up
    try:
        exec(compile(definition, "README.md", "exec"), vars(module))
        entry = tiny.PIPELINES["wan21"]
        pipe = entry.build()
        plain = tiny.run(entry, pipe)
        with patchkit.apply(pipe, "sharper", factor=1.5):
            assert not torch.equal(tiny.run(entry, pipe), plain)
        assert torch.equal(tiny.run(entry, pipe), plain)
    finally:
        registry._recipes.pop("sharper", None)
        del sys.modules["readme"]


def test_the_kernels_example_runs() -> None:
    (text,) = blocks("python", (ROOT / "docs/kernels.md").read_text())
    names: dict[str, object] = {}
    exec(compile(text, "kernels.md", "exec"), names)
    assert isinstance(names["sparse"], torch.Tensor)
    assert names["sparse"].isfinite().all()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    missing = [t for t in targets if not (ROOT / t).exists()]
    assert not missing


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda p: p.stem)
def test_notebooks_run(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = notebook.read_text().replace("steps=20", "steps=5").replace("(0.1, 0.2, 0.3, 0.5, 1.0)", "(0.2, 1.0)")
    text = text.replace("import matplotlib.pyplot as plt", "raise ImportError")  # no window in a test
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(compile(text, str(notebook), "exec"), scope)
    assert "density 1.0: recall 1.000, PSNR inf" in capsys.readouterr().out.replace("PSNR 100.0", "PSNR inf")
