"""The part of an adapter that stands at one attention module: a child of it that wraps nothing.

Names of the module's own parts do not change, so LoRA, checkpoints and parallel plans go on as before. In transformers
the module is led here by a copy of its config that names our attention function; in diffusers its processor is rebound.
Nothing of it hangs on this process: a model that is copied or pickled takes its adapters along.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from patchkit import instance, rebind
from patchkit.adapters import transformers as texts
from patchkit.context import Attend, AttentionCall, Moment
from patchkit.errors import Conflict
from patchkit.finetune import registration
from patchkit.finetune.passage import Passage
from patchkit.ledger import UNWRITTEN, Ledger
from patchkit.listening import Ear, What
from patchkit.sites import Site

NAME = "patchkit-tuned"


class AttentionLayer(torch.nn.Module, BaseTunerLayer):
    """Base of what a tuned recipe puts into an attention module. Override :meth:`add`, :meth:`attend`, :meth:`listens`.

    Parameters stand in ``nn.ParameterDict`` or ``nn.ModuleDict``, keyed by the adapter's name, in attributes that begin
    with the tuner's prefix and are listed in ``adapter_layer_names``; what is no parameter, in the dict ``settings``.
    """

    other_param_names: tuple[str, ...] = ("settings",)
    name: ClassVar[str]  # of the child; must not contain the prefix of its parameters

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}  # adapter's name -> what it needs to know
        self.ledger = Ledger()
        self.passage: Passage | None = None  # what stands around the model's forward, set once the layer is in place
        self.site = site
        self.ear: Ear | None = None
        self._rebinding: Any = None
        self._slot: rebind.Slot | None = None

    # --- for the author of a recipe to override ---------------------------------------------------------------

    def add(self, adapter_name: str, config: Any) -> None:
        """Make the parameters and settings of one more adapter, on the device of the module."""
        raise NotImplementedError

    def listens(self) -> frozenset[What]:
        """What :meth:`attend` needs of the module; see :meth:`patchkit.Recipe.listens`."""
        return frozenset()

    def attend(self, call: AttentionCall, next: Attend, adapter: str) -> Tensor:
        """Stand around the attention op, as :meth:`patchkit.Recipe.attend` does."""
        raise NotImplementedError

    # --- at work ----------------------------------------------------------------------------------------------

    def run(self, call: AttentionCall, next: Attend) -> Tensor:
        """The op, through the active adapter if there is one."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.settings]
        if not names:
            return next(call)
        if self.ear is not None:
            self.ear.tell(call)
        if torch.compiler.is_compiling():
            call.ledger = UNWRITTEN
        else:
            call.ledger = self.ledger
            call.ledger.calls += 1
        return self.attend(call, next, names[-1])

    # --- coming and going -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Lead the module's op here, and listen to what it needs; may be called again for more of that."""
        what = self.listens()
        if what and (self.ear is None or not what <= self.ear.what):
            known = self.ear.what if self.ear is not None else frozenset()
            if self.ear is not None:
                self.ear.close()
            self.ear = Ear(self.site.module, known | what, opaque=False)
            self.ear.open()
        module = self.site.module
        if hasattr(module, "processor"):
            if self._slot is None:
                self._rebind(module)
                self._rebinding = module.register_forward_pre_hook(self._stay)
        elif "_patchkit_tuned" not in vars(module.config):
            if "_patchkit_original" in vars(module.config):
                raise Conflict("the model is patched already", self.site.full_name, "apply the patch after the adapter")
            _register()
            module.config = _led(module.config)

    def close(self) -> None:
        """Take all of it back."""
        if self.ear is not None:
            self.ear.close()
        module = self.site.module
        if self._slot is not None:
            self._rebinding.remove()
            self._slot.closed = True
            if instance.mark_of(module.processor) is self._slot:
                module.processor = self._original
        elif hasattr(module, "config") and "_patchkit_original" in vars(module.config):
            ours = vars(module.config)["_patchkit_original"]  # a patch on top goes on, and takes this off with itself
            vars(ours).update(_patchkit_left=True)
        elif hasattr(module, "config"):
            module.config = vars(module.config).get("_patchkit_tuned", module.config)

    # --- diffusers --------------------------------------------------------------------------------------------

    def _rebind(self, module: Any) -> None:
        """Also where somebody has set another processor since, or where a model was copied: copies are the original."""
        site = self.site
        fresh = Site(site.component, site.name, module, site.kind, site.layer, site.heads, layers=site.layers)
        object.__setattr__(self, "_original", module.processor)
        self._slot = rebind.Slot(opaque=False)
        fresh.terminal = rebind.terminal(fresh, module.processor)
        fresh.chain = self._chain
        fresh.tracker = _Nowhere()  # type: ignore[assignment]
        self.site = fresh
        module.processor = rebind.rebound(module.processor, fresh, self._slot)

    def _stay(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if instance.mark_of(module.processor) is not self._slot:
            self._rebind(module)

    def _chain(self, call: AttentionCall) -> Tensor:
        assert self.site.terminal is not None
        return self.run(call, self.site.terminal)

    # --- peft -------------------------------------------------------------------------------------------------

    def get_base_layer(self) -> torch.nn.Module:
        return self  # it wraps nothing

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        raise AttributeError("it has no weight")  # peft's would ask itself for ever

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        raise AttributeError("it has no bias")


class _Nowhere:
    """Stands in for the tracker of an installation."""

    def fill(self, call: AttentionCall) -> None:
        """Nothing is known of step and branch."""


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's parameters are."""
    found = next(module.parameters(), None)
    return found.device if found is not None else torch.device("cpu")


# --- transformers ---------------------------------------------------------------------------------------------------


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _led(config: Any) -> Any:
    """A copy of an attention module's config that names our function; written out, it is the original."""
    ours = copy.copy(config)
    vars(ours).update(_attn_implementation_internal=NAME, _patchkit_tuned=config, to_dict=config.to_dict)
    return ours


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
    config: Any = vars(module.config)["_patchkit_tuned"]
    layers = [child for child in module.children() if isinstance(child, AttentionLayer)]
    causal = texts.one_way(module, query, attention_mask, is_causal)
    whole = key, value
    if causal:
        key, value = texts.filled(query, key, value, config)
    extra = texts.extra_of(dropout, is_causal, causal, kwargs, (key, value), whole)
    site = layers[0].site if layers else _bare(module)
    op: Attend = texts.terminal(site, config)
    for layer in reversed(layers):
        op = _around(layer, op)
    # with a moment, because a graph cannot be traced through a dataclass that makes an object of its own for a default
    call = AttentionCall(query, key, value, attention_mask, scaling, causal, site, moment=Moment(), extra=extra)
    out = op(call)
    return out.transpose(1, 2), extra.get("weights")


def _around(layer: AttentionLayer, op: Attend) -> Attend:
    return lambda call: layer.run(dataclasses.replace(call), op)


def _bare(module: torch.nn.Module) -> Site:
    return Site("model", type(module).__name__, module, "self", 0, 0)


registration.try_to_register()  # again, as in config.py
