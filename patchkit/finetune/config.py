"""What the adapters of all tuned recipes have in common in their configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig

from patchkit.errors import InvalidOption
from patchkit.finetune import registration
from patchkit.finetune.types import TunerType

_NOT_BESIDE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")


@dataclass
class TunerConfig(PeftConfig):
    """Base of their configurations; fields must be plain data, because peft writes them as JSON.

    Args:
        target_modules: attention modules, in peft's grammar: a list of name endings, or one regular expression for the
            full name. None = every attention that the method can work on.
        exclude_modules: same grammar; wins over ``target_modules``.
        layers_to_transform: numbers of the blocks to work on, with ``target_modules`` as a list; None = all.
        layers_pattern: name of the list of blocks, where peft cannot tell.
        modules_to_save: other modules that are trained and saved whole.
        lora: a ``LoraConfig``, or its fields, for LoRA layers that are part of this adapter: trained, saved, loaded,
            switched and unloaded with it. None = none.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    lora: dict[str, Any] | None = field(default=None)

    type_name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        registration.enter(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = TunerType[self.type_name]
        self.target_parameters = None  # asked for by peft's matching
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple | set):
                setattr(self, name, set(value))
        if self.lora is not None:
            self.lora = _plain(self.lora)

    def lora_config(self) -> LoraConfig | None:
        """The configuration of the LoRA layers, or None."""
        if self.lora is None:
            return None
        return LoraConfig(**self.lora, inference_mode=self.inference_mode)


def _plain(lora: Any) -> dict[str, Any]:
    """The fields of a ``LoraConfig`` that differ from their default, as JSON can hold them."""
    where = "option 'lora'"
    if isinstance(lora, dict):
        try:
            lora = LoraConfig(**lora)
        except (TypeError, ValueError) as error:
            raise InvalidOption(f"no LoRA configuration: {error}", where, "see peft.LoraConfig") from None
    if not isinstance(lora, LoraConfig):
        raise InvalidOption(f"a {type(lora).__name__}", where, "give a peft.LoraConfig, or its fields as a dict")
    usual, given = LoraConfig().to_dict(), lora.to_dict()
    left = ("peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "task_type")
    kept = {n: v for n, v in given.items() if v != usual.get(n) and n not in left and n != "peft_version"}
    for name in _NOT_BESIDE:
        if kept.get(name):
            raise InvalidOption(
                f"{name} is not possible in an adapter together with others",
                where,
                "leave it out, or put LoRA on the model as an adapter of its own",
            )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in kept.items()}


registration.try_to_register()  # again: where peft was first imported by this module, it could not be done yet
