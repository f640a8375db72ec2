"""Compiled models: the numbers of the eager patched ones, one graph for each block class, in any order of doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from mechanism.toys import Counter, Scale, Twice, Watch

import patchkit

WAYS = ("in place", "wrapped", "blocks", "regional")


@contextmanager
def graphs() -> Iterator[list[Any]]:
    """Collects each graph that is compiled inside, through the backend of :func:`compiled`."""
    found: list[Any] = []
    COLLECTORS.append(found)
    try:
        yield found
    finally:
        COLLECTORS.remove(found)


COLLECTORS: list[list[Any]] = []


def backend(graph: Any, inputs: Any) -> Any:
    for found in COLLECTORS:
        found.append(graph)
    return graph.forward


def compile_it(way: str, model: Any, put: Callable[[Any], None]) -> None:
    options: dict[str, Any] = {"backend": backend, "fullgraph": True}
    if way == "in place":
        model.compile(**options)
    elif way == "wrapped":
        put(torch.compile(model, **options))
    elif way == "regional":
        model.compile_repeated_blocks(**options)
    else:
        blocks = model.model.layers if hasattr(model, "model") else model.blocks
        for block in blocks:
            block.compile(**options)


def prepared(name: str, layers: int) -> tuple[Any, Any, Callable[..., Any], Callable[[Any], None], Any]:
    """Entry, target, a run of it, how to put a wrapper in the model's place, and the model."""
    if name in tiny.MODELS:
        entry: Any = tiny.MODELS[name]
        holder = [entry.build(layers=layers)]
        return entry, holder, lambda: tiny.forward(entry, holder[0]), lambda m: holder.__setitem__(0, m), holder[0]
    entry = tiny.PIPELINES[name]
    pipe = entry.build(layers=layers)
    denoiser = entry.denoisers[0]
    return entry, pipe, lambda: tiny.run(entry, pipe), lambda m: setattr(pipe, denoiser, m), getattr(pipe, denoiser)


def target_of(thing: Any) -> Any:
    return thing[0] if isinstance(thing, list) else thing


@pytest.mark.parametrize(
    ("name", "way", "first"),
    [
        ("wan21", "wrapped", "patched"),
        ("wan21", "wrapped", "compiled"),
        ("mochi", "in place", "compiled"),
        ("llama", "wrapped", "patched"),
        ("llama", "wrapped", "compiled"),
        ("gemma3", "in place", "patched"),
    ],
)
def test_compiled_is_eager(name: str, way: str, first: str) -> None:
    """A recipe that changes numbers in layer 1 only: equal when compiled, with steps, branches and call counts."""
    _, holder, run, put, model = prepared(name, 2)
    plain = run()
    watch = Watch()
    recipes = [Scale(layers="1"), watch]
    with patchkit.apply(target_of(holder), recipes):
        eager = run()
        seen = list(watch.seen)
    assert not torch.equal(eager, plain)
    if first == "compiled":
        compile_it(way, model, put)
    patch = patchkit.apply(target_of(holder), recipes)
    if first == "patched":
        compile_it(way, model, put)
        if name == "llama" and way == "wrapped":
            check_blind(patch, run, eager)
            return
    watch.seen.clear()
    torch.testing.assert_close(run(), eager, atol=1e-5, rtol=1e-5)
    assert [s[:4] + s[9:] for s in watch.seen] == [s[:4] + s[9:] for s in seen]
    assert patch.report()["drift"] == []
    patch.remove()
    torch.testing.assert_close(run(), plain, atol=1e-5, rtol=1e-5)


def check_blind(patch: patchkit.Patch, run: Callable[[], torch.Tensor], eager: torch.Tensor) -> None:
    """``torch.compile`` around a bare patched model: nobody can see its calls, which is said."""
    torch.testing.assert_close(run(), eager, atol=1e-5, rtol=1e-5)
    (line,) = patch.report()["drift"]
    assert "step, branch and grid were unknown" in line
    patch.remove()


def calls_of(name: str) -> tuple[Any, list[tuple[Any, dict[str, Any]]]]:
    """A bare denoiser, and the calls of a short run of its pipeline."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    model = getattr(pipe, entry.denoisers[0])
    calls: list[tuple[Any, dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    tiny.run(entry, pipe)
    handle.remove()
    return model, calls


def replay(model: Any, calls: list[tuple[Any, dict[str, Any]]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(*args, **kwargs)[0] for args, kwargs in calls])


@pytest.mark.parametrize("way", ["wrapped", "in place"])
@pytest.mark.parametrize("name", ["wan21", "sd15", "flux", "cogvideox"])
def test_a_bare_denoiser_compiled_after_patching(name: str, way: str) -> None:
    """Nobody sees the wrapper, but attention knows step, branch and grid as if nothing were compiled."""
    model, calls = calls_of(name)
    plain = replay(model, calls)
    watch = Watch()
    patch = patchkit.apply(model, [Scale(layers="1-"), watch])
    eager, seen = replay(model, calls), list(watch.seen)
    assert {s.step for s in seen} == {0, 1}
    assert any(s.grid for s in seen)
    watch.seen.clear()
    held = [model]
    compile_it(way, model, lambda m: held.__setitem__(0, m))
    with graphs() as found:
        torch.testing.assert_close(replay(held[0], calls), eager, atol=1e-5, rtol=1e-5)
    assert len(found) == 1
    assert watch.seen == seen
    drift = patch.report()["drift"]
    assert bool(drift) == (way == "wrapped")  # of the recipes here, one asks to stand around the call
    assert all("toy-watch could not stand around the model's calls" in line for line in drift)
    patch.remove()
    torch.testing.assert_close(replay(held[0], calls), plain, atol=1e-5, rtol=1e-5)


def test_adaspa_on_a_bare_denoiser_compiled_after_patching() -> None:
    model, calls = calls_of("wan21")
    options = {"density": 0.25, "min_tokens": 0, "block_size": 4, "warmup_steps": 1, "search_steps": []}
    with patchkit.apply(model, "adaspa", **options) as patch:
        eager, counts = replay(model, calls[::2]), patch.report()["recipes"][0]["counts"]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(replay(compiled, calls[::2]), eager, atol=1e-5, rtol=1e-5)
        assert patch.report()["recipes"][0]["counts"] == counts
        assert counts["sparse"] > 0
        assert patch.report()["drift"] == []


def test_gradients_pass_the_op_that_hears_calls() -> None:
    model, calls = calls_of("wan21")
    (args, kwargs), *_ = calls
    latents = kwargs["hidden_states"].clone().requires_grad_()

    def gradient(called: Any) -> torch.Tensor:
        out = called(*args, **{**kwargs, "hidden_states": latents})[0]
        return torch.autograd.grad(out.sum(), latents)[0]

    plain = gradient(model)
    with patchkit.apply(model, Twice()):  # around the call, so nothing else is in the graph
        torch.testing.assert_close(gradient(torch.compile(model, backend="aot_eager", fullgraph=True)), plain)


@pytest.mark.parametrize(
    ("name", "way", "classes"),
    # Flux has two classes of blocks, and the second is compiled again for another stride: unpatched just the same
    [("wan21", "blocks", 1), ("wan21", "regional", 1), ("flux", "regional", 3), ("llama", "blocks", 1)],
)
def test_one_graph_for_each_class_of_blocks(name: str, way: str, classes: int) -> None:
    """With states and steps that differ for each of nine blocks (more than the compiler's limit of eight)."""
    entry, holder, run, put, model = prepared(name, 9)
    if name == "llama":  # with a cache, upstream compiles each layer by itself and gives up after eight

        def run() -> torch.Tensor:
            return tiny.forward(entry, model, use_cache=False)

    counter = Counter()
    patch = patchkit.apply(target_of(holder), [counter, Scale(layers="1")])
    eager = run()
    plainly = list(counter.counts)
    counter.counts.clear()
    compile_it(way, model, put)
    with graphs() as found:
        torch.testing.assert_close(run(), eager, atol=1e-5, rtol=1e-5)
    assert len(found) == classes
    assert counter.counts == plainly
    patch.remove()


def test_compile_after_compile_and_removal_and_again() -> None:
    entry = tiny.PIPELINES["wan21"]
    pipe = entry.build()
    plain = tiny.run(entry, pipe)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    results = []
    for recipe in (Scale(), Scale(factor=1.0), Scale()):
        with patchkit.apply(pipe, recipe):
            results.append(tiny.run(entry, pipe))
    torch.testing.assert_close(results[0], results[2], atol=0, rtol=0)
    torch.testing.assert_close(results[1], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.run(entry, pipe), plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], plain, atol=1e-5)


def test_the_opaque_op() -> None:
    """Against torch's own checks of custom ops: schema, fake tensors, aliasing."""
    from patchkit.op import attend
    from patchkit.sites import Site

    site = Site("model", "a", torch.nn.Identity(), "self", 0, 2)
    site.terminal = lambda call: torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    q, k, v = torch.randn(3, 1, 2, 8, 4).unbind(0)
    args = (q, k, v[..., :3], None, site.tensor, 0, None, False, False, 0.0, None, None)
    torch.library.opcheck(attend, args, test_utils=("test_schema", "test_faketensor"))
    assert attend(*args).shape == (1, 8, 2, 3)
    site.terminal = lambda call: call.q
    out = attend(q, k, v, *args[3:])
    assert out.data_ptr() != q.data_ptr()
    assert torch.equal(out, q.transpose(1, 2))
