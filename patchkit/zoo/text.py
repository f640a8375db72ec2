"""The zoo's language: one token a word, in the real tokenizer classes, built in code (nothing is downloaded)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

CLIP_TOKENS = 24  # length to which the image models' prompts are padded; their longest caption takes 14
MAX_TOKENS = 20  # CogVideoX does not mask padding, so every prompt is padded to the length it was trained with

# Fixed for good: a new word would move every later token id. The spare words are for models to come.
WORDS = tuple(
    """a an the red green blue yellow purple orange white gray black brown pink cyan circle square triangle star ring
    cross moving standing still left right up down on of above below under over beside and background with no one two
    three small large big tiny fast slowly slow first then from to in at center corner top bottom middle side video
    picture image object shape shapes bright dark striped plain inside outside between next near far turning growing
    shrinking jumping rotating becomes into is are it that which not empty scene frame""".split()  # noqa: SIM905
)

# What zoo/vlm reads and writes besides: questions, answers, the words around them. Fixed for good, too.
CHAT_WORDS = tuple(
    """? . , : ! ' user assistant what which where how many kind of color colour do does you see describe say
    tell me can there here this these pictures question answer questions about yes none nothing neither both
    objects please or either only all same different other more less than for as please look at show shows has
    have beside second third last name answers""".split()  # noqa: SIM905
)


def t5_tokenizer(length: int = MAX_TOKENS) -> T5Tokenizer:
    """A ``T5Tokenizer`` whose pieces are whole words; an unknown word becomes ``<unk>``. ``length`` is its greatest."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + [("▁" + word, -1.0) for word in WORDS], extra_ids=0)
    tokenizer.model_max_length = length
    return tokenizer


def clip_tokenizer(length: int = CLIP_TOKENS) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` that merges every word of :data:`WORDS` into one token; other words fall into letters.

    Byte-pair merges interfere: a pair that one word needs may also occur in another. So each word is first merged by
    the rules so far, and only what is then still in pieces gets new rules, which rank behind all others and therefore
    change no earlier word.
    """
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        parts = _merge([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:
            merges[parts[0], parts[1]] = len(merges)
            pieces.append(parts[0] + parts[1])
            parts = _merge(parts, merges)
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    rules: Any = list(merges)  # annotated as strings, but pairs are what the class hands on
    return CLIPTokenizer(vocab=vocabulary, merges=rules, model_max_length=length)


def _merge(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair ``merges`` to ``parts``, the lowest rank first."""
    while True:
        ranked = [(merges[pair], n) for n, pair in enumerate(pairwise(parts)) if pair in merges]
        if not ranked:
            return parts
        _, n = min(ranked)
        parts = [*parts[:n], parts[n] + parts[n + 1], *parts[n + 2 :]]


def cap_length(tokenizer: Any) -> None:
    """Pad ``tokenizer``'s prompts to its own greatest length even where its caller asks for more.

    ``CogVideoXPipeline`` asks for 226 tokens unless it is told otherwise, and the zoo's denoiser knows 20. The class
    of this one instance is replaced by a subclass under the original's name, so it saves as what it is.
    """
    original = type(tokenizer)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] = min(kwargs["max_length"], self.model_max_length)
        return original.__call__(self, *args, **kwargs)

    body = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    tokenizer.__class__ = type(original.__name__, (original,), body)
