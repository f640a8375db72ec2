"""Which models the method is for: those whose image features are tokens of the decoder's self-attention."""

from __future__ import annotations

from typing import Any

from patchkit.adapters.tokens import markers
from patchkit.errors import InvalidOption, UnsupportedModel
from patchkit.recipes.var.channels import Channels, find, identity_of
from patchkit.sites import Site

_CROSS = "its decoder sees images through cross-attention, not as tokens of its self-attention"
_RESAMPLED = "a resampler makes its image tokens, so none stands for a patch; the method was not evaluated there"
_LEARNED = "its softmax counts learned sink logits, which would have to be told apart from sink tokens"
REFUSED = {
    "mllama": _CROSS,
    "idefics": _CROSS,
    "idefics2": _RESAMPLED,
    "instructblip": _RESAMPLED,
    "instructblipvideo": _RESAMPLED,
    "blip-2": _RESAMPLED,
    "kosmos-2": _RESAMPLED,
    "gpt_oss": _LEARNED,
}


def model_of(target: Any) -> Any:
    """The model of a transformers pipeline; anything else is one itself."""
    return target if hasattr(target, "config") else target.model


def check(target: Any, sites: list[Site], where: str) -> None:
    """Raise :class:`UnsupportedModel` if the method means nothing on this model."""
    target = model_of(target)
    kinds = [str(getattr(c, "model_type", "")) for c in (target.config, *(s.module.config for s in sites[:1]))]
    for kind in kinds:
        if kind in REFUSED:
            raise UnsupportedModel(f"VAR does not fit {kind}: {REFUSED[kind]}", where, "patchkit info var names models")
    if any(site.learned_sinks for site in sites):
        raise UnsupportedModel(f"VAR does not fit {kinds[0]}: {_LEARNED}", where, "patchkit info var names models")
    if not markers(target):
        raise UnsupportedModel(
            f"{type(target).__name__} has no image tokens",
            where,
            "give a vision-language model as a whole",
        )


def channels(target: Any, sites: list[Site], given: list[int] | None, where: str) -> Channels:
    """The sink channels: those given, or those that are known of this model.

    Raises:
        InvalidOption: one is given that the hidden state does not have.
        UnsupportedModel: none are given and none are known.
    """
    text: Any = sites[0].module.config
    if given is None:
        return find(identity_of(model_of(target), text))
    beyond = [d for d in given if not 0 <= d < text.hidden_size]
    if beyond:
        listed = ", ".join(map(str, beyond))
        raise InvalidOption(
            f"channel {listed} of {text.hidden_size}", f"{where}, option 'sink_dims'", f"0 to {text.hidden_size - 1}"
        )
    return Channels(tuple(given), "given", "option sink_dims")
