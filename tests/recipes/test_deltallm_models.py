"""DeltaLLM on transformers models: caches that pack, and that what they hold is right."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny
import torch
from tiny import models as tiny_models
from torch import Tensor

import patchkit
from patchkit.errors import InvalidOption, NothingMatched, PatchkitError
from patchkit.text_metrics import cache_bytes

NAMES = ("llama", "mistral", "qwen2", "qwen3", "bitnet", "gemma3", "gpt2", "llava")
OPTIONS: dict[str, Any] = {"theta": 2.7, "window": 10, "chunk": 8, "sink": 2, "min_tokens": 0}
THETA = {"qwen3": 2.5, "gemma3": 2.4, "llava": 2.6}


@functools.cache
def built(name: str) -> Any:
    if name == "mistral":  # the releases since v0.2 have no sliding window
        return tiny_models._decoder(tiny_models.MistralForCausalLM, tiny_models.MistralConfig, 2, sliding_window=None)
    return tiny.MODELS[name].build()


def options(name: str = "llama", **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "theta": THETA.get(name, 2.7), **more}


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, tokens: Tensor) -> dict[str, Any]:
    if name != "llava":
        return {"input_ids": tokens}
    tokens = tokens.clone()
    tokens[:, 2:18] = tiny_models.IMAGE_TOKEN
    return {"input_ids": tokens, "pixel_values": tiny_models._noise(tokens.shape[0], 3, 32, 32)}


GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model: Any, new: int = 5, **given: Any) -> Any:
    return model.generate(**given, max_new_tokens=new, min_new_tokens=new, **GREEDY)


def packed_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "pasts", None)]


def feed(model: Any, tokens: Tensor, sizes: list[int], **more: Any) -> tuple[Tensor, Any]:
    """Logits of all tokens, given in pieces, and the cache."""
    found, cache, at = [], None, 0
    for size in sizes:
        with torch.no_grad():
            out = model(input_ids=tokens[:, at : at + size], past_key_values=cache, use_cache=True, **more)
        found.append(out.logits)
        cache, at = out.past_key_values, at + size
    assert at == tokens.shape[1]
    return torch.cat(found, 1), cache


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_models(name: str) -> None:
    """Theta 0 generates the same; a larger one packs, with true token counts; afterwards all is as before."""
    model, given = built(name), inputs(name, ids(76))
    implementation = model.config._attn_implementation
    plain = generate(model, **given)
    with patchkit.apply(model, "deltallm", **options(name, theta=0.0)) as patch:
        same = generate(model, **given)
    assert torch.equal(same.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(same.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
    with patchkit.apply(model, "deltallm", **options(name)) as patch:
        out = generate(model, **given)
        (account,) = patch.report()["recipes"]
    layers = packed_layers(out.past_key_values)
    assert len(layers) == (1 if name == "gemma3" else 2)
    assert out.past_key_values.get_seq_length() == 76 + 4
    assert all(layer.get_seq_length() == 80 for layer in layers)
    for layer in layers:
        (past,) = layer.pasts
        assert past.border == 56
        assert int(past.packed.counts.sum(-1).min()) == int(past.packed.counts.sum(-1).max()) == 56
        assert 0.05 < float(past.removed().mean()) < 0.95
    assert not account["dense"]
    assert account["means"]["removed"] > 0.05
    assert not torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    assert model.config._attn_implementation == implementation
    again = generate(model, **given)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))
    assert {type(a) for a in again.past_key_values.layers} == {type(a) for a in plain.past_key_values.layers}


@pytest.mark.parametrize("name", NAMES)
def test_elements_mode_on_models(name: str) -> None:
    model, given = (tiny.MODELS[name].build() if name == "mistral" else built(name)), inputs(name, ids(40))
    plain = generate(model, **given)
    with patchkit.apply(model, "deltallm", mode="elements", theta=0.0) as patch:
        same = generate(model, **given)
        assert patch.report()["recipes"][0]["counts"]["simulated"] == 2 * 5
    torch.testing.assert_close(torch.stack(same.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
    with patchkit.apply(model, "deltallm", mode="elements", theta=THETA.get(name, 2.7), window=4) as patch:
        out = generate(model, **given)
        assert 0.1 < patch.report()["recipes"][0]["means"]["sparsity"] < 0.9
    assert not torch.allclose(out.logits[0], plain.logits[0], atol=1e-3)


def test_sliding_layers_are_left_and_named() -> None:
    with patchkit.apply(built("gemma3"), "deltallm", **OPTIONS) as patch:
        (reason,) = patch.report()["recipes"][0]["left"]
    assert "a sliding window of 8 tokens of its own" in reason
    with pytest.raises(NothingMatched, match="sliding window"):
        patchkit.apply(tiny.MODELS["mistral"].build(), "deltallm", **OPTIONS)
    with pytest.raises(NothingMatched, match="not causal"):
        patchkit.apply(tiny.MODELS["bert"].build(), "deltallm")


def test_thresholds_a_layer() -> None:
    model = built("llama")
    with pytest.raises(InvalidOption, match="3 thresholds for 2 layers"):
        patchkit.apply(model, "deltallm", theta=[1.0, 2.0, 3.0])
    with patchkit.apply(model, "deltallm", **options(theta=[0.0, 3.0])) as patch, torch.no_grad():
        model(ids(80), use_cache=False)
        rows = [row for row in patch.report()["recipes"][0]["rows"] if row["site"]]
    assert rows[0]["values"]["removed"] == [0.0]
    assert rows[1]["values"]["removed"][0] > 0.3


# --- feeding ------------------------------------------------------------------------------------------------------

WAYS = {"at once": [83], "chunks": [20, 1, 30, 32], "one by one": [25, *[1] * 34, 24]}


@pytest.mark.parametrize("window", [10, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_however_tokens_are_fed_runs_and_logits_are_the_same(way: str, window: float) -> None:
    model, tokens = built("llama"), ids(83)
    with patchkit.apply(model, "deltallm", **options(window=window)):
        with torch.no_grad():
            wanted = model(tokens, use_cache=False).logits
        logits, cache = feed(model, tokens, WAYS[way])
        _, whole = feed(model, tokens, [83])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-3)
    for a, b in zip(packed_layers(cache), packed_layers(whole), strict=True):
        (p,), (q,) = a.pasts, b.pasts
        assert p.tokens == q.tokens == 83
        assert p.border == q.border > 40
        assert torch.equal(p.rows, q.rows)
        assert torch.equal(p.packed.counts, q.packed.counts)
        torch.testing.assert_close(p.packed.keys, q.packed.keys, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(p.packed.values, q.packed.values, atol=1e-4, rtol=1e-3)


def test_below_min_tokens_the_cache_is_dense_and_then_it_packs() -> None:
    model, tokens = built("llama"), ids(60)
    with patchkit.apply(model, "deltallm", **options(min_tokens=40)) as patch:
        with torch.no_grad():
            wanted = model(tokens, use_cache=False).logits
        logits, cache = feed(model, tokens, [30, *[1] * 20, 10])
        assert patch.report()["recipes"][0]["dense"] == {"no more than 40 tokens (min_tokens)": 2 * 11}
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-3)
    assert len(packed_layers(cache)) == 2
    with torch.no_grad():
        dense = model(tokens, use_cache=False).logits
    torch.testing.assert_close(logits[:, :40], dense[:, :40], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(logits[:, 45:], dense[:, 45:], atol=1e-2)


def test_elements_filter_the_same_however_fed() -> None:
    model, tokens = built("llama"), ids(50)
    setting = {"mode": "elements", "theta": 1.0, "window": 9}
    with patchkit.apply(model, "deltallm", **setting):
        with torch.no_grad():
            wanted = model(tokens, use_cache=False).logits
        for sizes in ([20, *[1] * 10, 20], [20, 7, 23]):
            logits, cache = feed(model, tokens, sizes)
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-3)
            assert [layer.hat.shape[2] for layer in cache.layers] == [50, 50]


def test_64_generated_tokens_agree_with_recomputation() -> None:
    model = built("qwen3")
    with patchkit.apply(model, "deltallm", **options("qwen3")):
        out = generate(model, 64, input_ids=ids(30))
        with torch.no_grad():
            again = model(out.sequences[:, :-1], use_cache=False).logits[:, 29:]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["runs", "elements"])
def test_left_padded_batch_is_each_prompt_alone(name: str, mode: str) -> None:
    model, rows = built(name), [ids(45), ids(31, seed=1), ids(45, seed=2)]
    setting = options(name) if mode == "runs" else {"mode": "elements", "theta": THETA.get(name, 2.7), "window": 9}
    batch = torch.cat([torch.nn.functional.pad(row, (45 - row.shape[1], 0)) for row in rows])
    with patchkit.apply(model, "deltallm", **setting) as patch:
        together = generate(model, input_ids=batch, attention_mask=(batch != 0).long())
        assert not patch.report()["recipes"][0]["dense"]
        alone = [generate(model, input_ids=row) for row in rows]
    for i, one in enumerate(alone):
        torch.testing.assert_close(
            torch.stack(together.logits)[:, i], torch.stack(one.logits)[:, 0], atol=1e-4, rtol=1e-3
        )


# --- what callers do with caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["runs", "elements"])
def test_beam_search_follows_its_beams(mode: str) -> None:
    """Beams are reordered at each step: the best one must get the score that recomputing it gives."""
    model = built("llama")
    setting = options() if mode == "runs" else {"mode": "elements", "theta": 1.2, "window": 9}
    with patchkit.apply(model, "deltallm", **setting):
        out = model.generate(
            ids(40),
            num_beams=4,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        with torch.no_grad():
            logits = model(out.sequences[:, :-1], use_cache=False).logits[:, 39:]
    chosen = logits.log_softmax(-1).gather(-1, out.sequences[:, 40:, None])
    banned = logits.log_softmax(-1)[..., 2].exp()  # min_new_tokens forbids the end token without renormalising
    assert float(banned.max()) < 1.0
    torch.testing.assert_close(chosen.sum(), out.sequences_scores[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["lookup", "assistant", "chunked", "beams of several"])
def test_other_ways_to_generate(kind: str) -> None:
    model, tokens = built("llama"), ids(60, batch=2 if kind == "beams of several" else 1)
    tokens[:, 30:] = tokens[:, :30]  # something to look up
    extra: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": copy.deepcopy(model)},
        "chunked": {"prefill_chunk_size": 11},
        "beams of several": {"num_beams": 2},
    }[kind]
    run = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
    with patchkit.apply(model, "deltallm", **options()):
        if kind == "beams of several":
            both = model.generate(tokens, **run, **extra)
            each = torch.cat([model.generate(row[None], **run, **extra) for row in tokens])
            assert torch.equal(both, each)
        else:
            assert torch.equal(model.generate(tokens, **run, **extra), model.generate(tokens, **run))


def test_foreign_caches_are_left_dense_and_said() -> None:
    model, tokens = built("llama"), ids(60)
    with patchkit.apply(model, "deltallm", **options()) as patch:
        model.generate(tokens, cache_implementation="static", max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert patch.report()["recipes"][0]["dense"] == {"decoding without a cache that can be packed": 2 * 2}
        model.generate(tokens, use_cache=False, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert not patch.report()["recipes"][0]["dense"]


def test_crop_takes_tokens_back_without_a_trace_or_refuses() -> None:
    model, tokens = built("llama"), ids(80)
    with patchkit.apply(model, "deltallm", **options()):
        for back in (1, 5, 14):
            logits, cache = feed(model, tokens, [70, 10])
            cache.crop(-back)
            assert cache.get_seq_length() == 80 - back
            with torch.no_grad():
                again = model(tokens[:, 80 - back :], past_key_values=cache).logits
            torch.testing.assert_close(again, logits[:, 80 - back :], atol=1e-4, rtol=1e-3)
        _, cache = feed(model, tokens, [80])
        with pytest.raises(PatchkitError, match="cannot be taken back"):
            cache.crop(-40)
        cache.reset()
        assert cache.get_seq_length() == 0
        logits, _ = feed(model, tokens, [80])
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, past_key_values=cache).logits, logits)


def test_batches_are_selected_and_repeated() -> None:
    model = built("llama")
    batch = torch.cat([torch.nn.functional.pad(ids(n, seed=n), (60 - n, 0)) for n in (60, 50, 60)])
    mask = (batch != 0).long()
    more = ids(3, batch=3, seed=9)
    longer = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1)

    def go_on(change: Any, rows: list[int]) -> Tensor:
        with torch.no_grad():
            cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
            change(cache)
            return model(more[rows], attention_mask=longer[rows], past_key_values=cache).logits

    with patchkit.apply(model, "deltallm", **options()):
        all_three = go_on(lambda cache: None, [0, 1, 2])
        changes = {
            "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 2, 1])), [2, 2, 1]),
            "select": (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
            "select by mask": (lambda c: c.batch_select_indices(torch.tensor([False, True, False])), [1]),
            "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        }
        for change, rows in changes.values():
            torch.testing.assert_close(go_on(change, rows), all_three[rows], atol=1e-5, rtol=1e-4)


def test_a_copied_cache_goes_its_own_way() -> None:
    model, tokens = built("llama"), ids(60)
    with patchkit.apply(model, "deltallm", **options()):
        _, cache = feed(model, tokens, [60])
        other = copy.deepcopy(cache)
        a = generate(model, 20, input_ids=torch.cat([tokens, ids(1, seed=5)], 1), past_key_values=cache)
        assert other.get_seq_length() == 60
        b = generate(model, 20, input_ids=torch.cat([tokens, ids(1, seed=5)], 1), past_key_values=other)
    assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))


def test_after_removal_the_cache_goes_on_as_a_dense_one() -> None:
    model, tokens = built("llama"), ids(70)
    with patchkit.apply(model, "deltallm", **options()) as patch:
        _, cache = feed(model, tokens, [70])
        kept = copy.deepcopy(cache)
        with torch.no_grad():
            on = model(ids(1, seed=3), past_key_values=copy.deepcopy(cache)).logits
        patch.disable()
        with torch.no_grad():
            off = model(ids(1, seed=3), past_key_values=cache).logits
        assert not packed_layers(cache)
        patch.enable()
        with torch.no_grad():
            model(ids(1, seed=4), past_key_values=cache)
        assert len(packed_layers(cache)) == 2
    torch.testing.assert_close(on, off, atol=1e-4, rtol=1e-3)  # runs written out weigh the same
    with torch.no_grad():
        removed = model(ids(1, seed=3), past_key_values=kept).logits
    assert torch.equal(removed, off)
    assert kept.get_seq_length() == 71


def test_a_dense_cache_from_before_is_packed() -> None:
    model, tokens = built("llama"), ids(230)
    _, cache = feed(model, tokens, [230])
    before = cache_bytes(cache)
    with patchkit.apply(model, "deltallm", **options(theta=3.5)), torch.no_grad():
        model(ids(1, seed=3), past_key_values=cache)
    assert cache_bytes(cache) < before
    assert cache.get_seq_length() == 231


def test_prefill_may_stay_dense() -> None:
    model, tokens = built("llama"), ids(230)
    plain, _ = feed(model, tokens, [230])
    with patchkit.apply(model, "deltallm", **options(theta=3.5, stages="decode")):
        logits, cache = feed(model, tokens, [230])
        assert torch.equal(logits, plain)
        assert [layer.pasts[0].border for layer in packed_layers(cache)] == [208, 208]
        bytes_packed = cache_bytes(cache)
    with patchkit.apply(model, "deltallm", **options(theta=3.5, stages="prefill")):
        logits, cache = feed(model, tokens, [230])
    assert not torch.equal(logits, plain)
    assert not packed_layers(cache)
    assert bytes_packed < cache_bytes(cache)


def test_a_packed_cache_refuses_what_it_cannot_do() -> None:
    model, tokens = built("llama"), ids(60)
    with patchkit.apply(model, "deltallm", **options()), torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        holes = torch.ones(1, 61, dtype=torch.long)
        holes[0, 5:9] = 0
        with pytest.raises(PatchkitError, match="cannot go on with a mask that leaves out tokens"):
            model(ids(1), attention_mask=holes, past_key_values=cache)


def test_bytes_are_those_of_the_rows_that_are_kept() -> None:
    """What left the window takes (1 - removed) of its rows, and a count a row."""
    model, n = built("llama"), 240
    _, plain = feed(model, ids(n), [n])
    with patchkit.apply(model, "deltallm", **options(theta=3.0)):
        _, cache = feed(model, ids(n), [n])
    a_row = 2 * 2 * 8 * 4  # two heads of 8, keys and values, fp32
    assert cache_bytes(plain) == 2 * n * a_row
    for layer in packed_layers(cache):
        (past,) = layer.pasts
        rows = past.packed.keys.shape[2]
        assert rows == int(past.rows.max()) < 0.8 * past.border
        exact = past.keys.shape[2]
        assert exact <= 10 + 2 * 8 + 2 * 32
        assert cache_bytes(layer.pasts) <= rows * (a_row + 8) + exact * a_row + 128 * 8


def test_a_failure_leaves_the_cache_usable() -> None:
    """An error between the cache and its attention: the tokens were never there."""
    model, tokens = built("llama"), ids(60)
    with patchkit.apply(model, "deltallm", **options()), torch.no_grad():
        wanted, _ = feed(model, tokens, [50, 10])
        cache = model(tokens[:, :50], use_cache=True).past_key_values
        held = cache.layers[0].pasts[0].tokens
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens[:, 50:], past_key_values=copy.deepcopy(cache))
        hook.remove()
        assert cache.layers[0].pasts[0].tokens == held
        out = model(tokens[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(out, wanted[:, 50:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny.MODELS["llama"].build().to(dtype)
    with patchkit.apply(model, "deltallm", **options()):
        out = generate(model, 12, input_ids=ids(70))
    assert torch.stack(out.logits).isfinite().all()
    assert packed_layers(out.past_key_values)[0].pasts[0].packed.keys.dtype == dtype


# --- calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [{}, {"metric": "euclidean"}, {"metric": "cosine"}, {"mode": "elements", "window": 0.05}],
    ids=str,
)
def test_calibrated_thresholds_reach_their_target(extra: dict[str, Any]) -> None:
    from patchkit.recipes.deltallm import calibrate

    model, tokens = built("llama"), ids(200)
    plain, _ = feed(model, tokens, [200])
    setting = extra if extra.get("mode") else {"chunk": 16, "window": 10, "min_tokens": 0, **extra}
    found = calibrate(model, tokens, 0.4, **setting)
    assert len(found["theta"]) == 2
    assert not patchkit.status(model)["patched"]
    with patchkit.apply(model, "deltallm", **found) as patch, torch.no_grad():
        model(tokens, use_cache=False)
        rows = [row["values"] for row in patch.report()["recipes"][0]["rows"] if row["site"]]
    for row in rows:
        reached = row.get("removed") or [x for sample in row["sparsity"] for x in sample]
        assert sum(reached) / len(reached) == pytest.approx(0.4, abs=0.08)
    after, _ = feed(model, tokens, [200])
    assert torch.equal(plain, after)


def test_calibration_takes_texts_and_refuses_nonsense() -> None:
    from patchkit.recipes.deltallm import calibrate

    model = built("llama")

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> Any:
            return type("Encoding", (), {"input_ids": torch.tensor([[3 + ord(c) % 300 for c in text]])})

    text = "keys of neighbouring tokens are alike " * 5
    one = calibrate(model, text, 0.3, tokenizer=Tokenizer(), chunk=16)
    assert one == calibrate(model, Tokenizer()(text, "pt").input_ids[0], 0.3, chunk=16)
    assert one == calibrate(model, [text], 0.3, tokenizer=Tokenizer(), chunk=16)
    for arguments, message in (
        ({"texts_or_input_ids": text}, "tokenizer"),
        ({"texts_or_input_ids": []}, "no text"),
        ({"texts_or_input_ids": ids(50), "target_sparsity": 1.0}, "between 0 and 1"),
        ({"texts_or_input_ids": ids(50), "target_sparsity": 0.9, "chunk": 4}, "out of reach"),
        ({"texts_or_input_ids": ids(50), "theta": 1.0}, "looked for"),
        ({"texts_or_input_ids": ids(50), "thetta": 1.0}, "no option"),
        ({"texts_or_input_ids": torch.rand(40)}, "integers"),
    ):
        with pytest.raises(InvalidOption, match=message):
            calibrate(model, **arguments)
