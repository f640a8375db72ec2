"""What a recipe is told at every attention call of the transformers models, in all the ways they are called."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from mechanism.toys import Counter, Identity, Replace, Scale, Watch

import patchkit
from patchkit.context import Grid

MODELS = pytest.mark.parametrize("name", tiny.MODELS)
TEXT = ("llama", "mistral", "qwen2", "qwen3", "bitnet", "gemma3", "gpt2")
TOWERS = ("llava", "qwen2vl", "qwen25vl")


@functools.cache
def built(name: str) -> Any:
    return tiny.MODELS[name].build()


def tower(name: str, site: str) -> str:
    if name not in TOWERS:
        return "model"
    return "vision" if "vision" in site or "visual" in site else "text"


@MODELS
def test_forward(name: str) -> None:
    entry, model, watch = tiny.MODELS[name], built(name), Watch()
    facts = entry.expected
    plain = tiny.forward(entry, model)
    with patchkit.apply(model, watch) as patch:
        assert torch.equal(tiny.forward(entry, model), plain)
        ops = sum(row["calls"] for row in patch.report()["recipes"][0]["rows"] if row["site"])
    assert ops == len(watch.seen) == sum(site.ops for site in facts.sites)
    got = [(s.component, s.site, s.kind, s.mask, s.q[1], s.q[3], s.layer, s.index, s.step, s.total) for s in watch.seen]
    assert got == [
        (tower(name, s.name), s.name, s.kind, s.mask, s.heads, s.head_dim, s.layer, index, 0, None)
        for s in facts.sites
        for index in range(s.ops)
    ]
    assert not any(s.causal for s in watch.seen if s.mask != "none")
    for s in watch.seen:
        if s.component != "vision" and name != "vit":
            assert s.k[1] == facts.kv_heads


@pytest.mark.parametrize("name", TOWERS)
def test_visual_tokens_are_marked_in_the_decoder(name: str) -> None:
    entry, model, watch = tiny.MODELS[name], built(name), Watch()
    marked = (entry.inputs(model)["input_ids"] == 390).sum(-1).tolist()
    with patchkit.apply(model, watch):
        tiny.forward(entry, model)
        assert {tuple(s.visual or ()) for s in watch.seen if s.component == "text"} == {tuple(marked)}
        assert all(s.visual is None for s in watch.seen if s.component == "vision")
        watch.seen.clear()
        tiny.generate(entry, model, new_tokens=3)
        text = [s for s in watch.seen if s.component == "text"]
        assert [s.step for s in text] == [0, 0, 1, 1, 2, 2]
        assert {tuple(s.visual or ()) for s in text} == {tuple(marked)}, "decoded tokens are text"


def test_patch_grids_of_the_vision_towers() -> None:
    for name, grid in (("vit", Grid(1, 4, 4)), ("llava", Grid(1, 4, 4))):
        entry, model, watch = tiny.MODELS[name], built(name), Watch()
        with patchkit.apply(model, watch):
            tiny.forward(entry, model)
        assert {s.grid for s in watch.seen if s.component != "text"} == {grid}


@pytest.mark.parametrize("name", [n for n, e in tiny.MODELS.items() if e.causal])
def test_generate(name: str) -> None:
    """Step 0 is the prefill, then one a token; the same tokens; a second call begins again."""
    entry, model, watch = tiny.MODELS[name], built(name), Watch()
    plain = tiny.generate(entry, model, new_tokens=4)
    with patchkit.apply(model, watch):
        for _ in range(2):
            watch.seen.clear()
            assert torch.equal(tiny.generate(entry, model, new_tokens=4), plain)
            decoder = [s for s in watch.seen if s.component != "vision"]
            assert [s.step for s in decoder] == [0, 0, 1, 1, 2, 2, 3, 3]
            prompt = entry.inputs(model)["input_ids"].shape[1]
            assert [s.q[2] for s in decoder] == [prompt] * 2 + [1] * 6


@pytest.mark.parametrize("name", TEXT)
def test_own_op_agrees(name: str) -> None:
    """A recipe that computes the op from what it is told gets the model's logits: mask, causal, scale, KV heads."""
    entry, model = tiny.MODELS[name], built(name)
    inputs = entry.inputs(model)
    kept = inputs["attention_mask"].bool()
    for extra in ({}, {"attention_mask": None}, {"attention_mask": torch.ones_like(inputs["attention_mask"])}):
        plain = tiny.forward(entry, model, **extra)
        with patchkit.apply(model, Replace()):
            own = tiny.forward(entry, model, **extra)
        rows = kept if not extra else torch.ones_like(kept)
        torch.testing.assert_close(own[rows], plain[rows], atol=2e-5, rtol=2e-4)


def one_row(name: str = "llama") -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 380, (1, 10), generator=torch.Generator().manual_seed(0))}


def test_unpadded_prefill_is_causal_and_decoding_is_not() -> None:
    model, watch = built("llama"), Watch()
    with patchkit.apply(model, watch), torch.no_grad():
        model.generate(**one_row(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [(s.causal, s.mask, s.q[2], s.k[2]) for s in watch.seen] == [(True, "none", 10, 10)] * 2 + [
        (False, "none", 1, 11)
    ] * 2


@pytest.mark.parametrize("kind", ["static", "static-compiled", "beams", "no-cache", "assisted-chunks"])
def test_ways_to_generate(kind: str) -> None:
    from transformers import CompileConfig

    model, watch, counter = built("llama"), Watch(), Counter()
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    options: dict[str, Any] = {
        "static": {"cache_implementation": "static"},
        "static-compiled": {"cache_implementation": "static", "compile_config": compiling},
        "beams": {"num_beams": 3},
        "no-cache": {"use_cache": False},
        "assisted-chunks": {"prefill_chunk_size": 4},
    }[kind]
    options |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(**one_row(), **options)
    try:
        with patchkit.apply(model, [watch, counter]) as patch:
            assert torch.equal(model.generate(**one_row(), **options), plain)
            assert patch.report()["drift"] == []
    finally:
        vars(model).pop("_compiled_call", None)
        vars(model).pop("_last_compile_config", None)
    steps = [s.step for s in watch.seen if s.layer == 0]
    expected = {"no-cache": [0, 0, 0, 0], "assisted-chunks": [0, 1, 2, 3, 4, 5]}.get(kind, [0, 1, 2, 3])
    assert steps == expected
    counts = [c[-1] for c in counter.counts if c[0].endswith("0.self_attn")]
    assert counts == ([1, 1, 1, 1] if kind == "no-cache" else list(range(1, len(expected) + 1))), "the state is kept"


def test_static_cache() -> None:
    """Its keys are longer than what is in it: empty slots are cut off in the prefill, and masked when decoding."""
    model, watch = tiny.MODELS["llama"].build(), Watch()
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    options |= {"cache_implementation": "static", "return_dict_in_generate": True}
    plain = model.generate(**one_row(), **options)
    with patchkit.apply(model, watch):
        watched = model.generate(**one_row(), **options)
    with patchkit.apply(model, Replace()):
        own = model.generate(**one_row(), **options)
    assert [(s.causal, s.mask, s.k[2], s.visible) for s in watch.seen[::2]] == [
        (True, "none", 10, None),
        (False, "bool_key", 12, [11]),
        (False, "bool_key", 12, [12]),
    ]
    for a, b, c in zip(plain.logits, watched.logits, own.logits, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "gemma3"])
def test_eager_attention_returns_its_weights(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    model.set_attn_implementation("eager")
    plain = tiny_output(entry, model, output_attentions=True)
    with patchkit.apply(model, [Identity(), Watch()]):
        patched = tiny_output(entry, model, output_attentions=True)
    assert torch.equal(patched[0], plain[0])
    assert plain.attentions
    assert all(torch.equal(a, b) for a, b in zip(patched.attentions, plain.attentions, strict=True))


@torch.no_grad()
def tiny_output(entry: tiny.TinyModel, model: Any, **extra: Any) -> Any:
    return model(**entry.inputs(model), **extra)


@pytest.mark.parametrize("order", ["before", "after"])
def test_attention_implementation_chosen_before_or_after(order: str) -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build()
    eager = entry.build()
    eager.set_attn_implementation("eager")
    plain = tiny.forward(entry, eager)
    if order == "before":
        model.set_attn_implementation("eager")
    with patchkit.apply(model, Identity()):
        if order == "after":
            model.set_attn_implementation("eager")
        assert torch.equal(tiny.forward(entry, model), plain)
        assert tiny_output(entry, model, output_attentions=True).attentions[0] is not None
    assert torch.equal(tiny.forward(entry, model), plain)


def test_a_text_generation_pipeline_as_target() -> None:
    from transformers import TextGenerationPipeline
    from transformers.pipelines.base import Pipeline

    model = tiny.MODELS["llama"].build()
    pipe: Pipeline = object.__new__(TextGenerationPipeline)
    pipe.model = model
    watch = Watch()
    with patchkit.apply(pipe, watch):
        assert patchkit.status(pipe)["patched"]
        assert patchkit.status(model)["patched"]
        pipe.model.generate(**one_row(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [s.step for s in watch.seen] == [0, 0, 1, 1]
    assert not patchkit.status(model)["patched"]


@pytest.mark.parametrize("first", ["wrapper", "model"])
def test_a_peft_model_as_target(first: str) -> None:
    """Its forward and its generate call the model inside; what is patched may be either, and is one step a call."""
    from peft import LoraConfig, get_peft_model

    entry = tiny.MODELS["llama"]
    model = entry.build()
    wrapped = None
    if first == "wrapper":
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    watch = Watch()
    with patchkit.apply(wrapped if wrapped is not None else model, watch):
        if wrapped is None:
            wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        for run in (
            lambda: wrapped(**one_row()),
            lambda: wrapped.generate(**one_row(), max_new_tokens=3, min_new_tokens=3, do_sample=False),
        ):
            watch.seen.clear()
            with torch.no_grad():
                run()
            steps = [s.step for s in watch.seen if s.layer == 0]
            assert len(steps) in (1, 3)
            assert steps == list(range(len(steps)))
            assert patchkit.status(wrapped)["drift"] == []


def test_bf16_and_a_visible_recipe() -> None:
    entry = tiny.MODELS["llama"]
    model = entry.build().to(torch.bfloat16)
    plain = tiny.forward(entry, model)
    with patchkit.apply(model, Identity()):
        assert torch.equal(tiny.forward(entry, model), plain)
    with patchkit.apply(model, Scale(layers="1")):
        scaled = tiny.forward(entry, model)
    assert not torch.equal(scaled, plain)
    assert scaled.dtype == plain.dtype
    assert torch.equal(tiny.forward(entry, model), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    """The same gradients through an identity patch; a block that runs again in the backward is told the same."""
    entry = tiny.MODELS["llama"]

    def gradients(patched: bool) -> tuple[list[torch.Tensor], Watch]:
        model = entry.build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        watch = Watch()
        patch = patchkit.apply(model, watch) if patched else None
        row = one_row()
        model(**row, labels=row["input_ids"], use_cache=False).loss.backward()
        if patch is not None:
            patch.remove()
        return [p.grad for p in model.parameters() if p.grad is not None], watch

    (plain, _), (ours, watch) = gradients(False), gradients(True)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    again = watch.seen[2:]
    assert len(again) == (2 if checkpointing else 0)
    assert again == watch.seen[1::-1][: len(again)]
