"""VAR in all the ways a model is called: caches of every kind, chunks, turns, beams, compiled, spread over devices."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from tiny import forward
from tiny.vlms import VLMS
from torch import Tensor
from var_oracle import Oracle, Planted, decoder_layers, image_mask

import patchkit
from patchkit.recipes.var import UNPLACED, UNSEEN

DIMS = [3, 7]
GATES: dict[str, Any] = {"tau": 1.5, "rho": 0.5, "min_visual": 0.2, "recycle": 0.6}
VAR: dict[str, Any] = {"layers": "0-", "sink_dims": DIMS, **GATES}
LENGTHS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SOME = pytest.mark.parametrize("name", ["llava", "qwen25vl", "idefics3", "paligemma", "gemma3vl"])


@functools.cache
def built(name: str = "llava") -> Any:
    return VLMS[name].build()


def inputs(name: str = "llava") -> dict[str, Tensor]:
    return VLMS[name].inputs(built(name))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def logits(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and the logits they were chosen from."""
    more = {"output_logits": True, "return_dict_in_generate": True} | LENGTHS | options
    found = model.generate(**batch, **more)
    return found.sequences, torch.stack(found.logits, 1)


def dense(patch: patchkit.Patch) -> dict[str, int]:
    return patch.report()["recipes"][0]["dense"]


@SOME
@pytest.mark.parametrize("kind", ["dynamic", "static", "beams"])
def test_ways_to_generate(name: str, kind: str) -> None:
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 2}}[kind]
    if name in ("paligemma", "gemma3vl") and kind == "static":
        options["disable_compile"] = True
    model, batch = built(name), inputs(name)
    with Oracle(model, DIMS, range(4), **GATES):
        tokens, wanted = logits(model, batch, **({} if kind == "static" else options))
    with patchkit.apply(model, "var", **VAR) as patch:
        for _ in range(2):  # nothing is left of the first
            got, scores = logits(model, batch, **options)
            assert torch.equal(got, tokens)
            assert error(scores, wanted) < 1e-5
        assert not dense(patch)


@SOME
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_in_one_pass(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a cache that is long enough for it."""
    edit = importlib.import_module("patchkit.recipes.var.edit")
    passes, once = [], edit.redistribute_decode
    monkeypatch.setattr(edit, "FUSED_KEYS", 1)
    monkeypatch.setattr(edit, "redistribute_decode", lambda *a, **k: passes.append(1) or once(*a, **k))
    test_ways_to_generate(name, kind)
    assert passes


def test_another_prompt_in_between_changes_nothing() -> None:
    model, batch = built(), inputs()
    other = {"input_ids": batch["input_ids"][:1].flip(0), "pixel_values": batch["pixel_values"][1:]}
    with patchkit.apply(model, "var", **VAR):
        _, fresh = logits(model, batch)
    with patchkit.apply(model, "var", **VAR):
        logits(model, other)
        _, later = logits(model, batch)
    assert torch.equal(fresh, later)


@pytest.mark.parametrize("cuts", [[20], [5, 23, 40], [41, 42]])
def test_a_prompt_in_chunks_is_the_prompt_in_one(cuts: list[int]) -> None:
    """Cuts inside pictures, and a chunk of a single token."""
    model, batch = built("llava"), inputs("llava")
    kept = batch["attention_mask"].bool()
    with patchkit.apply(model, "var", **VAR) as patch:
        whole = forward(VLMS["llava"], model)
        got, _ = in_chunks(model, batch, cuts)
        assert not dense(patch)
    if cuts == [41, 42]:
        # a token that comes alone counts as generated: it is no sink
        kept[:, 41:] = False
    assert error(got[kept], whole[kept]) < 1e-5


@torch.no_grad()
def in_chunks(model: Any, batch: dict[str, Tensor], cuts: list[int]) -> tuple[Tensor, Any]:
    """The prompt in pieces; features are put in their places beforehand, ids tell where they are."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    features = model.get_image_features(batch["pixel_values"])
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    image = image_mask(model, ids)
    whole = model.get_input_embeddings()(ids).masked_scatter(image[..., None], features)
    handles = []
    at = [0, 0]

    def place(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "inputs_embeds": whole[:, at[0] : at[1]]}

    handles.append(model.model.language_model.register_forward_pre_hook(place, with_kwargs=True))
    past, out = None, []
    try:
        for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            at[:] = [start, stop]
            found = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True
            )
            past = found.past_key_values
            out.append(found.logits)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(out, 1), past


@torch.no_grad()
def test_a_second_turn_with_another_picture() -> None:
    """First turn, an answer, then a second question with a picture of its own."""
    model, batch = built(), inputs()
    row = batch["input_ids"][:1]
    first, second = row[:, :19], row[:, 19:]
    answer = torch.tensor([[50, 60, 70]])
    with Oracle(model, DIMS, range(4), **GATES):
        wanted = turns(model, first, answer, second, batch["pixel_values"])
    with patchkit.apply(model, "var", **VAR) as patch:
        got = turns(model, first, answer, second, batch["pixel_values"])
        assert not dense(patch)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < 1e-5


def turns(model: Any, first: Tensor, answer: Tensor, second: Tensor, pixels: Tensor) -> list[Tensor]:
    out = model(input_ids=first, pixel_values=pixels[:1], use_cache=True)
    found = [out.logits]
    for token in answer.split(1, 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    out = model(input_ids=second, pixel_values=pixels[1:2], past_key_values=out.past_key_values, use_cache=True)
    return [*found, out.logits]


@torch.no_grad()
def test_caches_that_take_turns() -> None:
    """Two conversations at once: each keeps its own sinks."""
    model, batch = built(), inputs()
    prompts = [batch["input_ids"][:1], batch["input_ids"][:1].roll(1, 1)]
    pixels = [batch["pixel_values"][:2], batch["pixel_values"][1:]]
    token = torch.tensor([[77]])
    with patchkit.apply(model, "var", **VAR) as patch:
        alone = []
        for ids, pixel in zip(prompts, pixels, strict=True):
            out = model(input_ids=ids, pixel_values=pixel, use_cache=True)
            alone.append(model(input_ids=token, past_key_values=out.past_key_values).logits)
        outs = [model(input_ids=i, pixel_values=p, use_cache=True) for i, p in zip(prompts, pixels, strict=True)]
        turns = [model(input_ids=token, past_key_values=o.past_key_values).logits for o in outs]
        assert not dense(patch)
    assert torch.equal(alone[0], turns[0])
    assert torch.equal(alone[1], turns[1])


@torch.no_grad()
def test_a_cache_that_was_filled_before_runs_dense_and_says_so() -> None:
    model, batch = built(), inputs()
    out = model(**batch, use_cache=True)
    token, mask = torch.tensor([[77], [78]]), torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    again = copy.deepcopy(out.past_key_values)
    wanted = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values).logits
    with patchkit.apply(model, "var", **VAR) as patch:
        got = model(input_ids=token, attention_mask=mask, past_key_values=again).logits
        assert list(dense(patch)) == [UNSEEN]
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_features_without_ids_run_dense_and_say_so() -> None:
    model, batch = built(), inputs()
    embeds = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    wanted = model(inputs_embeds=embeds).logits
    with patchkit.apply(model, "var", **VAR) as patch:
        assert torch.equal(model(inputs_embeds=embeds).logits, wanted)
        assert list(dense(patch)) == [UNPLACED]
        ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:2]
        placed = model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels)
        with_ids = model(input_ids=ids, pixel_values=pixels)
    assert torch.equal(placed.logits, with_ids.logits), "placeholders are found by their embedding"


@torch.no_grad()
def test_decoding_is_a_forward_of_everything_with_the_same_sinks() -> None:
    """Prompt and cached decoding against one uncached call of the whole text, generated tokens being no sinks."""
    model, batch = built(), inputs()
    with patchkit.apply(model, "var", **VAR):
        tokens, stepwise = logits(model, batch)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    length = batch["input_ids"].shape[1]
    with Oracle(model, DIMS, range(4), **GATES) as oracle:
        enter = oracle._enter

        def frozen(layer: int, args: Any, kwargs: Any) -> None:
            enter(layer, args, kwargs)
            oracle.sinks[layer][:, length:] = False

        oracle._enter = frozen  # type: ignore[method-assign]
        whole = model(input_ids=tokens, attention_mask=mask, pixel_values=batch["pixel_values"], use_cache=False).logits
    assert error(stepwise, whole[:, length - 1 : -1]) < 1e-5


@pytest.mark.parametrize("track", [False, True])
def test_generated_tokens_as_sinks(track: bool) -> None:
    model, batch = built(), inputs()
    loose = GATES | {"tau": 0.5}
    with Oracle(model, DIMS, range(4), **loose, track=track):
        _, wanted = logits(model, batch, max_new_tokens=8, min_new_tokens=8)
    with patchkit.apply(model, "var", **(VAR | loose), track_generated=track):
        _, got = logits(model, batch, max_new_tokens=8, min_new_tokens=8)
    assert error(got, wanted) < 1e-5


def test_without_a_cache() -> None:
    """Everything is new at each step, the generated tokens included."""
    model, batch = built(), inputs()
    with Oracle(model, DIMS, range(4), **GATES):
        _, wanted = logits(model, batch, use_cache=False)
    with patchkit.apply(model, "var", **VAR):
        _, got = logits(model, batch, use_cache=False)
    assert error(got, wanted) < 1e-5


def test_disabled_for_a_while() -> None:
    model = built()
    plain = forward(VLMS["llava"], model)
    with patchkit.apply(model, "var", **VAR) as patch:
        patched = forward(VLMS["llava"], model)
        patch.disable()
        assert torch.equal(forward(VLMS["llava"], model), plain)
        patch.enable()
        assert torch.equal(forward(VLMS["llava"], model), patched)


@torch.no_grad()
def test_compiled_whole() -> None:
    """The blocks inside the graph still show what enters them."""
    torch._dynamo.reset()
    entry = VLMS["llava"]
    model = entry.build()
    batch = entry.inputs(model)
    with patchkit.apply(model, "var", **VAR):
        wanted = model(**batch).logits
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    with patchkit.apply(compiled, "var", **VAR) as patch:
        got = compiled(**batch).logits
        assert not dense(patch)
        assert patch.report()["recipes"][0]["counts"]["calls edited"] == 4
    assert error(got, wanted) < 1e-5
    torch._dynamo.reset()


def test_compiled_decoding_with_a_static_cache() -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, batch = VLMS["llava"].build(), inputs()
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    with patchkit.apply(model, "var", **VAR) as patch:
        tokens, wanted = logits(model, batch)
        got, scores = logits(model, batch, cache_implementation="static", compile_config=compiling)
        assert not dense(patch)
    assert torch.equal(got, tokens)
    assert error(scores, wanted) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after"])
def test_spread_over_devices(when: str, tmp_path: Any) -> None:
    """accelerate's hooks on blocks, half of which lie on the disk."""
    from accelerate import dispatch_model

    entry = VLMS["llava"]
    model = entry.build()
    batch = entry.inputs(model)
    with patchkit.apply(model, "var", **VAR):
        wanted = forward(entry, model)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{n}": "cpu" for n in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    patch = patchkit.apply(model, "var", **VAR) if when == "before" else None
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    patch = patch or patchkit.apply(model, "var", **VAR)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)
    patch.remove()


def test_a_sliding_window_that_lets_the_picture_go() -> None:
    """Gemma 3's sliding layers keep 16 keys: from some step on the picture is behind them."""
    model, batch = built("gemma3vl"), inputs("gemma3vl")
    with Oracle(model, DIMS, range(4), **GATES):
        _, wanted = logits(model, batch, max_new_tokens=14, min_new_tokens=14)
    with patchkit.apply(model, "var", **VAR):
        _, got = logits(model, batch, max_new_tokens=14, min_new_tokens=14)
    assert error(got, wanted) < 1e-5


def test_planted_sinks_at_every_layer() -> None:
    """Spikes on the first token and on some patches stay sinks in all layers, in the prompt and while decoding."""
    model, batch = built(), inputs()
    ids = batch["input_ids"]
    image = image_mask(model, ids)
    where = (ids == 1) | (image & (image.cumsum(1) % 5 == 2))
    options = {"tau": 5.0, "rho": 0.3, "min_visual": 0.1, "recycle": 0.6}
    with Planted(model, where, 5):
        with Oracle(model, [5], [2], **options):
            _, wanted = logits(model, batch)
        with patchkit.apply(model, "var", sink_dims=[5], **options) as patch:
            _, got = logits(model, batch)
            (row,) = (r for r in patch.report()["recipes"][0]["rows"] if "visual_sinks" in r["values"])
    assert error(got, wanted) < 1e-5
    assert row["values"]["visual_sinks"] == (where & image).sum(1).tolist()
    assert row["values"]["text_sinks"] == [1, 1]
    assert sum(row["values"]["selected_rate"]) > 0
    assert len(decoder_layers(model)) == 4
