"""The tiny models themselves: that they build, run, repeat to the bit, and are what ``tiny/facts.py`` says they are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import tiny
import torch

PIPELINES = pytest.mark.parametrize("name", tiny.PIPELINES)
MODELS = pytest.mark.parametrize("name", tiny.MODELS)
STACKED = {"self", "cross", "joint", "linear"}


def denoisers(entry: tiny.TinyPipeline, pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in entry.denoisers}


def capture(entry: tiny.TinyPipeline, pipe: Any, **extra: Any) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Run, and return (component, args, kwargs) of every call of a denoiser."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, args, kwargs)), with_kwargs=True
        )
        for name, model in denoisers(entry, pipe).items()
    ]
    try:
        tiny.run(entry, pipe, **extra)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@PIPELINES
def test_pipeline_repeats_to_the_bit(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    latents = tiny.run(entry, pipe, seed=3)
    assert latents.isfinite().all()
    assert torch.equal(latents, tiny.run(entry, pipe, seed=3)), "a second run differs"
    assert torch.equal(latents, tiny.run(entry, entry.build(), seed=3)), "a second build differs"
    assert not torch.equal(latents, tiny.run(entry, pipe, seed=4))


@PIPELINES
def test_pipeline_answers_to_its_arguments(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    latents = tiny.run(entry, pipe)
    assert not torch.equal(latents, tiny.run(entry, pipe, prompt="two cats")), "the prompt has no effect"
    assert not torch.equal(latents, tiny.run(entry, pipe, steps=3))
    for variant in sorted(set(entry.variants) & {"no_cfg", "true_cfg"}):
        assert not torch.equal(latents, tiny.run(entry, pipe, variant=variant)), variant
    if entry.expected.cfg != "one_call":
        other = tiny.run(entry, pipe, negative_prompt="a longer one")
        assert not torch.equal(latents, other), "the negative prompt has no effect"
    assert len(tiny.run(entry, pipe, variant="batch")) == 2
    assert tiny.run(entry, pipe, width=2 * entry.call["width"]).numel() == 2 * latents.numel()
    if entry.video:
        assert tiny.run(entry, pipe, num_frames=1).numel() < latents.numel()


@PIPELINES
def test_pipeline_decodes(name: str) -> None:
    entry = tiny.PIPELINES[name]
    pixels = tiny.run(entry, entry.build(), variant="decode")
    frames = (entry.call["num_frames"],) if entry.video else ()
    assert tuple(pixels.shape) == (1, *frames, 3, entry.call["height"], entry.call["width"])
    assert pixels.min() >= 0
    assert pixels.max() <= 1


@PIPELINES
def test_building_leaves_the_random_state(name: str) -> None:
    state = torch.get_rng_state()
    tiny.PIPELINES[name].build()
    assert torch.equal(state, torch.get_rng_state())


@MODELS
def test_model_repeats_to_the_bit(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    output = tiny.forward(entry, model)
    assert output.isfinite().all()
    assert torch.equal(output, tiny.forward(entry, entry.build()))
    if entry.causal:
        tokens = tiny.generate(entry, model, new_tokens=4)
        assert tokens.shape[1] == entry.inputs(model)["input_ids"].shape[1] + 4
        assert torch.equal(tokens, tiny.generate(entry, model, new_tokens=4))
    else:
        with pytest.raises(ValueError, match="does not generate"):
            tiny.generate(entry, model)


@MODELS
def test_model_output_depends_on_the_mask(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    mask = entry.inputs(model).get("attention_mask")
    if mask is None:
        pytest.skip("takes no mask")
    masked, unmasked = tiny.forward(entry, model), tiny.forward(entry, model, attention_mask=torch.ones_like(mask))
    assert (masked - unmasked)[mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sliding_window_is_shorter_than_the_batch(name: str) -> None:
    entry = tiny.MODELS[name]
    model = entry.build()
    with tiny.record({"model": model}) as ops:
        tiny.forward(entry, model)
    for op, window in zip(ops, entry.expected.windows, strict=True):
        assert op.mask is not None
        assert op.mask[0].sum(-1).max() == (window or op.q[2])


# --- facts.py against a recording of upstream's own attention calls ---


def expected_ops(facts: tiny.Facts, branch: int | None) -> list[tuple[Any, ...]]:
    """(site, route, mask kind, q shape, k length) of one denoiser call; ``branch`` None is the batch of both."""
    text = facts.text[branch or 0]
    batch = 2 if branch is None else 1
    rows = []
    for site in facts.sites:
        tokens = site.grid[0] * site.grid[1] * site.grid[2] if site.grid else 0
        queries = {"joint": tokens + text, "refiner": text}.get(site.kind, tokens)
        keys = text if site.kind == "cross" else queries
        row = (site.name, site.route, site.mask, (batch, site.heads, queries, site.head_dim), keys)
        if site.ops == 1:
            rows.append(row)
        elif site.ops == 2:  # Mochi: one op a batch element, [uncond; cond]
            for words in reversed(facts.words):
                rows.append((*row[:3], (1, site.heads, tokens + words, site.head_dim), tokens + words))
    return rows


@PIPELINES
def test_sites_are_as_recorded(name: str) -> None:
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    with tiny.record(denoisers(entry, pipe)) as ops:
        tiny.run(entry, pipe)
    branches = {"batched": (None,), "two_calls": (0, 1), "one_call": (0,)}[facts.cfg]
    others = [site for site, calls in facts.others for _ in range(calls)]
    calls = [list(group) for _, group in itertools.groupby(ops, key=lambda op: (op.component, op.call))]
    assert [group[0].component for group in calls] == [c for c in facts.denoiser_of_step for _ in branches]
    for group, branch in zip(calls, branches * 2, strict=True):
        known = [op for op in group if op.site not in others]
        assert [(op.site, op.route, op.mask_kind, op.q, op.k[2]) for op in known] == expected_ops(facts, branch)
        assert [op.site for op in group if op.site in others] == others
        assert not any(op.causal for op in group)
    layers = [site.layer for site in facts.sites if site.kind in STACKED]
    assert sorted(set(layers)) == list(range(max(layers) + 1))
    assert layers == sorted(layers), "sites of a block stand together, in order"


@PIPELINES
def test_text_padding_is_as_recorded(name: str) -> None:
    """Count the keys that a mask leaves visible, per branch."""
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    with tiny.record(denoisers(entry, pipe)) as ops:
        tiny.run(entry, pipe)
    seen = {site.name: site for site in facts.sites if site.mask in ("additive", "bool_key")}
    for op in ops:
        if op.site not in seen:
            continue
        visible = op.mask if op.mask.dtype == torch.bool else op.mask == 0
        site = seen[op.site]
        extra = op.q[2] - facts.text[0] if site.kind == "joint" else 0
        counts = visible[:, 0, 0].sum(-1).tolist()
        assert counts == [extra + words for words in (reversed(facts.words) if len(counts) == 2 else facts.words[:1])]
        assert all(row[: int(count)].all() for row, count in zip(visible[:, 0, 0], counts, strict=True)), (
            "the padding stands at the end"
        )


@PIPELINES
def test_branches_come_in_the_stated_order(name: str) -> None:
    """The prompt's own embedding, taken from the run with the other kind of guidance, shows which branch is which."""
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    (variant,) = facts.cfg_of
    both, plain = (variant, None) if facts.cfg == "one_call" else (None, variant)
    style = facts.cfg_of[variant] if both else facts.cfg
    embedding = capture(entry, pipe, variant=plain)[0][2]["encoder_hidden_states"]
    guided = capture(entry, pipe, variant=both)
    if style == "batched":
        first, second = guided[0][2]["encoder_hidden_states"].chunk(2)
        first, second = second, first
    else:
        first, second = (guided[call][2]["encoder_hidden_states"] for call in (0, 1))
    assert torch.allclose(first, embedding, atol=1e-5)
    assert second.shape != embedding.shape or not torch.allclose(second, embedding, atol=1e-3)


@PIPELINES
def test_signals_are_as_stated(name: str) -> None:
    """Names given to ``cache_context``, the denoiser's timestep, the scheduler's ``step_index``."""
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    names: list[str] = []

    def listen(model: Any) -> None:
        original = model.cache_context

        def cache_context(label: str, **kwargs: Any) -> Any:
            names.append(label)
            return original(label, **kwargs)

        model.cache_context = cache_context

    for model in denoisers(entry, pipe).values():
        assert hasattr(model, "cache_context") == bool(facts.contexts)
        if facts.contexts:
            listen(model)
    calls = capture(entry, pipe)
    assert tuple(names) == facts.contexts * 2
    for variant, expected in facts.contexts_of.items():
        names.clear()
        tiny.run(entry, pipe, variant=variant)
        assert tuple(names) == expected * 2
    assert hasattr(pipe.scheduler, "step_index") == facts.step_index
    told = [kwargs["timestep"] if "timestep" in kwargs else args[1] for _, args, kwargs in calls]
    divisor = {"t": 1, "t/1000": 1000}[facts.timestep]
    wanted = pipe.scheduler.timesteps.repeat_interleave(len(calls) // 2) / divisor
    assert torch.allclose(torch.stack([t.flatten()[0] for t in told]).double(), wanted.double())


def first_queries(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[tuple[str, torch.Tensor]]:
    """Queries at every site with attention silenced, so that a token's query depends on that token alone."""
    with tiny.record({"denoiser": model}, answer=lambda q, k, v: torch.zeros_like(q)) as ops, torch.no_grad():
        model(*args, **kwargs)
    return [(op.site, op.query) for op in ops]


def touched(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Token rows that differ."""
    return (before != after).any(dim=(0, 1, 3)).nonzero().flatten().tolist()


@PIPELINES
def test_text_stands_where_stated(name: str) -> None:
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    component, args, kwargs = capture(entry, pipe)[0]
    model = getattr(pipe, component)
    text = kwargs["encoder_hidden_states"]
    changed = {**kwargs, "encoder_hidden_states": text + torch.randn(text.shape)}
    sites = {site.name: site for site in facts.sites}
    before, after = first_queries(model, args, kwargs), first_queries(model, args, changed)
    for (site, old), (_, new) in zip(before, after, strict=True):
        if site not in sites or sites[site].kind == "refiner":
            continue
        tokens = sites[site].grid[0] * sites[site].grid[1] * sites[site].grid[2]
        length = old.shape[2]
        where = {"none": [], "first": range(length - tokens), "last": range(tokens, length)}[sites[site].text]
        assert touched(old, new) == list(where), site


@pytest.mark.parametrize(
    "name", [name for name in tiny.PIPELINES if name not in ("sd15", "sdxl", "sana")]
)  # those three mix neighbours by convolution
def test_grid_is_row_major(name: str) -> None:
    """Disturb one place of the latents: the row that changes is frame * h * w + row * w + column."""
    entry = tiny.PIPELINES[name]
    facts, pipe = entry.expected, entry.build()
    component, args, kwargs = capture(entry, pipe)[0]
    model, (frames, height, width) = getattr(pipe, component), facts.sites[-1].grid
    place = (frames - 1, height - 2, width - 1)
    row = (place[0] * height + place[1]) * width + place[2]
    latents = (args[0] if args else kwargs["hidden_states"]).clone()
    if latents.ndim == 3:  # packed
        latents[:, row] += 1
    elif name.startswith("cogvideox"):  # (B, F, C, h, w)
        latents[:, place[0], :, place[1] * 2, place[2] * 2] += 1
    elif latents.ndim == 5:  # (B, C, F, h, w)
        latents[:, :, place[0], place[1] * 2, place[2] * 2] += 1
    else:
        latents[:, :, place[1] * 2, place[2] * 2] += 1
    changed = ((latents, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": latents})
    sites = {site.name: site for site in facts.sites}
    before, after = first_queries(model, args, kwargs), first_queries(model, *changed)
    for (site, old), (_, new) in zip(before, after, strict=True):
        if site in sites and sites[site].kind != "refiner":
            text = old.shape[2] - frames * height * width if sites[site].text == "first" else 0
            assert touched(old, new) == [text + row], site


@MODELS
def test_model_sites_are_as_recorded(name: str) -> None:
    entry = tiny.MODELS[name]
    facts, model = entry.expected, entry.build()
    with tiny.record({"model": model}) as ops:
        tiny.forward(entry, model)
    stated = [(site.name, site.mask, site.heads, site.head_dim) for site in facts.sites for _ in range(site.ops)]
    assert [(op.site, op.mask_kind, op.q[1], op.q[3]) for op in ops] == stated
    text = getattr(model.config, "text_config", model.config)
    assert getattr(text, "num_key_value_heads", text.num_attention_heads) == facts.kv_heads
