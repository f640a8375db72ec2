"""A trained adapter on a model for as long as a patch is on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from patchkit.adapters import adapter_for
from patchkit.context import Attend, AttentionCall
from patchkit.errors import Conflict, InvalidOption
from patchkit.finetune import require

WHERE = "recipe 'moh', option 'adapter'"
NAME = "default"


def check(folder: str, target: Any) -> None:
    """Refuse a folder without such an adapter, and a model that carries adapters already."""
    require()
    path = Path(folder).expanduser() / "adapter_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"no adapter can be read there: {error}", WHERE, "name the folder that it was saved to"
        ) from None
    if kind != "PATCHKIT_MOH":
        raise InvalidOption(
            f"an adapter of another kind ({kind})", f"{WHERE}: {path}", "give one that was trained with MoHConfig"
        )
    model = adapter_for(target).target
    if not hasattr(model, "parameters"):
        raise InvalidOption("adapters are for a model, this is a pipeline", WHERE, "give the pipeline's transformer")
    if hasattr(model, "peft_config"):
        raise Conflict("the model carries adapters of peft already", type(model).__name__, "unload them first")


def attach(target: Any, folder: str) -> Attached:
    """Put the adapter on the model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    from patchkit.recipes.moh.tuning import MoHConfig, MoHModel

    model = target
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    path = str(Path(folder).expanduser())
    config = MoHConfig.from_pretrained(path)
    config.inference_mode = True
    tuner = None
    try:
        tuner = MoHModel(model, {NAME: config}, NAME)
        weights = load_peft_weights(path, device="cpu")
        # peft looks up whole modules (modules_to_save) by their names in the model that it is given
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
        found: Any = set_peft_model_state_dict(model, weights, adapter_name=NAME)
        if found.unexpected_keys:
            raise InvalidOption(
                f"it is for another model: {found.unexpected_keys[0]} is not in this one",
                f"{WHERE}: {path}",
                "check the model",
            )
    except BaseException as error:
        if tuner is not None:
            tuner.unload()
        _restore(trains)
        if isinstance(error, RuntimeError | ValueError) and not isinstance(error, InvalidOption):
            raise InvalidOption(
                f"it does not fit this model: {error}", f"{WHERE}: {path}", "check the model"
            ) from error
        raise
    return Attached(tuner, trains)


class Attached:
    """The adapter on the model."""

    def __init__(self, tuner: Any, trains: list[tuple[Any, bool]]) -> None:
        self._tuner, self._trains = tuner, trains

    def switch(self, on: bool) -> None:
        """Let it work, or not."""
        if on:
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()

    def remove(self) -> None:
        """Take it off; parameters are trained again if they were."""
        self._tuner.unload()
        _restore(self._trains)


def attend(call: AttentionCall, next: Attend) -> Tensor:
    """The op through the router that stands in the module, which writes into the patch's ledger."""
    from patchkit.recipes.moh.tuning import HeadRouter

    router = call.site.module._modules.get(HeadRouter.name)
    if not isinstance(router, HeadRouter):
        call.ledger.ran_dense("the adapter has no router here")
        return next(call)
    own, router.ledger = router.ledger, call.ledger
    try:
        return next(call)
    finally:
        call.ledger.calls -= 1  # counted by the chain already
        router.ledger = own


def _restore(trains: list[tuple[Any, bool]]) -> None:
    for parameter, required in trains:
        parameter.requires_grad = required
