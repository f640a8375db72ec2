"""SoftPAG against explicit attention maps, and its weak pass against one that shares nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import patchkit
from patchkit import Conflict, InvalidOption, NothingMatched, PatchkitError, Recipe, recipe
from patchkit.blocks import Block
from patchkit.context import AttentionCall, DenoiseCall, Span
from patchkit.recipes.headhunter import SoftPAG, weak
from patchkit.recipes.headhunter.perturb import Form, blend, pushed

DENOISERS = [n for n in tiny.PIPELINES if n != "sana"]  # Sana's attention is linear: it has no map
TEXT = 5


def maps(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(B, H, N, N) logits with padding at -inf, and the values of every head; as the formula reads."""
    heads, scale = call.q.shape[1], call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    k, v = (x.double().repeat_interleave(heads // x.shape[1], dim=1) for x in (call.k, call.v))
    logits = call.q.double() @ k.transpose(-1, -2) * scale
    padding = call.key_padding()
    if padding is not None:
        logits = logits.masked_fill(~padding[:, None, None, :], float("-inf"))
    return logits, v


def explicit(call: AttentionCall, form: Form) -> Tensor:
    """The output of the pushed map, from the map itself."""
    logits, v = maps(call)
    n = logits.shape[-1]
    eye = torch.eye(n, dtype=torch.double)
    weights = logits.softmax(-1)
    if form.scope == "all":
        padding = call.key_padding()
        real = torch.ones(call.q.shape[0], n, dtype=torch.bool) if padding is None else padding.expand(len(call.q), n)
        share = real.double() / real.sum(-1, keepdim=True)
        if form.target == "identity":
            return eye @ v
        if form.target == "uniform":
            return share[:, None, None, :].expand_as(logits) @ v
        mean = (call.q.double() * share[:, None, :, None]).sum(2, keepdim=True)
        return explicit_row(call, mean).expand_as(v)
    text = torch.zeros(n, dtype=torch.bool)
    if call.text is not None:
        text[call.text.start : call.text.stop] = True
    among_images = ~text[:, None] & ~text[None, :]
    if form.scope == "image":
        pushed_map = logits.masked_fill(among_images & ~eye.bool(), float("-inf")).softmax(-1)
    else:
        mass = (weights * among_images).sum(-1, keepdim=True)
        pushed_map = weights.masked_fill(among_images, 0) + mass * eye * among_images
    return pushed_map @ v


def explicit_row(call: AttentionCall, q: Tensor) -> Tensor:
    logits, v = maps(call.replace(q=q.to(call.q.dtype)))
    return logits.softmax(-1) @ v


def make_call(kind: str, side: str, heads: int, kv_heads: int, padded: bool, dtype: torch.dtype) -> AttentionCall:
    g = torch.Generator().manual_seed(1)
    n = 18 if kind == "self" else 18 + TEXT
    q, k, v = (torch.randn(2, h, n, 16, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads))
    text = None if kind == "self" else Span(0, TEXT) if side == "first" else Span(n - TEXT, n)
    mask = None
    if padded:
        mask = torch.ones(2, 1, 1, n, dtype=torch.bool)
        mask[1, ..., text.stop - 2 : text.stop] = False
    site = SimpleNamespace(kind=kind, full_name="model.attn")
    return AttentionCall(q, k, v, mask, None, False, site, text=text)


FORMS = [Form("all", t) for t in ("identity", "uniform", "mean_query")] + [Form("image"), Form("image_renorm")]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.scope}-{f.target}")
@pytest.mark.parametrize(("kind", "side"), [("self", ""), ("joint", "first"), ("joint", "last")])
@pytest.mark.parametrize(("kv_heads", "padded"), [(4, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_closed_forms_are_the_explicit_maps(form, kind, side, kv_heads, padded, dtype) -> None:
    call = make_call(kind, side, 4, kv_heads, padded and kind == "joint", dtype)
    logits, v = maps(call)
    out = (logits.softmax(-1) @ v).to(dtype)
    gate = torch.tensor([[0.0, 0.3, 1.0, 0.7], [1.0, 0.0, 0.5, 0.2]])
    found = blend(out, pushed(call, out, form), gate).double()
    u = gate.double()[:, :, None, None]
    expected = (1 - u) * (logits.softmax(-1) @ v) + u * explicit(call, form)
    assert (found - expected).norm() / expected.norm() < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert torch.equal(found[0, 0], out[0, 0].double()), "a head at 0 is the op's own, bit for bit"
    if form.scope == "all" and form.target == "identity":
        assert torch.equal(found[0, 2], v[0, 2]), "a head at 1 is the value, bit for bit"
    if form.scope != "all" and call.text is not None:
        rows = slice(call.text.start, call.text.stop)
        assert torch.equal(found[:, :, rows], out[:, :, rows].double()), "text rows are left alone"


def test_linear_in_the_strength() -> None:
    call = make_call("joint", "last", 4, 4, False, torch.float32)
    logits, v = maps(call)
    out = (logits.softmax(-1) @ v).float()
    full = pushed(call, out, Form())
    for u in (0.25, 0.5, 0.8):
        moved = blend(out, full, torch.full((1, 4), u)) - out
        torch.testing.assert_close(moved, u * (call.v - out), atol=2e-6, rtol=1e-5)


def test_what_has_no_such_map_is_refused() -> None:
    call = make_call("joint", "last", 4, 4, False, torch.float32)
    with pytest.raises(PatchkitError, match="attention to something else"):
        pushed(call.replace(k=call.k[:, :, 1:]), None, Form())
    n = call.q.shape[2]
    with pytest.raises(PatchkitError, match="says more than which tokens are padding"):
        pushed(call.replace(mask=torch.ones(n, n, dtype=torch.bool).tril()[None, None]), None, Form())
    with pytest.raises(PatchkitError, match="which tokens are text"):
        pushed(call.replace(text=None), call.v, Form("image"))


# --- whole models


@recipe("toy-explicit-push")
@dataclass(frozen=True, kw_only=True)
class Explicit(Recipe):
    """The perturbed model in every pass, from explicit maps."""

    pairs: list[tuple[int, int]]
    u: float = 0.5
    scope: str = "all"
    kinds = ("self", "joint")

    def accepts(self, site: Any) -> str | None:
        return "second attention" if site.order else None

    def attend(self, call: AttentionCall, next: Callable[[AttentionCall], Tensor]) -> Tensor:
        heads = [h for layer, h in self.pairs if layer == call.site.layer]
        out = next(call)
        if not heads:
            return out
        logits, v = maps(call)
        out = out.clone()
        full = (1 - self.u) * (logits.softmax(-1) @ v) + self.u * explicit(call, Form(self.scope))
        out[:, heads] = full[:, heads].to(out.dtype)
        return out


@recipe("toy-predictions")
@dataclass(frozen=True, kw_only=True)
class Predictions(Recipe):
    """Remembers what the denoiser was given and what it, with the recipes inside, returned."""

    before = ("softpag",)

    def validate(self) -> None:
        object.__setattr__(self, "found", [])

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Any]) -> Any:
        out = next(call)
        self.found.append((call, out))
        return out


def sample(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


@pytest.mark.parametrize("scope", ["all", "image"])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_pass_moves_by_the_guidance(name: str, scope: str) -> None:
    """w (eps_cond - eps_weak) is added to each pass, eps_weak being the model with explicit maps."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    pairs, u, w = [(1, 0), (1, 1)], 0.6, 2.5
    plain = Predictions()
    with patchkit.apply(pipe, plain):
        tiny.run(entry, pipe, steps=2)
    guided = Predictions()
    with patchkit.apply(pipe, [guided, SoftPAG(heads=pairs, strength=u, scale=w, scope=scope)]):
        tiny.run(entry, pipe, steps=2)
    perturbed = Predictions()
    with patchkit.apply(pipe, [perturbed, Explicit(pairs=pairs, u=u, scope=scope)]):
        tiny.run(entry, pipe, steps=2)
    # before the first step ends all runs have the same latents
    calls = [c for c in zip(plain.found, guided.found, perturbed.found, strict=True) if c[0][0].step == 0]
    cond = [c for c in calls if c[0][0].branch != "uncond"]
    (call, base), _, (_, faint) = cond[0]
    half = slice(sample(base).shape[0] // 2, None) if call.branch == "batched" else slice(None)
    delta = w * (sample(base) - sample(faint))[half]
    assert delta.abs().max() > 0
    for (call, base), (_, moved), _ in calls:
        twice = torch.cat([delta, delta]) if call.branch == "batched" else delta
        expected = sample(base) + twice
        error = (sample(moved) - expected).norm() / expected.norm()
        assert error < 2e-5, (call.branch, float(error))


def count_blocks(pipe: Any, component: str) -> tuple[list[int], Callable[[], None]]:
    """How often each block's forward runs."""
    from patchkit.adapters import adapter_for
    from patchkit.blocks import blocks_of

    adapter = adapter_for(pipe)
    found = [b for b in blocks_of(adapter, adapter.sites()) if b.component == component]
    counts = [0] * len(found)
    handles = []
    for i, block in enumerate(found):

        def note(*_: Any, i: int = i) -> None:
            counts[i] += 1

        handles.append(block.module.register_forward_hook(note))
    return counts, lambda: [h.remove() for h in handles] and None


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan21", "sd15"])
def test_the_shared_prefix_is_bit_equal_and_saves_its_blocks(name: str, first: int, monkeypatch) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build() if name == "sd15" else entry.build(4 if name != "flux" else 2)
    component = entry.denoisers[0]
    counts, done = count_blocks(pipe, component)
    if first >= len(counts):
        pytest.skip("fewer blocks")
    softpag = SoftPAG(heads=[(first, 0), (len(counts) - 1, 1)], strength=0.5)
    extra = {"guidance_scale": 1.0} if "guidance_scale" in entry.call or name != "flux" else {}

    def run() -> Tensor:
        counts[:] = [0] * len(counts)
        return tiny.run(entry, pipe, steps=2, **extra)

    with patchkit.apply(pipe, softpag):
        shared = run()
    assert counts == [2] * first + [4] * (len(counts) - first)
    monkeypatch.setattr(Block, "must_run", property(lambda self: "a test says so"))
    monkeypatch.setattr(weak, "_keep", lambda *_: None)
    with patchkit.apply(pipe, softpag):
        whole = run()
    assert counts == [4] * len(counts)
    assert torch.equal(shared, whole)
    done()


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"scale": 0.0}, {"heads": []}], ids=str)
def test_no_guidance_makes_no_second_pass(options: dict[str, Any]) -> None:
    entry = tiny.PIPELINES["sd3"]
    pipe = entry.build()
    counts, done = count_blocks(pipe, "transformer")
    plain = tiny.run(entry, pipe)
    before = list(counts)
    with patchkit.apply(pipe, SoftPAG(**({"heads": [(0, 0)]} | options))):
        assert torch.equal(tiny.run(entry, pipe), plain)
    assert counts == [2 * n for n in before]
    done()


def test_whole_layers_at_full_strength_need_no_attention() -> None:
    entry = tiny.PIPELINES["flux"]
    pipe = entry.build(2)
    with patchkit.apply(pipe, SoftPAG(heads=[(0, 0), (0, 1), (2, 0), (2, 1)], strength=1.0)) as patch:
        heads = {site.heads for site in patch._bounds[0].sites}
        tiny.run(entry, pipe, steps=2)
        counts = patch.report()["recipes"][0]["counts"]
    assert heads == {2}
    assert counts["ops without attention"] == 2, "one a step: that of layer 2; layer 0 shares its op"


def test_bad_heads_and_other_guidance_are_refused() -> None:
    entry = tiny.PIPELINES["sd3"]
    pipe = entry.build(2)
    for heads in ([(0, 99)], [(0, 0), (2, 0)]):
        with pytest.raises(InvalidOption, match="there is no head"):
            patchkit.apply(pipe, SoftPAG(heads=heads))
    with pytest.raises(NothingMatched, match="none of the heads is in this layer"):
        patchkit.apply(pipe, SoftPAG(heads=[(2, 0)]))
    with pytest.raises(InvalidOption, match="mean_query"):
        SoftPAG(heads=[(0, 0)], target="mean_query", scope="image")
    with pytest.raises(InvalidOption, match="layers are part of the heads"):
        SoftPAG(heads=[(0, 0)], layers="0")
    with (
        patchkit.apply(pipe, SoftPAG(heads=[(0, 0)])),
        pytest.raises(Conflict, match="skip_guidance_layers"),
    ):
        tiny.run(entry, pipe, steps=4, skip_guidance_layers=[0], skip_layer_guidance_stop=1.0)


def test_removal_is_exact() -> None:
    from fingerprint import assert_same, fingerprint

    entry = tiny.PIPELINES["flux"]
    pipe = entry.build()
    plain, before = tiny.run(entry, pipe), fingerprint(pipe)
    with patchkit.apply(pipe, "softpag", heads=[(1, 0)], strength=1.0):
        assert not torch.equal(tiny.run(entry, pipe), plain)
    assert torch.equal(tiny.run(entry, pipe), plain)
    assert_same(before, fingerprint(pipe))
