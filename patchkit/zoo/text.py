"""The zoo's language: one token a word, in the real T5 tokenizer class, built in code (nothing is downloaded)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import T5Tokenizer

MAX_TOKENS = 20  # CogVideoX does not mask padding, so every prompt is padded to the length it was trained with

# Fixed for good: a new word would move every later token id. The spare words are for models to come.
WORDS = tuple(
    """a an the red green blue yellow purple orange white gray black brown pink cyan circle square triangle star ring
    cross moving standing still left right up down on of above below under over beside and background with no one two
    three small large big tiny fast slowly slow first then from to in at center corner top bottom middle side video
    picture image object shape shapes bright dark striped plain inside outside between next near far turning growing
    shrinking jumping rotating becomes into is are it that which not empty scene frame""".split()
)


def t5_tokenizer() -> T5Tokenizer:
    """A ``T5Tokenizer`` whose pieces are whole words; an unknown word becomes ``<unk>``."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + [("▁" + word, -1.0) for word in WORDS], extra_ids=0)
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer
