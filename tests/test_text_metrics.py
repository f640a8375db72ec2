"""Perplexity, speed and cache bytes of tiny language models against what they are by definition."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny import tokenizers

from patchkit import text_metrics
from patchkit.errors import InvalidOption

TEXT = "the miller opened the gate twenty minutes early and the wheel began to turn again " * 4


@pytest.fixture(scope="module")
def llama():
    tokenizer = tokenizers.llama()
    assert tokenizer.bos_token_id is not None
    model = tiny.models.llama()
    return model, tokenizer


def ids_of(tokenizer, text=TEXT):
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]


def nll(model, ids, at):
    """-log p(ids[at] | all before it in ids)."""
    with torch.no_grad():
        logits = model(input_ids=ids[None, :at]).logits[0, -1]
    return -float(logits.double().log_softmax(-1)[ids[at]])


def test_one_window_is_the_models_own_loss(llama):
    model, tokenizer = llama
    ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids_of(tokenizer)])
    with torch.no_grad():
        loss = float(model(input_ids=ids[None], labels=ids[None]).loss)
    found = text_metrics.perplexity(model, tokenizer, TEXT, window=len(ids), stride=len(ids))
    assert found.tokens == len(ids) - 1
    assert found.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert 0 < found.error < found.value


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (7, 7)])
@pytest.mark.parametrize("bos", [True, False])
def test_every_token_counts_once_with_the_context_of_its_window(llama, window, stride, bos):
    model, tokenizer = llama[0], tokenizers.llama()
    ids = ids_of(tokenizer)
    if not bos:
        tokenizer.bos_token = None
        if stride == window:
            with pytest.raises(InvalidOption, match="overlap"):
                text_metrics.perplexity(model, tokenizer, TEXT, window, stride)
            return
    front = ids.new_tensor([tokenizer.bos_token_id] if bos else [])
    expected = []
    for token in range(0 if bos else 1, len(ids)):
        begin = 0
        while begin + window <= token:  # the first window that holds it
            begin += stride
        expected.append(nll(model, torch.cat([front, ids[begin : token + 1]]), len(front) + token - begin))
    found = text_metrics.perplexity(model, tokenizer, TEXT, window, stride)
    assert found.tokens == len(expected)
    assert found.value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)


@pytest.mark.parametrize(("window", "stride", "text"), [(8, 0, TEXT), (8, 9, TEXT), (8, 4, "")])
def test_what_cannot_be_measured_is_refused(llama, window, stride, text):
    with pytest.raises(InvalidOption):
        text_metrics.perplexity(*llama, text, window, stride)


def test_speed_counts_what_it_generated_and_the_cache_it_left(llama):
    model, tokenizer = llama
    config = model.config
    ids = ids_of(tokenizer)[None].expand(2, -1)
    found = text_metrics.speed(model, ids, generated=5)
    assert (found.prompt, found.generated) == (ids.shape[1], 5)
    assert found.prefill_tokens_s > 0
    assert found.decode_tokens_s > 0
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert found.cache_bytes == config.num_hidden_layers * 2 * 2 * (ids.shape[1] + 5) * width * 4
    with pytest.raises(InvalidOption, match="2"):
        text_metrics.speed(model, ids, generated=1)


def test_cache_bytes_counts_memory_once():
    keys = torch.zeros(10, 4)

    class Layer:
        def __init__(self):
            self.keys, self.values, self.again = keys, keys[:5], [torch.zeros(3, dtype=torch.int16)]

    class Cache:
        def __init__(self):
            self.layers = [Layer(), Layer()]
            self.owner = self

    assert text_metrics.cache_bytes(Cache()) == 160 + 2 * 6
    assert text_metrics.cache_bytes(None) is None
