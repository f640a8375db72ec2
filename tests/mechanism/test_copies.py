"""Copies, files and adapters: a copy is unpatched and of the original class, a file knows nothing of us."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fingerprint import assert_same, fingerprint
from mechanism.toys import Identity, Loudness, Scale, Twice

import patchkit


def ours(target: Any) -> list[str]:
    """Everything in ``target`` that is of a class of ours or carries an attribute of ours."""
    found = []
    components = target.components.items() if hasattr(target, "components") else [("", target)]
    if hasattr(type(target), "__patchkit__"):
        found.append("target")
    for name, component in components:
        parts = component.named_modules() if isinstance(component, torch.nn.Module) else [("", component)]
        for part, module in parts:
            for what, thing in (("", module), (".processor", getattr(module, "processor", None))):
                if hasattr(type(thing), "__patchkit__") or any(k.startswith("_patchkit") for k in _dict(thing)):
                    found.append(f"{name}.{part}{what}")
            if any(k.startswith("_patchkit") for k in _dict(getattr(module, "config", None))):
                found.append(f"{name}.{part}.config")
    return found


def _dict(thing: Any) -> dict[str, Any]:
    return getattr(thing, "__dict__", {})


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
@pytest.mark.parametrize("name", ["wan22", "sd15", "mochi", "llama", "qwen25vl", "gpt2"])
def test_copy_is_unpatched_and_the_original_stays_patched(name: str, how: Any) -> None:
    pipeline = name in tiny.PIPELINES
    entry: Any = tiny.PIPELINES[name] if pipeline else tiny.MODELS[name]
    target = entry.build()
    run = tiny.run if pipeline else tiny.forward
    plain = run(entry, target)
    before = fingerprint(target)
    with patchkit.apply(target, [Scale(), Twice()]):
        patched = run(entry, target)
        twin = how(target)
        assert type(twin) is type(entry.build())
        if how is copy.deepcopy:
            assert ours(twin) == []
            assert torch.equal(run(entry, twin), plain)
            assert not patchkit.status(twin)["patched"]
        assert torch.equal(run(entry, target), patched), "the copy disturbs the original"
        assert patchkit.status(target)["patched"]
    assert torch.equal(run(entry, target), plain)
    if how is copy.deepcopy:
        assert torch.equal(run(entry, twin), plain)
        with patchkit.apply(twin, [Scale(), Twice()]):
            assert torch.equal(run(entry, twin), patched)
    else:
        del twin
    assert ours(target) == []
    if pipeline:
        assert_same(before, fingerprint(target))


def test_copies_of_parts() -> None:
    pipe = tiny.PIPELINES["wan21"].build()
    model = tiny.MODELS["llama"].build()
    with patchkit.apply(pipe, Identity()), patchkit.apply(model, Identity()):
        block = copy.deepcopy(pipe.transformer.blocks[0])
        assert ours(block) == []
        scheduler = copy.deepcopy(pipe.scheduler)
        assert not hasattr(type(scheduler), "__patchkit__")
        part = copy.deepcopy(model.model.layers[0].self_attn)
        assert ours(part) == []
        assert part.config._attn_implementation == "sdpa"
        assert "patchkit" not in repr(model.model.layers[0].self_attn.config)


@pytest.mark.parametrize("name", ["wan21", "llama"])
def test_pickling_says_what_to_do(name: str) -> None:
    target = (tiny.PIPELINES | tiny.MODELS)[name].build()  # type: ignore[operator]
    with patchkit.apply(target, Identity()) as patch:
        attention = target.model.layers[0].self_attn if name == "llama" else target.transformer.blocks[0].attn1
        for thing in (target, attention):
            with pytest.raises(patchkit.PatchkitError, match=r"cannot be pickled[\s\S]*remove"):
                pickle.dumps(thing)
            with pytest.raises(patchkit.PatchkitError, match="cannot be pickled"):
                torch.save(thing, io.BytesIO())
        with pytest.raises(patchkit.PatchkitError, match=r"patch\.save"):
            pickle.dumps(patch)
    torch.save(target if name == "llama" else target.transformer, io.BytesIO())


def written(folder: Path) -> str:
    return "".join(p.read_text() for p in sorted(folder.rglob("*.json")))


@pytest.mark.parametrize("name", ["wan21", "sd15", "flux"])
def test_save_and_load_a_pipeline_while_patched(name: str, tmp_path: Path) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    pipe.save_pretrained(tmp_path / "plain")
    with patchkit.apply(pipe, [Scale(), Twice(), Loudness()]):
        pipe.save_pretrained(tmp_path / "patched")
    assert written(tmp_path / "plain") == written(tmp_path / "patched")
    index = json.loads((tmp_path / "patched" / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    loaded = [type(pipe).from_pretrained(tmp_path / folder) for folder in ("plain", "patched")]
    assert ours(loaded[1]) == []
    assert torch.equal(*(tiny.run(entry, p) for p in loaded))
    model, again = (getattr(p, entry.denoisers[0]).state_dict() for p in (pipe, loaded[1]))
    assert all(torch.equal(model[name], again[name]) for name in model)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_save_and_load_a_model_while_patched(name: str, tmp_path: Path) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    plain = tiny.forward(entry, model)
    with patchkit.apply(model, [Scale(), Twice()]):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    assert "patchkit" not in written(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(tiny.forward(entry, loaded.eval()), plain)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["wan21", "sd15", "flux", "llama"])
def test_lora(name: str, when: str) -> None:
    from peft import LoraConfig

    pipeline = name in tiny.PIPELINES
    entry: Any = tiny.PIPELINES[name] if pipeline else tiny.MODELS[name]
    run: Any = tiny.run if pipeline else tiny.forward
    config = LoraConfig(r=2, target_modules=["q_proj"] if name == "llama" else ["to_q"], init_lora_weights=False)

    def model_of(target: Any) -> Any:
        return getattr(target, entry.denoisers[0]) if pipeline else target

    def adapted() -> Any:
        target = entry.build()
        torch.manual_seed(0)
        model_of(target).add_adapter(config)
        return target

    other = adapted()
    lora = run(entry, other)
    with patchkit.apply(other, Scale()):
        scaled = run(entry, other)
    target = adapted() if when == "before" else entry.build()
    plain = run(entry, target)
    before = fingerprint(target)
    with patchkit.apply(target, Scale()) as patch:
        if when == "after":
            torch.manual_seed(0)
            model_of(target).add_adapter(config)
        assert torch.equal(run(entry, target), scaled)
        model_of(target).disable_adapters()
        assert not torch.equal(run(entry, target), scaled)
        model_of(target).enable_adapters()
        assert patch.report()["drift"] == []
    assert torch.equal(run(entry, target), lora)
    assert not torch.equal(lora, scaled)
    assert ours(target) == []
    if when == "before":
        assert torch.equal(plain, lora)
        assert_same(before, fingerprint(target))


def test_removal_while_offloaded() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    pipe.enable_model_cpu_offload(device="cpu")
    plain = tiny.run(entry, pipe)
    patchkit.apply(pipe, Identity()).remove()
    patch = patchkit.apply(pipe, Scale())
    assert not torch.equal(tiny.run(entry, pipe), plain)
    patch.remove()
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert ours(pipe) == []


def test_patched_in_bf16_and_moved() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build().to(torch.bfloat16)
    plain = tiny.run(entry, pipe)
    with patchkit.apply(pipe, Identity()):
        assert torch.equal(tiny.run(entry, pipe), plain)
    pipe = entry.build()
    with patchkit.apply(pipe, Identity()):
        pipe.to(torch.bfloat16)
        assert torch.equal(tiny.run(entry, pipe), plain)


def test_under_autocast_and_inference_mode() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        plain = tiny.run(entry, pipe)
        with patchkit.apply(pipe, [Identity(), Twice()]):
            assert torch.equal(tiny.run(entry, pipe), plain)


def test_gradients_flow_through_a_denoiser() -> None:
    model = tiny.PIPELINES["wan21"].build().transformer
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([500]), torch.randn(1, 16, 32)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(*inputs)[0].sum().backward()
        found: torch.Tensor = model.blocks[0].attn1.to_q.weight.grad.clone()
        return found

    plain = gradient()
    with patchkit.apply(model, Identity()):
        assert torch.equal(gradient(), plain)
    with patchkit.apply(model, Scale()):
        assert not torch.equal(gradient(), plain)
