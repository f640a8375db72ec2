"""Transformers models.

Their attention modules look the op up by name in their config, so a module is led to its chain by a copy of its
config that names ours. The registry has no way to unregister, hence one fixed entry for good, which finds everything
through the module; and a mask function of the same name, because without one padding would be ignored silently.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from patchkit.adapters.base import Adapter
from patchkit.adapters.tokens import Tokens
from patchkit.context import AttentionCall, Grid
from patchkit.errors import PatchkitError, UnsupportedModel
from patchkit.journal import Journal
from patchkit.op import attend
from patchkit.sites import Site, number_layers
from patchkit.tracker import Frame

NAME = "patchkit"
# arguments of attention functions that change the numbers and that the compiled op has no place for
_NOT_COMPILED = ("position_bias", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_VISION = ("vision", "visual", "image_encoder", "vit.")


class TransformersAdapter(Adapter):
    """A ``PreTrainedModel``, or a transformers pipeline that holds one."""

    family = "transformers"

    def __init__(self, target: Any) -> None:
        if not isinstance(target, torch.nn.Module) and isinstance(getattr(target, "model", None), torch.nn.Module):
            target = target.model  # a transformers pipeline: its model is what runs
        if not isinstance(target, torch.nn.Module):
            raise UnsupportedModel(f"a {type(target).__name__} is no model", remedy="give the loaded model")
        super().__init__(target)

    def components(self) -> dict[str, torch.nn.Module]:
        return {"model": self.outer}

    def sites(self) -> list[Site]:
        sites = []
        names = [n for n, m in self.target.named_modules() if _is_attention(m)]
        towers = any(n.startswith(v) or f".{v}" in n for n in names for v in _VISION)
        for name in names:
            module = self.target.get_submodule(name)
            component = "model"
            if towers:
                component = "vision" if any(name.startswith(v) or f".{v}" in name for v in _VISION) else "text"
            kind = "cross" if _is_cross(module) else "self"
            site = Site(component, name, module, kind, 0, _heads(module))  # type: ignore[arg-type]
            site.learned_sinks = isinstance(getattr(module, "sinks", None), torch.nn.Parameter)
            sites.append(site)
        if {s.component for s in sites} == {"vision"}:
            for site in sites:
                site.component = "model"
        number_layers(sites, _block)
        return sites

    def block_name(self, name: str) -> str:
        return _block(name)

    def root(self, component: str) -> torch.nn.Module:
        target: torch.nn.Module = self.target
        return target

    def install(self, site: Site, journal: Journal, owner: object, slot: Any) -> None:
        _register()
        # somebody may have kept a config of ours beyond its patch
        config: Any = vars(site.module.config).get("_patchkit_original", site.module.config)
        site.terminal = terminal(site, config)
        journal.do(owner, lambda: None, lambda: _past(site.module), "an adapter that left")
        journal.set(owner, site.module, "config", _led(config, site, slot))

    def is_taken(self, site: Site) -> bool:
        slot = vars(site.module.config).get("_patchkit_slot")
        return slot is not None and not slot.closed

    def close(self) -> None:
        """The registry entry stays: it does nothing for modules whose config does not name it."""

    def place(self, call: AttentionCall, frame: Frame, memory: dict[str, Any]) -> None:
        site = call.site
        call.index = frame.ops[site.number]  # vision towers call the op once an image, or once a window
        frame.ops[site.number] += 1
        if site.component != "vision" and frame.component:
            tokens = memory.setdefault("tokens", Tokens())
            if not frame.told:  # the first attention of this call of the model
                frame.told = True
                tokens.take(self.target, frame.inputs, frame.past or 0)
            call.visual, call.real, call.first, call.dropped = tokens.as_keys(call.k.shape[2], call.k.device)
        if site.component != "text":
            call.grid = _patches(site.module.config, call.q.shape[2])


def _past(module: torch.nn.Module) -> None:
    """The config behind that of an adapter of ours which left while a patch stood on it."""
    config: Any = vars(module)["config"]
    if vars(config).get("_patchkit_left"):
        module.config = vars(config)["_patchkit_tuned"]


def _led(config: Any, site: Site, slot: Any) -> Any:
    """A copy of an attention module's config that leads to the site; written out or copied, it is the original."""

    def refuse(protocol: Any) -> Any:
        raise PatchkitError("a patched module cannot be pickled", site.full_name, "call patch.remove() first")

    ours = copy.copy(config)
    vars(ours).update(  # past the config's own __setattr__, which maps and validates names
        _attn_implementation_internal=NAME,
        _patchkit_number=site.tensor,
        _patchkit_site=site,
        _patchkit_slot=slot,
        _patchkit_original=config,
        to_dict=config.to_dict,
        __deepcopy__=lambda memo: copy.deepcopy(config, memo),
        __reduce_ex__=refuse,
    )
    return ours


def _patches(config: Any, tokens: int) -> Grid | None:
    """The patches of a vision tower with one picture size (a class token may stand before them)."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    side = size // patch
    return Grid(1, side, side) if side * side in (tokens, tokens - 1) else None


def _is_attention(module: torch.nn.Module) -> bool:
    """An attention module that looks its op up in the registry, seen in its code."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return (
        code is not None
        and "ALL_ATTENTION_FUNCTIONS" in code.co_names
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
    )


def _is_cross(module: torch.nn.Module) -> bool:
    return "CrossAttention" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def _heads(module: torch.nn.Module) -> int:
    for holder in (module, module.config):
        for name in ("num_heads", "num_attention_heads", "n_head"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0


def _block(name: str) -> str:
    """The name up to and with its last number: ``model.layers.3.self_attn`` -> ``model.layers.3``."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].isdigit():
            return ".".join(parts[: i + 1])
    return name


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function. q (B, H, N, D), k and v (B, Hkv, N, D) -> (B, N, H, D) and weights or None."""
    config: Any = module.config
    causal = one_way(module, query, attention_mask, is_causal)
    whole = key, value
    if causal:
        key, value = filled(query, key, value, config._patchkit_original)
    if torch.compiler.is_compiling():
        lost = [name for name in _NOT_COMPILED if kwargs.get(name) is not None]
        if lost:
            what = f"{', '.join(lost)} cannot go through a compiled patch"
            raise UnsupportedModel(what, config._patchkit_site.full_name, "run uncompiled")
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        out = attend(
            query,
            key,
            value,
            attention_mask,
            config._patchkit_number,
            0,
            scaling,
            causal,
            False,
            dropout,
            window,
            softcap,
        )
        return out, None
    extra = extra_of(dropout, is_causal, causal, kwargs, (key, value), whole)
    site: Site = config._patchkit_site
    out = site.run(query, key, value, attention_mask, scaling, causal, 0, extra)
    return out.transpose(1, 2), extra.get("weights")


def one_way(module: torch.nn.Module, query: Tensor, mask: Tensor | None, is_causal: bool | None) -> bool:
    """Whether causality has to be added to what the mask says."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and mask is None and query.shape[2] > 1


def filled(query: Tensor, key: Tensor, value: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Keys and values without the empty slots behind them, in the prefill of a static cache.

    torch's op counts causality from the first key on there, so those slots are not seen.
    """
    if key.shape[2] > query.shape[2] and config._attn_implementation == "sdpa":
        return key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return key, value


def extra_of(
    dropout: float,
    is_causal: bool | None,
    causal: bool,
    kwargs: dict[str, Any],
    told: tuple[Tensor, Tensor],
    whole: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """What the end of a chain needs besides the call to run the model's own op."""
    extra: dict[str, Any] = {"dropout": dropout, "is_causal": is_causal, "causal": causal, "kwargs": kwargs}
    if told[0] is not whole[0]:
        extra["told"], extra["whole"] = told, whole
    return extra


def terminal(site: Site, config: Any) -> Callable[[AttentionCall], Tensor]:
    """The op that the module's own config names; asked at each call, because users set another one meanwhile."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home: Any = sys.modules[type(site.module).__module__]
    eager: Any = getattr(home, "eager_attention_forward", None)

    def model_op(call: AttentionCall) -> Tensor:
        extra = call.extra
        kwargs = dict(extra.get("kwargs", ()))
        if extra.get("compiled"):
            kwargs.update({name: extra[name] for name in ("sliding_window", "softcap") if name in extra})
        unchanged = call.causal == extra.get("causal")
        k, v = call.k, call.v
        if "told" in extra and k is extra["told"][0] and v is extra["told"][1]:
            k, v = extra["whole"]  # to the bit what the model would have run
        upstream = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
        out, extra["weights"] = upstream(
            site.module,
            call.q,
            k,
            v,
            call.mask,
            dropout=extra.get("dropout", 0.0),
            scaling=call.scale,
            is_causal=extra.get("is_causal") if unchanged else call.causal,
            **kwargs,
        )
        return out.transpose(1, 2)

    return model_op
