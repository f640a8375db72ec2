"""MoH as an adapter of peft: the router is its only new part, and may have no parameters at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from patchkit.context import Attend, AttentionCall
from patchkit.errors import InvalidOption, nearest
from patchkit.finetune.config import TunerConfig
from patchkit.finetune.layer import AttentionLayer, device_of
from patchkit.finetune.passage import Passage
from patchkit.finetune.tuner import AttentionTuner
from patchkit.listening import What
from patchkit.recipes.moh import compute, options
from patchkit.recipes.moh.balance import BETA, Collector, add_to, imbalance, shifts_labels, warn_if_missed
from patchkit.recipes.moh.budget import Budget
from patchkit.recipes.moh.gates import Gate, Gates, Weights, by_length, by_weights
from patchkit.sites import Site

SPREAD = 0.02  # of the weights that choose; those that only weigh begin at 0, where every gate is 1


@dataclass
class MoHConfig(TunerConfig):
    """Tune a model with mixture-of-head attention: ``peft.get_peft_model(model, MoHConfig(...))``.

    While the model trains, the load-balance loss is added to the loss that it returns; it is part of the means over
    accumulated batches and processes as the model's own loss is. In eval mode it is left out.

    Paper: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842. With ``router="qnorm"`` and binary
    gates it is what the paper does to an LLM that has been trained (its section 4.4); with ``"linear"`` and weighted
    gates, what it trains from scratch, scaled as in its code.

    Args:
        shared, active, shared_per_layer, active_per_layer, min_tokens: see :class:`patchkit.recipes.moh.MoH`.
        router: ``"qnorm"`` has no parameters: train ``lora`` (or the model's own weights) with it. ``"linear"`` has.
        gate: ``"binary"`` (straight through) or ``"weighted"``; None: binary with qnorm, weighted with linear.
        balance: weight of the load-balance loss, 0.01 in the paper; 0 = none.
        lora: LoRA layers as part of the adapter, for instance ``{"r": 16, "target_modules": ["q_proj", "v_proj"]}``.
    """

    shared: float | int = field(default=0.5)
    active: float | int = field(default=0.75)
    router: Literal["qnorm", "linear"] = field(default="qnorm")
    gate: Gate | None = field(default=None)
    shared_per_layer: list[float | int] | None = field(default=None)
    active_per_layer: list[float | int] | None = field(default=None)
    balance: float = field(default=BETA)
    min_tokens: int | None = field(default=None)

    type_name: ClassVar[str] = "PATCHKIT_MOH"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_values(self)
        if self.gate is None:
            self.gate = "binary" if self.router == "qnorm" else "weighted"
        options.check_budgets(self, "MoHConfig, option ")


def _check_values(config: MoHConfig) -> None:
    """Types and ranges, which a recipe's base checks but peft does not."""
    where = "MoHConfig, option "
    for name, known in (("router", ("qnorm", "linear")), ("gate", ("binary", "weighted", None))):
        value = getattr(config, name)
        if value not in known:
            raise InvalidOption(
                f"{value!r} is no {name}", f"{where}{name!r}", nearest(str(value), [k for k in known if k])
            )
    for name in ("shared", "active", "shared_per_layer", "active_per_layer"):
        given = getattr(config, name)
        if "per" in name and not isinstance(given, list | tuple | None):
            raise InvalidOption(f"{given!r} is no list", f"{where}{name!r}", "give one entry for each block")
        for value in given or () if "per" in name else [given]:
            if not _is_number(value) or value < 0 or (isinstance(value, float) and value > 1):
                raise InvalidOption(
                    f"{value!r} is no amount of heads", f"{where}{name!r}", "give a share (0.0 to 1.0) or a number"
                )
    for name, whole in (("balance", False), ("min_tokens", True)):
        value = getattr(config, name)
        if value is None and whole:
            continue
        if not _is_number(value) or (whole and not isinstance(value, int)):
            raise InvalidOption(f"{value!r} is no {'whole ' if whole else ''}number", f"{where}{name!r}", "give one")
        if value < 0:
            raise InvalidOption(f"{value} is negative", f"{where}{name!r}", "give 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Setting:
    """What one adapter does at one attention module."""

    budget: Budget
    router: str
    gate: Gate
    min_tokens: int | None
    balance: float


class HeadRouter(AttentionLayer):
    """The router of one attention module; a child of it named ``head_router``."""

    name: ClassVar[str] = "head_router"
    adapter_layer_names: tuple[str, ...] = ("moh_shared", "moh_routed", "moh_stages")

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.moh_shared = torch.nn.ParameterDict()
        self.moh_routed = torch.nn.ParameterDict()
        self.moh_stages = torch.nn.ParameterDict()

    def add(self, adapter_name: str, config: Any) -> None:
        """The weights that this layer's budget needs, in fp32."""
        budget = options.budget_of(config, self.site)
        self.settings[adapter_name] = Setting(budget, config.router, config.gate, config.min_tokens, config.balance)
        if config.router != "linear":
            return
        width = _width(self.site.module)
        device = device_of(self.site.module)
        for name, rows in Weights.needed(budget, config.gate).items():
            weight = torch.zeros(rows, width, device=device, dtype=torch.float32)
            if name == "routed" and weight.device.type != "meta":
                torch.nn.init.normal_(weight, std=SPREAD)
            getattr(self, f"moh_{name}")[adapter_name] = torch.nn.Parameter(weight)

    def listens(self) -> frozenset[What]:
        return frozenset().union(*(options.needs(self.site, setting.router) for setting in self.settings.values()))

    def attend(self, call: AttentionCall, next: Attend, adapter: str) -> Tensor:
        """Route, gather the imbalance in training, and compute."""
        setting: Setting = self.settings[adapter]
        train = torch.is_grad_enabled()
        gates = self._gates(call, adapter, train)
        if gates is None:
            call.ledger.ran_dense("what the router needs could not be seen")
            return next(call)
        if not torch.compiler.is_compiling():
            options.note(call, gates)
        if isinstance(self.passage, Balancing) and setting.budget.chosen:
            collector = self.passage.collector
            if train and gates.scores is not None:
                counted = collector.tokens(call.q.shape[0], call.q.shape[2])
                loss = imbalance(gates.scores, gates.active[:, setting.budget.shared :], counted)
                collector.add(loss, setting.balance)
            else:
                collector.miss()
        return compute.attend(call, next, gates, setting.budget, setting.min_tokens)

    def _gates(self, call: AttentionCall, adapter: str, train: bool) -> Gates | None:
        """None where the router has not seen what it needs: the module's forward was not called as a module's is."""
        setting: Setting = self.settings[adapter]
        if setting.router == "linear":
            if call.hidden is None:
                return None
            parts = {name: getattr(self, f"moh_{name}") for name in ("shared", "routed", "stages")}
            weights = Weights(**{name: part[adapter] for name, part in parts.items() if adapter in part})
            return by_weights(call.hidden, weights, setting.budget, setting.gate, train)
        if call.queries is None and "queries" in options.needs(self.site, setting.router):
            return None
        queries = call.queries if call.queries is not None else call.q
        return by_length(queries, setting.budget, setting.gate, train)


class Balancing(Passage):
    """Adds the load-balance loss to what the model returns while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.collector = Collector()

    def began(self, model: torch.nn.Module, arguments: dict[str, Any]) -> None:
        self.collector.begin(arguments)

    def ended(self, model: torch.nn.Module, arguments: dict[str, Any], output: Any) -> Any:
        loss = self.collector.end()
        learns = model.training and torch.is_grad_enabled()
        if learns:
            warn_if_missed(self.collector)
        weight = self.collector.weight if learns else 0.0
        return add_to(output, loss, weight, arguments, shifts_labels(model))


class MoHModel(AttentionTuner):
    """The tuner behind :class:`MoHConfig`."""

    prefix: str = "moh_"
    layer_class: ClassVar[type[AttentionLayer]] = HeadRouter

    def why_not(self, site: Site, config: Any) -> str | None:
        if site.kind != "self":
            return f"{site.kind} attention"
        return options.why_not(site, config.router)

    def check(self, sites: list[Site], config: Any) -> None:
        for site in sites:
            options.budget_of(config, site)

    def passage(self) -> Passage:
        return Balancing()


def _width(module: torch.nn.Module) -> int:
    """C, the width of an attention module's input."""
    for name in ("q_proj", "to_q", "query", "c_attn", "qkv_proj", "qkv", "query_key_value", "q_lin"):
        found: Any = module._modules.get(name)
        found = getattr(found, "base_layer", found)  # of LoRA
        width = getattr(found, "in_features", None) or getattr(found, "nx", None)  # nx: GPT-2's transposed layers
        if isinstance(width, int):
            return width
    for name in ("hidden_size", "embed_dim", "d_model", "query_dim"):
        for holder in (module, getattr(module, "config", None)):
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    raise InvalidOption("the width of its input is unknown", type(module).__name__, "use router='qnorm'")
