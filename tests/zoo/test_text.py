"""The CLIP tokenizer knows the zoo's words as wholes."""

import pytest

from patchkit.zoo.text import CLIP_TOKENS, WORDS, cap_length, clip_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


def test_every_word_is_one_token(tokenizer):
    ids = {word: tokenizer(word).input_ids for word in WORDS}
    assert {len(i) for i in ids.values()} == {3}
    assert len({i[1] for i in ids.values()}) == len(WORDS)
    for word, (start, middle, end) in ids.items():
        assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode([middle]).strip() == word


def test_other_words_fall_into_pieces_and_come_back(tokenizer):
    ids = tokenizer("a zebra").input_ids
    assert len(ids) > 4
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "azebra"


def test_it_saves_and_loads(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "a red circle left of a green square on a blue background"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == CLIP_TOKENS
    cap_length(again)
    assert len(again(text, padding="max_length", max_length=77).input_ids) == CLIP_TOKENS
