"""A tiny real pipeline to compare recipes on, and a comparison that is made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import testing_recipes  # noqa: F401  registers its recipes
import tiny

from patchkit.evaluation import request, suite
from patchkit.recipe_files import files, yamlread
from patchkit.runs import calls, loading

PROMPTS = ("a cat", 'a "dog" <script>alert(1)</script> & more')
FILE = """\
version: 1
model: {model}
recipes: [{{dimming: {{density: {density}, label: draws}}}}]
inputs: {{num_inference_steps: 1, height: 32, width: 32}}
output: {output}/
"""


@dataclass
class Bench:
    """Runs comparisons on one pipeline and counts the calls that they make."""

    pipe: Any
    folder: Path
    model: Path
    calls: list[str] = field(default_factory=list)
    stop_after: int | None = None

    def request(self, output="out", densities=(0.5, 0.9), seeds=2, labels=("strong", "<b>weak</b>"), **options):
        path = self.folder / "prompts.txt"
        path.write_text("\n".join(PROMPTS))
        sources: list[tuple[str, Any]] = [("dense", None)]
        for label, density in zip(labels, densities, strict=True):
            text = FILE.format(model=self.model, density=density, output=self.folder / output)
            sources.append((label, files.parse(yamlread.read_text(text, "r.yaml"))))
        return request.make(sources, prompts=str(path), seeds=seeds, **options)

    def run(self, **options):
        self.calls.clear()
        return suite.run(self.request(**options), say=lambda text: None)


def make_bench(folder: Path) -> Bench:
    entry = tiny.PIPELINES["sd15"]
    model = folder / "model"
    entry.build().save_pretrained(model)
    return Bench(entry.build(), folder, model)


def listen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the calls of a comparison, and let it load the one pipeline."""
    real = calls.call

    def call(loaded, inputs, *, label, bars):
        if label != "warm-up":
            if bench.stop_after is not None and len(bench.calls) >= bench.stop_after:
                raise KeyboardInterrupt
            bench.calls.append(f"{label} {inputs['prompt'][:5]} {inputs['seed']}")
        return real(loaded, inputs, label=label, bars=bars)

    monkeypatch.setattr(calls, "call", call)
    monkeypatch.setattr(loading, "load", lambda spec, quiet=False: loading.Loaded(bench.pipe, "pipeline"))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A comparison that ran through; nothing is changed by then."""
    bench = make_bench(tmp_path_factory.mktemp("bench"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        listen(bench, monkeypatch)
        return bench, bench.run()


@pytest.fixture
def finished(made, monkeypatch):
    """The same, and its pipeline is what every load gives during a test."""
    listen(made[0], monkeypatch)
    return made
