"""Everything that patching a model could disturb, as a flat dict that two moments can be compared by.

The protocol of an undo test::

    run(pipe)                    # once, so that everything made on first use exists
    before = fingerprint(pipe)
    patch, run, remove, run      # the last run with the same arguments as the first
    assert_same(before, fingerprint(pipe))

Objects are compared by identity, numbers and strings by value, tensors by identity, memory, shape and version counter.
What is looked at:

- every object reachable from the target through attributes and containers: pipeline, components, all submodules with
  all hook dicts, processors, configs (with ``_attn_implementation_internal``), scheduler, diffusers' hook registries
  (``_diffusers_hook``), accelerate's ``_hf_hook`` and ``_old_forward``; of each its class, the keys of its ``__dict__``
  and every value;
- parameters, buffers and the state-dict keys of every component;
- each class involved, with its bases: every class attribute;
- the functions and classes found in the modules that define those classes, and in the libraries' attention modules;
- the libraries' registries, torch's global module hooks and its stack of function modes.

Two kinds of things are left out on purpose, each by an explicit list: what merely running changes (``RUN_STATE``; that
the attribute exists is still compared), and the one fixed name under which patchkit registers itself (``OURS``).

A fingerprint keeps what it saw alive, so that no identity can be reused: drop it before testing garbage collection.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Fingerprint = dict[str, Any]

OURS = "patchkit"

# Name of a class anywhere among the bases -> the attributes that a run replaces. Their presence is still compared.
_CONV_CACHE = "_conv_idx _feat_map _enc_conv_idx _enc_feat_map"
RUN_STATE: dict[str, str] = {
    "SchedulerMixin": """
        timesteps sigmas num_inference_steps _step_index _begin_index is_scale_input_called
        model_outputs timestep_list last_sample lower_order_nums this_order
        ets counter cur_model_output cur_sample prk_timesteps plms_timesteps _timesteps
    """,
    "DiffusionPipeline": """
        _guidance_scale _guidance_scale_2 _guidance_rescale _skip_layer_guidance_scale _clip_skip _denoising_end
        _interrupt _num_timesteps _current_timestep _progress_bar_config
        _cross_attention_kwargs _joint_attention_kwargs _attention_kwargs
    """,
    "AlignDevicesHook": "tied_pointers_to_remove",
    "AutoencoderKLWan": _CONV_CACHE,
    "AutoencoderKLQwenImage": _CONV_CACHE,
    "Qwen2VLModel": "rope_deltas",
    "Qwen2_5_VLModel": "rope_deltas",
    "Qwen3VLModel": "rope_deltas",
}

# Class attributes that Python itself fills in or renews when somebody asks for annotations, or copies an instance
LAZY_CLASS_ATTRIBUTES = frozenset({"__annotations__", "__abstractmethods__", "_abc_impl", "__slotnames__"})

# Always looked at if loaded, whether or not a class of theirs is involved
ATTENTION_MODULES = (
    "torch.nn.functional",
    "diffusers.models.attention",
    "diffusers.models.attention_dispatch",
    "diffusers.models.attention_processor",
    "diffusers.hooks.hooks",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.integrations.eager_paged",
    "transformers.integrations.flash_attention",
    "transformers.integrations.flex_attention",
    "transformers.integrations.sdpa_attention",
)
LIBRARIES = ("diffusers", "transformers", "accelerate", "peft", "torch")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
_LEAVES = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.GenericAlias,
    logging.Logger,
    weakref.ref,
    property,
    torch.Generator,
)


class Same:
    """Equal only to a wrapper of the very same object; of a function, holding the same code."""

    __slots__ = ("code", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.code = value.__code__ if type(value) is types.FunctionType else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value and self.code is other.code

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        name = getattr(self.value, "__qualname__", None)
        kind = type(self.value).__name__
        return f"{kind} {name} at {id(self.value):#x}" if isinstance(name, str) else f"{kind} at {id(self.value):#x}"


def fingerprint(target: Any, *, by_value: bool = False) -> Fingerprint:
    """Take the fingerprint of a pipeline or a model (and of the libraries it comes from).

    ``by_value`` compares tensors by their bits, for models whose weights others replace at every call (sequential
    offload, layerwise casting): which tensor holds them, and where, tells nothing there.
    """
    collecting = gc.isenabled()
    gc.disable()  # tens of thousands of small objects would set off a full collection
    try:
        return _Walk(target, by_value).seen
    finally:
        if collecting:
            gc.enable()


def diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each difference; empty if there is none."""
    lines = [f"gone: {path} (was {value!r})" for path, value in before.items() if path not in after]
    lines += [f"new: {path} = {value!r}" for path, value in after.items() if path not in before]
    lines += [
        f"changed: {path}: {value!r} -> {after[path]!r}"
        for path, value in before.items()
        if path in after and value != after[path]
    ]
    return lines


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Fail with the differences, the first thirty of them."""
    lines = diff(before, after)
    more = [f"... and {len(lines) - 30} more"] if len(lines) > 30 else []
    if lines:
        raise AssertionError("\n".join([f"{len(lines)} differences:", *lines[:30], *more]))


class _Walk:
    def __init__(self, target: Any, by_value: bool) -> None:
        self.seen: Fingerprint = {}
        self.by_value = by_value
        self.visited: dict[int, Any] = {}
        self.classes: dict[type, None] = {}
        self.run_state: dict[type, frozenset[str]] = {}
        self.visit(type(target).__name__, target)
        self.state_dicts(target)
        self.class_attributes()
        self.module_globals()
        self.registries()

    # --- objects

    def visit(self, path: str, value: Any) -> None:
        """Note ``value`` at ``path``, and go into it unless it was met before."""
        if isinstance(value, _PLAIN):
            self.seen[path] = value
        elif isinstance(value, torch.Tensor):
            self.tensor(path, value)
        elif type(value) is tuple:
            self.sequence(path, value)
        else:
            self.seen[path] = Same(value)
            if id(value) in self.visited or isinstance(value, _LEAVES):
                return
            self.visited[id(value)] = value
            self.go_into(path, value)

    def go_into(self, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            self.seen[f"{path} keys"] = [key if isinstance(key, _PLAIN) else Same(key) for key in value]
            for index, key in enumerate(list(value)):
                label = repr(key) if isinstance(key, _PLAIN) else f"{type(key).__name__} {index}"
                with contextlib.suppress(KeyError):  # accelerate's views of weights list keys that they do not know
                    self.visit(f"{path}[{label}]", value[key])
        elif isinstance(value, list):
            self.sequence(path, value)
        elif isinstance(value, (set, frozenset)):
            self.seen[f"{path} members"] = {item if isinstance(item, _PLAIN) else Same(item) for item in value}
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.kind(path, type(value))
            self.attributes(path, value, attributes)

    def sequence(self, path: str, items: Any) -> None:
        self.seen[f"{path} length"] = len(items)
        for index, item in enumerate(items):
            self.visit(f"{path}[{index}]", item)

    def kind(self, path: str, cls: type) -> None:
        self.classes[cls] = None
        self.seen[f"{path} class"] = (Same(cls), cls.__name__, cls.__qualname__, cls.__module__)

    def attributes(self, path: str, owner: Any, attributes: dict[str, Any]) -> None:
        changing = self.changing(type(owner))
        for name in sorted(attributes):  # their order means nothing, unlike that of children and hooks
            value = attributes[name]
            if name in changing:
                self.seen[f"{path}.{name}"] = "(run state)"
            elif name == "_modules" and isinstance(owner, torch.nn.Module):
                self.seen[f"{path} children"] = list(value)
                for child, module in value.items():
                    self.visit(f"{path}.{child}", module)
            else:
                self.visit(f"{path}.{name}", value)

    def changing(self, cls: type) -> frozenset[str]:
        if cls not in self.run_state:
            names = [RUN_STATE[base.__name__].split() for base in cls.__mro__ if base.__name__ in RUN_STATE]
            self.run_state[cls] = frozenset().union(*names)
        return self.run_state[cls]

    def tensor(self, path: str, value: torch.Tensor) -> None:
        if self.by_value:
            bits = None if value.is_meta else value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self.seen[path] = (tuple(value.shape), value.dtype, value.device, value.requires_grad, bits)
            return
        memory = None if value.is_meta else value.data_ptr()
        version = None if value.is_inference() else value._version
        layout = (tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
        self.seen[path] = (Same(value), memory, version, layout, Same(value.grad) if value.is_leaf else None)

    # --- what lies around them

    def state_dicts(self, target: Any) -> None:
        components = getattr(target, "components", None)
        named = components if isinstance(components, dict) else {"model": target}
        for name, component in named.items():
            if isinstance(component, torch.nn.Module):
                self.seen[f"state dict of {name}"] = list(component.state_dict())

    def class_attributes(self) -> None:
        """Of every class met and of its bases. Keys carry a number where two classes share a name."""
        bases = {base: None for cls in self.classes for base in cls.__mro__ if base is not object}
        self.classes = bases
        taken: dict[str, int] = {}
        for cls in bases:
            name = f"{cls.__module__}.{cls.__qualname__}"
            taken[name] = taken.get(name, 0) + 1
            path = f"class {name}" if taken[name] == 1 else f"class {name} ({taken[name]})"
            self.seen[path] = Same(cls)
            self.seen[f"{path} bases"] = [Same(base) for base in cls.__bases__]
            for attribute, value in list(vars(cls).items()):
                if attribute not in LAZY_CLASS_ATTRIBUTES:
                    self.seen[f"{path}.{attribute}"] = Same(value)

    def module_globals(self) -> None:
        names = {cls.__module__ for cls in self.classes if cls.__module__.split(".")[0] in LIBRARIES}
        for name in sorted(names.union(ATTENTION_MODULES).intersection(sys.modules)):
            for attribute, value in list(vars(sys.modules[name]).items()):
                if isinstance(value, _LEAVES) and not isinstance(value, types.ModuleType):
                    self.seen[f"global {name}.{attribute}"] = Same(value)
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.") and "dispatch_attention_fn" in vars(module):
                self.seen[f"global {name}.dispatch_attention_fn"] = Same(vars(module)["dispatch_attention_fn"])

    def registries(self) -> None:
        for path, value in _registries():
            if isinstance(value, Mapping):
                self.seen[f"{path} keys"] = list(value)
                self.seen.update({f"{path}[{key!r}]": Same(item) for key, item in value.items()})
            else:
                self.visit(path, value)


def _registries() -> Iterator[tuple[str, Any]]:
    """(path, content) of every place shared by all models of the process. Imports nothing that is not loaded."""
    hooks = sys.modules["torch.nn.modules.module"]
    for name, value in list(vars(hooks).items()):
        if name.startswith("_global_") and isinstance(value, dict):
            yield f"torch {name}", value
    yield "torch function modes", tuple(torch.overrides._get_current_function_mode_stack())
    yield "torch settings", (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        registry = dispatch._AttentionBackendRegistry
        for name, value in list(vars(registry).items()):
            if not name.startswith("__") and not isinstance(value, (classmethod, staticmethod)):
                yield f"diffusers attention backends.{name}", value
        yield "diffusers attention backend names", dict(dispatch.AttentionBackendName.__members__)
    for module, attribute in (
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ):
        if module in sys.modules:
            interface = getattr(sys.modules[module], attribute)
            for scope, entries in (("local", interface._local_mapping), ("global", type(interface)._global_mapping)):
                yield f"transformers {attribute} {scope}", {k: v for k, v in entries.items() if k != OURS}
