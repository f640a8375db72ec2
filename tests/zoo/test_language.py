"""The two language models from packages: where they are kept, what happens without them, and what they can do."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import pytest
import torch

from patchkit import zoo
from patchkit.errors import MissingDependency, PatchkitError
from patchkit.zoo import language


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["gemma", "minilm"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(cache, monkeypatch, name):
    monkeypatch.setattr(language, "find_spec", lambda package: None)
    with pytest.raises(MissingDependency, match=f"zoo/{name}") as caught:
        zoo.load(name)
    assert 'pip install "patchkit[language]"' in caught.value.remedy
    assert not cache.exists()


def test_cache_folder(cache, monkeypatch):
    assert language.cache_folder() == cache
    monkeypatch.delenv("PATCHKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert language.cache_folder() == Path("/somewhere/patchkit")


def test_a_conversion_that_fails_leaves_nothing(cache, monkeypatch):
    package = types.ModuleType(language.GEMMA)

    def assemble(path):
        Path(path).write_bytes(b"half of a file")
        raise OSError("the disk is full")

    package.assemble = assemble
    monkeypatch.setitem(sys.modules, language.GEMMA, package)
    monkeypatch.setattr(language, "installed", lambda package: True)
    with pytest.raises(OSError, match="disk is full"):
        language.load_gemma()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(language, "installed", lambda package: True)
    with pytest.raises(PatchkitError, match="PATCHKIT_CACHE"):
        language.load_gemma()


def test_the_shipped_text():
    text = zoo.prose()
    assert 2000 < len(text.split()) < 4000
    assert text.isascii()


@pytest.mark.skipif(not language.installed(language.MINILM), reason=language.INSTALL)
def test_minilm_knows_what_sentences_have_in_common():
    pair = zoo.load("zoo/minilm")
    vectors = language.embed(
        pair, ["A red circle on a table.", "A crimson disc lies on a desk.", "Shares fell sharply."]
    )
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.slow
@pytest.mark.skipif(not language.installed(language.GEMMA), reason=language.INSTALL)
def test_gemma_reads_and_writes_english():
    """The user's cache is used: converting takes a minute."""
    from patchkit.text_metrics import perplexity

    model, tokenizer = zoo.load("gemma")
    assert (model.config.num_hidden_layers, model.config.head_dim, model.dtype) == (18, 256, torch.float32)
    ids = tokenizer("Q: What is the capital of France?\nA:", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    text = zoo.prose()[:4000]
    assert perplexity(model, tokenizer, text, 512, 256).value < 45
    words = text.split()
    random.Random(0).shuffle(words)
    assert perplexity(model, tokenizer, " ".join(words), 512, 256).value > 200
