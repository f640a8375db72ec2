"""Which tokens of a prompt a word is."""

from __future__ import annotations

import re
from typing import Any

from patchkit.errors import InvalidOption, UnsupportedModel


def places(
    tokenizer: Any,
    prompt: str,
    word: str,
    where: str,
    limit: int | None = None,
    around: tuple[str, str] = ("", ""),
    crop: int = 0,
) -> tuple[int, ...]:
    """The places of all tokens of ``word`` (or several words in a row) in a tokenised prompt, by character offsets.

    Args:
        tokenizer: a fast one, as transformers 5 makes them.
        prompt: the prompt as it goes to the tokenizer.
        word: found as whole words, whatever their case; every occurrence counts.
        where: for messages.
        limit: how many tokens the model takes; what lies beyond is cut off.
        around: what is put before and behind the prompt before it is tokenised.
        crop: how many tokens of all that are cut off in front.

    Raises:
        InvalidOption: the prompt has no such word, or it lies beyond the limit.
        UnsupportedModel: the tokenizer does not tell offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for",
            where,
            "load the fast tokenizer",
        )
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)]
    if not word.strip() or not found:
        raise InvalidOption(f"the prompt {prompt!r} has no word {word!r}", where, "name a word of the prompt")
    offsets = tokenizer(around[0] + prompt + around[1], return_offsets_mapping=True)["offset_mapping"]
    found = [(start + len(around[0]), stop + len(around[0])) for start, stop in found]
    # an offset may include the space before the word; an empty one belongs to a token that the tokenizer adds
    tokens = tuple(
        i - crop
        for i, (a, b) in enumerate(offsets)
        if i >= crop and any(max(a, start) < min(b, stop) for start, stop in found)
    )
    if not tokens or (limit is not None and tokens[-1] >= limit):
        raise InvalidOption(
            f"{word!r} stands beyond the {limit} tokens that the model takes of a prompt"
            if tokens
            else f"no token of the prompt {prompt!r} stands for {word!r}",
            where,
            "put it further to the front",
        )
    return tokens
