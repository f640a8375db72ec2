"""peft's side of a tuned recipe: puts its layers into a model, and takes them out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

from patchkit.adapters import adapter_for
from patchkit.errors import Conflict, InvalidOption, NothingMatched, UnsupportedModel
from patchkit.finetune import registration
from patchkit.finetune.config import TunerConfig
from patchkit.finetune.layer import AttentionLayer
from patchkit.finetune.passage import Passage
from patchkit.sites import Site


class AttentionTuner(BaseTuner):
    """Base of the tuners. Override :meth:`why_not`, :meth:`check`, and :meth:`passage` where a model's forward matters.

    ``layer_class`` is what is put into each attention module; ``prefix`` is as in ``tuners.json``.
    """

    layer_class: ClassVar[type[AttentionLayer]]
    tuner_layer_cls: Any = AttentionLayer
    target_module_mapping: dict[str, list[str]] = {}  # found by looking at the model

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registration.enter(cls)

    def __init__(self, model: torch.nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See peft. Adapters of other tuners on the model keep their configurations, whatever their names."""
        held = vars(model).pop("peft_config", None)  # theirs; peft would write ours into it
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            vars(model).pop("peft_config", None)
            if held is not None:
                vars(model)["peft_config"] = held
            raise
        # a dict of its own, because later tuners write into it; of one name, theirs stays as they will look for it
        theirs = {n: c for n, c in (held or {}).items() if n not in self.peft_config or not isinstance(c, TunerConfig)}
        vars(model)["peft_config"] = {**self.peft_config, **theirs}

    # --- for the author of a recipe to override ---------------------------------------------------------------

    def why_not(self, site: Site, config: Any) -> str | None:
        """Why a site cannot have the adapter, or None if it can."""
        return None

    def check(self, sites: list[Site], config: Any) -> None:
        """Refuse options that do not fit the model, before anything is changed. ``sites``: those it may go to."""

    def passage(self) -> Passage | None:
        """What stands around the model's forward, one for all adapters."""
        return None

    # --- coming -----------------------------------------------------------------------------------------------

    def inject_adapter(self, model: torch.nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put one more adapter into the model, with its LoRA layers."""
        config: Any = self.peft_config[adapter_name]
        self._sites = {id(site.module): site for site in adapter_for(self.model).sites()}
        trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            self._aim(config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._open_passage()
            lora = config.lora_config()
            if lora is not None:
                self._add_lora(lora, adapter_name)
        except BaseException:
            self._take_back(adapter_name, trains)
            raise
        finally:
            del self._sites

    def _aim(self, config: Any) -> None:
        """Check the request against the model, and name the modules where the user has not."""
        chosen, reasons = [], {}
        for site in self._sites.values():
            reason = site.unsupported or self.why_not(site, config)
            if reason is None:
                chosen.append(site)
            reasons[site.full_name] = reason
        where = f"{type(config).__name__} on {type(self.model).__name__}"
        if not chosen:
            why = "; ".join(sorted({str(reason) for reason in reasons.values()})) or "the model has none"
            raise NothingMatched(f"no attention module can have this adapter ({why})", where, "use another model")
        self.check(chosen, config)
        if config.target_modules is None:
            config.target_modules = _endings(chosen, [name for name, _ in self.model.named_modules()])

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        site = self._sites.get(id(target))
        why = "it is no attention module that looks its op up" if site is None else site.unsupported
        reason = why or self.why_not(site, peft_config)  # type: ignore[arg-type]
        if site is None or reason is not None:
            raise UnsupportedModel(
                f"{current_key} cannot have this adapter: {reason}",
                f"{type(peft_config).__name__}, option 'target_modules'",
                "name attention modules, or leave it out: those that fit are found",
            )
        layer = target._modules.get(self.layer_class.name)
        if layer is None:
            layer = self.layer_class(site)
            target.add_module(self.layer_class.name, layer)
        assert isinstance(layer, AttentionLayer)
        layer.train(target.training)
        layer.add(adapter_name, peft_config)
        layer.open()

    def _open_passage(self) -> None:
        passage = vars(self.model).get("_patchkit_passage")
        if passage is None:
            passage = self.passage()
            if passage is None:
                return
            passage.open(self.model)
            self.model._patchkit_passage = passage
        for module in self.model.modules():
            if isinstance(module, self.layer_class):
                module.passage = passage

    def _add_lora(self, config: LoraConfig, adapter_name: str) -> None:
        """Beside our layers, under the same name: what peft does with one adapter it does with both."""
        if any(adapter_name in _adapters(module) for module in self.model.modules() if isinstance(module, LoraLayer)):
            raise Conflict(
                f"the model has LoRA layers called {adapter_name!r} already",
                f"{type(self).__name__}, option 'lora'",
                "give another adapter_name, or leave lora out",
            )
        self._lora_names = {*vars(self).get("_lora_names", ()), adapter_name}
        held = vars(self.model).pop("peft_config", None)  # a tuner that finds one would add to it
        try:
            LoraModel(self.model, {adapter_name: config}, adapter_name)
        finally:
            vars(self.model).pop("peft_config", None)
            if held is not None:
                self.model.peft_config = held
        self.tuner_layer_cls = (self.layer_class, LoraLayer)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # what was active stays so

    # --- going ------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise InvalidOption(
            f"adapters of {type(self).__name__} cannot be merged: what they do depends on the input",
            "merge_and_unload, merge_adapter",
            "keep the adapter, or take it off with unload()",
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        names = set(self.peft_config)
        self._remove(names)
        left = {n: c for n, c in vars(self.model).pop("peft_config", {}).items() if c is not self.peft_config.get(n)}
        if left:
            self.model.peft_config = left
        return self.model

    def _take_back(self, adapter_name: str, trains: list[tuple[torch.nn.Parameter, bool]]) -> None:
        """After a failure on the way in."""
        self._remove({adapter_name})
        for parameter, required in trains:
            parameter.requires_grad = required

    def _remove(self, names: set[str]) -> None:
        """Take adapters of ours out. What other tuners have on the model stays."""
        for module, layer in self._layers():
            for name in names & set(layer.settings):
                _delete(layer, name)
            if not layer.settings:
                self._take_out(module)
        if not self._layers():
            self._close_passage()
        configs: dict[str, Any] = self.peft_config
        saved = {name for name in names if name in configs and configs[name].modules_to_save}
        for path, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer):
                self._take_off(path, module, names & vars(self).get("_lora_names", set()))
            elif isinstance(module, ModulesToSaveWrapper):  # peft would leave the trained module in place
                self._take_off(path, module, saved)

    def _take_off(self, path: str, wrapper: Any, names: set[str]) -> None:
        """Delete adapters from a wrapper of peft's; the wrapper goes, too, if nobody has anything left in it."""
        held = _adapters(wrapper)
        for name in names & held if held - names else ():
            _delete(wrapper, name)
        if names & held and not held - names:
            parent, _, child = path.rpartition(".")
            if isinstance(wrapper, ModulesToSaveWrapper):
                setattr(self.model.get_submodule(parent), child, wrapper.original_module)
            elif hasattr(wrapper, "unload_and_optionally_merge_module"):  # torch's own multi-head attention
                own = wrapper.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), child, own)
            else:
                setattr(self.model.get_submodule(parent), child, wrapper.get_base_layer())

    def _layers(self) -> list[tuple[torch.nn.Module, AttentionLayer]]:
        """Our layers, behind the modules that they stand in."""
        found = [(module, module._modules.get(self.layer_class.name)) for module in self.model.modules()]
        return [(module, layer) for module, layer in found if isinstance(layer, AttentionLayer)]

    def _take_out(self, module: torch.nn.Module) -> None:
        layer = module._modules.pop(self.layer_class.name)
        assert isinstance(layer, AttentionLayer)
        layer.close()

    def _close_passage(self) -> None:
        passage = vars(self.model).pop("_patchkit_passage", None)
        if passage is not None:
            passage.close()


def _adapters(wrapper: Any) -> set[str]:
    """Names of the adapters that a wrapper of peft's holds."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        return set(wrapper.modules_to_save)
    return {name for attribute in wrapper.adapter_layer_names for name in getattr(wrapper, attribute)}


def _delete(layer: Any, name: str) -> None:
    """Without a new one becoming active in its place."""
    active = [other for other in layer.active_adapters if other != name]
    layer._active_adapter = active
    if isinstance(layer, ModulesToSaveWrapper):
        layer.delete_adapter(name, active)
    else:
        layer.delete_adapter(name)


def _endings(sites: list[Site], names: list[str]) -> set[str]:
    """The shortest way to name these modules and no others: their common last names, or else their full names."""
    wanted = {site.name for site in sites}
    last = {name.rpartition(".")[2] for name in wanted}
    found = {name for name in names if name.rpartition(".")[2] in last}
    return last if found == wanted else wanted


registration.try_to_register()  # again, as in config.py
