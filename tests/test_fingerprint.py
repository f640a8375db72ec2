"""The fingerprint sees each kind of disturbance, sees none where there is none, and forgives what a run changes."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_wan
from fingerprint import OURS, assert_same, diff, fingerprint
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Disturbance = Callable[[Any], AbstractContextManager[None]]

# Disturbance -> a piece of the line that has to report it
ON_PIPELINE: dict[Disturbance, str] = {}
ON_MODEL: dict[Disturbance, str] = {}


def disturbs(table: dict[Disturbance, str], reported: str) -> Callable[[Callable[[Any], Iterator[None]]], Disturbance]:
    def register(function: Callable[[Any], Iterator[None]]) -> Disturbance:
        disturbance = contextmanager(function)
        table[disturbance] = reported
        return disturbance

    return register


pipeline, model = functools.partial(disturbs, ON_PIPELINE), functools.partial(disturbs, ON_MODEL)


def unlike(*_: Any) -> None:
    """Stands in for any function or hook."""


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute; afterwards put back the old one, or none where the instance had none of its own."""
    old = vars(owner).get(name, replaced)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if old is replaced:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextmanager
def removed_after(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_disguise(owner: Any) -> Iterator[None]:
    """Give an object a subclass that goes by its class's own names."""
    cls = type(owner)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    owner.__class__ = type(cls.__name__, (cls,), names)
    try:
        yield
    finally:
        owner.__class__ = cls


def site(pipe: Any) -> Any:
    return pipe.transformer.blocks[1].attn1


@pipeline("blocks.1.attn1.processor")
def processor_changed(pipe: Any) -> Iterator[None]:
    with replaced(site(pipe), "processor", copy.copy(site(pipe).processor)):
        yield


@pipeline("blocks.1.attn1.processor class")
def processor_class_changed(pipe: Any) -> Iterator[None]:
    with in_disguise(site(pipe).processor):
        yield


@pipeline("blocks.1.attn1.processor._site")
def processor_attribute_added(pipe: Any) -> Iterator[None]:
    with replaced(site(pipe).processor, "_site", 3):
        yield


@pipeline("new: WanPipeline.transformer._note")
def attribute_added(pipe: Any) -> Iterator[None]:
    with replaced(pipe.transformer, "_note", 1):
        yield


@pipeline("gone: WanPipeline.transformer.rope.patch_size")
def attribute_removed(pipe: Any) -> Iterator[None]:
    value = vars(pipe.transformer.rope).pop("patch_size")
    yield
    pipe.transformer.rope.patch_size = value


@pipeline("transformer class")
def module_class_changed(pipe: Any) -> Iterator[None]:
    with in_disguise(pipe.transformer):
        yield


@pipeline("WanPipeline class")
def pipeline_class_changed(pipe: Any) -> Iterator[None]:
    with in_disguise(pipe):
        yield


@pipeline("transformer.forward")
def forward_replaced(pipe: Any) -> Iterator[None]:
    with replaced(pipe.transformer, "forward", pipe.transformer.forward):
        yield


@pipeline("transformer.cache_context")
def cache_context_wrapped(pipe: Any) -> Iterator[None]:
    with replaced(pipe.transformer, "cache_context", functools.partial(pipe.transformer.cache_context)):
        yield


@pipeline("transformer._forward_pre_hooks keys")
def pre_hook_added(pipe: Any) -> Iterator[None]:
    with removed_after(pipe.transformer.register_forward_pre_hook(unlike)):
        yield


@pipeline("blocks.0._forward_hooks_with_kwargs keys")
def hook_added(pipe: Any) -> Iterator[None]:
    with removed_after(pipe.transformer.blocks[0].register_forward_hook(unlike, with_kwargs=True)):
        yield


@pipeline("blocks.0._backward_hooks keys")
def backward_hook_added(pipe: Any) -> Iterator[None]:
    block = pipe.transformer.blocks[0]
    full = block._is_full_backward_hook
    with removed_after(block.register_full_backward_hook(unlike)):
        yield
    block._is_full_backward_hook = full  # torch itself leaves this one behind


@pipeline("vae._state_dict_hooks keys")
def state_dict_hook_added(pipe: Any) -> Iterator[None]:
    with removed_after(pipe.vae._register_state_dict_hook(unlike)):
        yield


@pipeline("blocks.0._diffusers_hook")
def diffusers_hook_added(pipe: Any) -> Iterator[None]:
    block = pipe.transformer.blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(DiffusersHook(), "probe")
    yield
    block._diffusers_hook.remove_hook("probe")
    del block._diffusers_hook, block.forward  # both stay behind otherwise


@pipeline("blocks.0._hf_hook")
def accelerate_hook_added(pipe: Any) -> Iterator[None]:
    block = pipe.transformer.blocks[0]
    add_hook_to_module(block, ModelHook())
    yield
    remove_hook_from_module(block)
    del block.forward  # accelerate puts the bound method there instead of removing it


@pipeline("scheduler.step")
def scheduler_step_wrapped(pipe: Any) -> Iterator[None]:
    with replaced(pipe.scheduler, "step", functools.partial(pipe.scheduler.step)):
        yield


@pipeline("changed: WanPipeline.scheduler:")
def scheduler_swapped(pipe: Any) -> Iterator[None]:
    old = pipe.scheduler
    # Not by setattr, with which the pipeline also renews its config.
    vars(pipe)["scheduler"] = type(old).from_config(old.config)
    yield
    vars(pipe)["scheduler"] = old


@pipeline("gone: WanPipeline.scheduler.timesteps")
def run_state_removed(pipe: Any) -> Iterator[None]:
    old = vars(pipe.scheduler).pop("timesteps")
    yield
    pipe.scheduler.timesteps = old


@pipeline("WanAttnProcessor.__call__")
def processor_class_patched(pipe: Any) -> Iterator[None]:
    with mock.patch.object(transformer_wan.WanAttnProcessor, "__call__", unlike):
        yield


@pipeline("WanPipeline.__call__")
def pipeline_class_patched(pipe: Any) -> Iterator[None]:
    with mock.patch.object(type(pipe), "__call__", unlike):
        yield


@pipeline("WanAttnProcessor.__call__")
def code_replaced_in_place(pipe: Any) -> Iterator[None]:
    function = transformer_wan.WanAttnProcessor.__call__
    code = function.__code__
    function.__code__ = code.replace(co_name="other")
    yield
    function.__code__ = code


@pipeline("transformer_wan.dispatch_attention_fn")
def dispatch_replaced(pipe: Any) -> Iterator[None]:
    with mock.patch.object(transformer_wan, "dispatch_attention_fn", unlike):
        yield


@pipeline("torch.nn.functional.scaled_dot_product_attention")
def torch_function_replaced(pipe: Any) -> Iterator[None]:
    with mock.patch.object(F, "scaled_dot_product_attention", unlike):
        yield


@pipeline("_active_backend")
def backend_chosen(pipe: Any) -> Iterator[None]:
    with attention_dispatch.attention_backend("_native_math"):
        yield


@pipeline("diffusers attention backends._backends")
def backend_registered(pipe: Any) -> Iterator[None]:
    registry = attention_dispatch._AttentionBackendRegistry
    with mock.patch.dict(registry._backends, {"mine": unlike}):
        yield


@pipeline("torch function modes")
def function_mode_entered(pipe: Any) -> Iterator[None]:
    with torch.overrides.BaseTorchFunctionMode():
        yield


@pipeline("_global_forward_hooks")
def global_hook_added(pipe: Any) -> Iterator[None]:
    with removed_after(torch.nn.modules.module.register_module_forward_hook(unlike)):
        yield


@pipeline("to_q._parameters['weight']")
def weight_swapped(pipe: Any) -> Iterator[None]:
    old = site(pipe).to_q.weight
    site(pipe).to_q.weight = torch.nn.Parameter(old.detach().clone())
    yield
    site(pipe).to_q.weight = old


@pipeline("to_q._parameters['weight']")
def weight_moved(pipe: Any) -> Iterator[None]:
    weight = site(pipe).to_q.weight
    old = weight.data
    weight.data = old.clone()
    yield
    weight.data = old


@pipeline("to_q._parameters['weight']")
def weight_frozen(pipe: Any) -> Iterator[None]:
    site(pipe).to_q.weight.requires_grad_(False)
    yield
    site(pipe).to_q.weight.requires_grad_(True)


@pipeline("state dict of transformer")
def module_added(pipe: Any) -> Iterator[None]:
    site(pipe).extra = torch.nn.Linear(1, 1)
    yield
    del site(pipe).extra


@model("layers.1.self_attn.config")
def config_copied(model: Any) -> Iterator[None]:
    with replaced(model.model.layers[1].self_attn, "config", copy.copy(model.config)):
        yield


@model("config._attn_implementation_internal")
def implementation_changed(model: Any) -> Iterator[None]:
    with replaced(model.config, "_attn_implementation_internal", "eager"):
        yield


@model("transformers ALL_ATTENTION_FUNCTIONS")
def attention_registered(model: Any) -> Iterator[None]:
    with mock.patch.dict(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, {"mine": unlike}):
        yield


@model("transformers ALL_ATTENTION_FUNCTIONS local['sdpa']")
def attention_overridden(model: Any) -> Iterator[None]:
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {"sdpa": unlike}):
        yield


@model("transformers ALL_MASK_ATTENTION_FUNCTIONS")
def mask_registered(model: Any) -> Iterator[None]:
    with mock.patch.dict(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, {"mine": unlike}):
        yield


@model("modeling_llama.LlamaAttention.forward")
def attention_class_patched(model: Any) -> Iterator[None]:
    with mock.patch.object(type(model.model.layers[0].self_attn), "forward", unlike):
        yield


@model("modeling_llama.apply_rotary_pos_emb")
def module_function_replaced(model: Any) -> Iterator[None]:
    with mock.patch(f"{type(model).__module__}.apply_rotary_pos_emb", unlike):
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    tiny.run(entry, pipe)
    return pipe


@pytest.fixture(scope="module")
def llama() -> Any:
    entry = tiny.MODELS["llama"]
    model = entry.build()
    tiny.forward(entry, model)
    return model


def check(target: Any, disturbance: Disturbance, reported: str) -> None:
    before = fingerprint(target)
    with disturbance(target):
        lines = diff(before, fingerprint(target))
    assert any(reported in line for line in lines), lines[:10]
    assert_same(before, fingerprint(target))


@pytest.mark.parametrize("disturbance", ON_PIPELINE, ids=lambda function: function.__name__)
def test_disturbance_of_a_pipeline_is_seen(pipe: Any, disturbance: Disturbance) -> None:
    check(pipe, disturbance, ON_PIPELINE[disturbance])


@pytest.mark.parametrize("disturbance", ON_MODEL, ids=lambda function: function.__name__)
def test_disturbance_of_a_model_is_seen(llama: Any, disturbance: Disturbance) -> None:
    check(llama, disturbance, ON_MODEL[disturbance])


def test_weight_changed_in_place_is_seen() -> None:
    """Adding and subtracting again gives back the value (here), never the version."""
    model = tiny.MODELS["llama"].build()
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2).div_(2)
    assert [line for line in diff(before, fingerprint(model)) if "lm_head" in line]


def test_the_one_registered_name_of_ours_is_forgiven(llama: Any) -> None:
    before = fingerprint(llama)
    with (
        mock.patch.dict(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, {OURS: unlike}),
        mock.patch.dict(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, {OURS: unlike}),
    ):
        assert_same(before, fingerprint(llama))


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_running_a_pipeline_changes_nothing(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    tiny.run(entry, pipe, variant="decode")
    before = fingerprint(pipe)
    assert_same(before, fingerprint(pipe))
    tiny.run(entry, pipe, variant="decode", steps=3)
    assert_same(before, fingerprint(pipe))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_running_a_model_changes_nothing(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()

    def use() -> None:
        tiny.forward(entry, model)
        if entry.causal:
            tiny.generate(entry, model, new_tokens=2)

    use()
    before = fingerprint(model)
    use()
    assert_same(before, fingerprint(model))


def test_failure_names_what_changed(pipe: Any) -> None:
    before = fingerprint(pipe)
    with replaced(pipe.transformer, "_note", 1), pytest.raises(AssertionError, match=r"new: .*transformer\._note = 1"):
        assert_same(before, fingerprint(pipe))


def test_fingerprint_is_fast(pipe: Any) -> None:
    started = time.process_time()
    for _ in range(3):
        fingerprint(pipe)
    assert time.process_time() - started < 3 * 0.5  # 0.1 s each where this was written
