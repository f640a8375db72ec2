"""Recipes of third parties, and what importing does."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from mechanism.toys import Identity, Scale
from torch import Tensor

import patchkit
from patchkit import Recipe, recipe, registry
from patchkit.context import AttentionCall

CODE = """
from dataclasses import dataclass
from patchkit import Recipe, recipe

@recipe("{name}")
@dataclass(frozen=True)
class Theirs(Recipe):
    factor: float = 2.0
    def attend(self, call, next):
        return next(call) * self.factor
"""
BARE = """
from dataclasses import dataclass
from patchkit import Recipe

@dataclass(frozen=True)
class Theirs(Recipe):
    def attend(self, call, next):
        return next(call)
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes an installed package with an entry point; afterwards it is as if it had never been."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_loaded", False)

    def make(package: str, code: str, point: str, value: str) -> None:
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[patchkit.recipes]\n{point} = {value}\n")
        monkeypatch.setitem(sys.modules, package, None)  # remembers that it was absent
        del sys.modules[package]

    return make


def test_by_decorator() -> None:
    @recipe("toy-mine")
    @dataclass(frozen=True)
    class Mine(Recipe):
        def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
            return next(call)

    assert patchkit.recipes()["toy-mine"] is Mine
    patchkit.apply(tiny.PIPELINES["wan21"].build(), "toy-mine").remove()


@pytest.mark.parametrize("value", ["toy_theirs", "toy_theirs:Theirs"])
def test_by_entry_point(distribution: Any, value: str) -> None:
    distribution("toy_theirs", CODE.format(name="toy-theirs"), "toy-theirs", value)
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, "toy-theirs", factor=1.0):
        assert torch.equal(tiny.run(entry, pipe), plain)
    with patchkit.apply(pipe, "toy-theirs"):
        assert not torch.equal(tiny.run(entry, pipe), plain)
    assert "toy-theirs" in patchkit.recipes()


def test_an_entry_point_without_the_decorator_gives_its_name(distribution: Any) -> None:
    distribution("toy_bare", BARE, "toy-bare", "toy_bare:Theirs")
    assert patchkit.recipes()["toy-bare"].name == "toy-bare"


def test_a_broken_entry_point_is_named_and_the_rest_works(distribution: Any, caplog: pytest.LogCaptureFixture) -> None:
    distribution("toy_broken", "import nothing_of_this_name", "toy-broken", "toy_broken")
    distribution("toy_theirs", CODE.format(name="toy-theirs"), "toy-theirs", "toy_theirs")
    with caplog.at_level(logging.WARNING, logger="patchkit"):
        known = patchkit.recipes()
    assert "toy-theirs" in known
    assert "toy-broken" not in known
    assert "'toy-broken' (toy_broken) could not be loaded: No module named 'nothing_of_this_name'" in caplog.text


def test_a_name_taken_by_an_entry_point(distribution: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The one that was there stays, both are named."""
    distribution("toy_thief", CODE.format(name="toy-scale"), "toy-scale", "toy_thief")
    with caplog.at_level(logging.WARNING, logger="patchkit"):
        assert patchkit.recipes()["toy-scale"] is Scale
    for word in ("two recipes are called 'toy-scale'", "toy_thief.Theirs", "Scale"):
        assert word in caplog.text


def test_a_name_taken_by_decorator() -> None:
    with pytest.raises(patchkit.PatchkitError, match=r"two recipes are called 'toy-identity'[\s\S]*rename"):

        @recipe("toy-identity")
        @dataclass(frozen=True)
        class Other(Identity):
            pass

    assert patchkit.recipes()["toy-identity"] is Identity


def test_the_same_class_may_come_again() -> None:
    for _ in range(2):

        @recipe("toy-again")
        @dataclass(frozen=True)
        class Again(Identity):
            pass

    assert patchkit.recipes()["toy-again"] is Again


def test_half_a_registry_does_not_pass_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a recipe of ours is broken")

    monkeypatch.setattr(registry, "_loaded", False)
    with monkeypatch.context() as broken:
        broken.setattr("patchkit.registry.pkgutil.iter_modules", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="is broken"):
                patchkit.recipes()
    assert "adaspa" in patchkit.recipes()


# --- importing


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_none_of_the_libraries() -> None:
    python(
        """
        import sys
        import patchkit
        patchkit.apply, patchkit.plan, patchkit.status, patchkit.remove, patchkit.Recipe, patchkit.Patch
        loaded = {"diffusers", "transformers", "triton", "accelerate", "peft"} & set(sys.modules)
        assert not loaded, loaded
        patchkit.recipes()
        loaded = {"diffusers", "transformers", "triton"} & set(sys.modules)
        assert not loaded, loaded
        """
    )


def test_importing_and_planning_change_nothing_in_them() -> None:
    """Nothing is registered until a transformers model is patched, and then one fixed name, once."""
    python(
        """
        import os, sys
        sys.path.insert(0, "tests")
        os.environ["HF_HUB_OFFLINE"] = "1"
        import tiny
        from fingerprint import diff, fingerprint
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ops
        model = tiny.MODELS["llama"].build()
        before, names = fingerprint(model), (set(ops), set(masks))
        import patchkit, patchkit.api, patchkit.adapters.transformers, patchkit.adapters.diffusers
        from mechanism.toys import Identity
        patchkit.plan(model, Identity())
        assert (set(ops), set(masks)) == names
        assert not diff(before, fingerprint(model))
        for _ in range(2):
            patchkit.apply(model, Identity()).remove()
            assert (set(ops) - names[0], set(masks) - names[1]) == ({"patchkit"}, {"patchkit"})
        assert not diff(before, fingerprint(model))
        """
    )
