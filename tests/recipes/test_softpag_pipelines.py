"""SoftPAG on whole pipelines: guidance of every kind, residuals, adapters, caches, backends, other recipes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from softpag_tools import Inside, Naive, Residuals, close, generator, nothing_shared, steered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import patchkit
from patchkit import Conflict, PatchkitError
from patchkit.context import DenoiseCall
from patchkit.recipes.headhunter import SoftPAG
from patchkit.recipes.headhunter.perturb import Form, blend, pushed

PAIRS, U, W = [(1, 0), (1, 1)], 0.6, 2.5

# (pipeline, its variant, arguments): guidance in one batch, in two calls, embedded, none; several prompts
GUIDANCE = {
    "batched": ("sd3", None, {}),
    "batched, two prompts": ("sd3", "batch", {}),
    "batched, op per sample": ("mochi", "batch", {}),
    "unet": ("sd15", None, {}),
    "none": ("sd3", "no_cfg", {}),
    "none, unet": ("sd15", "no_cfg", {}),
    "embedded": ("flux", None, {}),
    "true cfg": ("flux", "true_cfg", {}),
    "true cfg, masked": ("hunyuan", "true_cfg", {}),
    "two calls": ("wan21", None, {}),
}
SCALES = {"true cfg": "true_cfg_scale", "true cfg, masked": "true_cfg_scale"}


@pytest.mark.parametrize("case", GUIDANCE)
def test_the_scheduler_gets_the_same_shift_at_every_guidance_scale(case: str) -> None:
    """eps_u + s (eps_c - eps_u) + w (eps_c - eps_weak): the last term knows nothing of s."""
    name, variant, extra = GUIDANCE[case]
    entry = tiny.PIPELINES[name]
    scales = [1.0] if case.startswith("none") else [2.0, 7.5]
    shifts = []
    for scale in scales:
        given: dict[str, list[Tensor]] = {}
        naive = Naive(pairs=PAIRS, u=U)
        for label, recipes in (("plain", [naive]), ("guided", [SoftPAG(heads=PAIRS, strength=U, scale=W)])):
            pipe = entry.build()
            with patchkit.apply(pipe, recipes):
                given[label] = steered(pipe)
                arguments = {SCALES.get(case, "guidance_scale"): scale, **extra}
                tiny.run(entry, pipe, variant=variant, steps=2, **arguments)
        shifts.append(given["guided"][0] - given["plain"][0])
        _, cond, faint = naive.found[0]
        expected = W * (cond - faint)
        assert expected.abs().max() > 1e-4
        close(shifts[-1], expected, 2e-4)
    if case != "embedded":  # there the scale changes eps_c itself
        close(shifts[0], shifts[-1], 2e-4)


def weak_ones(pipe: Any, entry: Any, recipe: SoftPAG, outside: tuple[Any, ...] = (), **call: Any) -> list[Tensor]:
    inside = Inside()
    with patchkit.apply(pipe, [*outside, recipe, inside]):
        tiny.run(entry, pipe, **call)
    return inside.weak()


# --- what else reaches the blocks


def flux_residuals(call: DenoiseCall) -> dict[str, Any]:
    hidden = call.kwargs["hidden_states"]
    shape = (hidden.shape[0], hidden.shape[1], call.module.inner_dim)
    return {
        "controlnet_block_samples": [torch.randn(shape, generator=generator(i)) for i in range(2)],
        "controlnet_single_block_samples": [torch.randn(shape, generator=generator(9 + i)) for i in range(2)],
    }


def sd3_residuals(call: DenoiseCall) -> dict[str, Any]:
    hidden = call.kwargs["hidden_states"]
    tokens = hidden.shape[-1] * hidden.shape[-2] // 4
    shape = (hidden.shape[0], tokens, call.module.inner_dim)
    return {"block_controlnet_hidden_states": [torch.randn(shape, generator=generator(i)) for i in range(4)]}


def unet_residuals(call: DenoiseCall) -> dict[str, Any]:
    shapes: list[tuple[int, ...]] = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: shapes.extend(x.shape for x in out[1]))
        for block in call.module.down_blocks
    ]
    first = call.module.conv_in.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    middle: list[tuple[int, ...]] = []
    mid = call.module.mid_block.register_forward_hook(lambda m, a, out: middle.append(out.shape))
    type(call.module).forward(call.module, *call.args, **call.kwargs)
    for hook in (*hooks, first, mid):
        hook.remove()
    return {
        "down_block_additional_residuals": [torch.randn(s, generator=generator(i)) for i, s in enumerate(shapes)],
        "mid_block_additional_residual": torch.randn(middle[0], generator=generator(99)),
    }


@pytest.mark.parametrize(("name", "make"), [("flux", flux_residuals), ("sd3", sd3_residuals), ("sd15", unet_residuals)])
def test_controlnet_residuals_reach_a_weak_pass_that_shares_its_prefix(name: str, make: Any, monkeypatch) -> None:
    entry = tiny.PIPELINES[name]
    pipe = entry.build(4) if name == "sd3" else entry.build()
    recipe = SoftPAG(heads=[(2, 0)], strength=U)
    for call in ({"guidance_scale": 1.0}, {"guidance_scale": 5.0}):
        shared = weak_ones(pipe, entry, recipe, (Residuals(make=make),), **call)
        with nothing_shared(monkeypatch):
            whole = weak_ones(pipe, entry, recipe, (Residuals(make=make),), **call)
        for a, b in zip(shared, whole, strict=True):
            close(a, b)
            # with both guidance halves in one batch, the prefix ran with another batch size than the weak pass has
            assert torch.equal(a, b) or (call["guidance_scale"] > 1 and name != "flux")
        assert not torch.equal(shared[0], weak_ones(pipe, entry, recipe, **call)[0]), "the residuals do something"


def sd15_ip_adapter(pipe: Any) -> dict[str, Any]:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(3)
    projection = ImageProjection(cross_attention_dim=32, image_embed_dim=16, num_image_text_embeds=4)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.config["encoder_hid_dim_type"] = "ip_image_proj"
    for name, part in pipe.unet.named_modules():
        if name.endswith("attn2"):
            size = part.to_k.out_features
            part.processor = IPAdapterAttnProcessor2_0(size, part.to_k.in_features, num_tokens=(4,))
    return {"ip_adapter_image_embeds": [torch.randn(1, 1, 16, generator=generator(1))], "guidance_scale": 1.0}


def flux_ip_adapter(pipe: Any) -> dict[str, Any]:
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(3)
    model = pipe.transformer
    projection = ImageProjection(cross_attention_dim=32, image_embed_dim=16, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    for block in model.transformer_blocks:
        block.attn.processor = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,), scale=1.0)
    embeds = [torch.randn(1, 1, 16, generator=generator(1))]
    return {"ip_adapter_image_embeds": embeds, "negative_ip_adapter_image_embeds": embeds}


@pytest.mark.parametrize(("name", "attach"), [("sd15", sd15_ip_adapter), ("flux", flux_ip_adapter)])
def test_an_ip_adapter_is_left_alone(name: str, attach: Any, monkeypatch) -> None:
    """The main attention alone is perturbed, and sharing the prefix changes no bit."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build()
    extra = attach(pipe)
    # the head of a block whose attention carries the adapter, and one behind it
    recipe = SoftPAG(heads=[(1, 0), (2, 1)], strength=U, scale=1e-20)
    shared = weak_ones(pipe, entry, recipe, **extra)
    with nothing_shared(monkeypatch):
        whole = weak_ones(pipe, entry, recipe, **extra)
    assert len(shared) == 2
    assert all(torch.equal(a, b) for a, b in zip(shared, whole, strict=True))
    naive = Naive(pairs=[(1, 0), (2, 1)], u=U)
    with patchkit.apply(pipe, naive):
        tiny.run(entry, pipe, **extra)
    for found, (_, _, faint) in zip(shared, naive.found, strict=True):
        close(found, faint)


@pytest.mark.parametrize(
    ("targets", "names"),
    [(None, r".*\.attn"), (["attn2"], r".*\.attn2"), (r".*\.attn2?", r".*\.attn2?")],
    ids=["default", "attn2", "both"],
)
def test_sd35_perturbs_its_second_attention_only_if_asked(targets: Any, names: str) -> None:
    """With query and key norms, and dual attention in block 0."""
    entry = tiny.PIPELINES["sd35"]
    pipe = entry.build()
    found = weak_ones(pipe, entry, SoftPAG(heads=[(0, 1)], strength=U, scale=1e-20, targets=targets))
    naive = Naive(pairs=[(0, 1)], u=U, names=names)
    with patchkit.apply(pipe, naive):
        tiny.run(entry, pipe)
    for a, (_, cond, b) in zip(found, naive.found, strict=True):
        close(a, b)
        assert not torch.equal(b, cond)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_a_whole_layer_at_full_strength_is_its_projected_values(name: str) -> None:
    """Image and text streams both, of double and single blocks."""
    entry = tiny.PIPELINES[name]
    pipe = entry.build(2)
    model = pipe.transformer
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    seen: dict[int, tuple[Any, Any]] = {}
    with patchkit.apply(pipe, "softpag", heads=all_heads(blocks), strength=1.0):
        for i, block in enumerate(blocks):
            block.attn.register_forward_hook(lambda m, a, k, out, i=i: seen.update({i: (a, k, out)}), with_kwargs=True)
        tiny.run(entry, pipe, steps=1)
    for i, block in enumerate(blocks):
        _, given, out = seen[i]  # the weak pass is the last
        attn = block.attn
        image = attn.to_v(given["hidden_states"])
        if isinstance(out, tuple):
            torch.testing.assert_close(out[0], attn.to_out[0](image), atol=1e-6, rtol=1e-5)
            text = attn.add_v_proj(given["encoder_hidden_states"])
            if getattr(attn, "to_add_out", None) is not None:
                torch.testing.assert_close(out[1], attn.to_add_out(text), atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(out, image, atol=1e-6, rtol=1e-5)


def all_heads(blocks: list[Any]) -> list[tuple[int, int]]:
    return [(i, h) for i, block in enumerate(blocks) for h in range(block.attn.heads)]


def test_the_prediction_is_not_linear_in_the_strength() -> None:
    """Interpolating predictions instead of attention would give something else: the layers behind see to that."""
    entry = tiny.PIPELINES["sd3"]
    pipe = entry.build(4)
    found = {}
    for u in (0.5, 1.0):
        found[u] = weak_ones(pipe, entry, SoftPAG(heads=[(0, h) for h in range(4)], strength=u, scale=1e-20))[0]
    naive = Naive(pairs=[(0, h) for h in range(4)], u=0.5)
    with patchkit.apply(pipe, naive):
        tiny.run(entry, pipe)
    _, cond, faint = naive.found[0]
    close(found[0.5], faint)
    halfway = (cond + found[1.0]) / 2
    assert float((halfway - faint).norm() / (cond - faint).norm()) > 1e-3


def test_other_heads_of_the_first_perturbed_layer_keep_every_bit() -> None:
    from dataclasses import dataclass

    from patchkit import Recipe, recipe

    @recipe("toy-op-outputs")
    @dataclass(frozen=True, kw_only=True)
    class Outputs(Recipe):
        before = ("softpag",)

        def validate(self) -> None:
            object.__setattr__(self, "found", {})

        def attend(self, call: Any, next: Any) -> Tensor:
            out = next(call)
            self.found[call.site.layer, call.branch] = out
            return out

    entry = tiny.PIPELINES["sd3"]
    pipe, outputs = entry.build(3), Outputs()
    with patchkit.apply(pipe, [outputs, SoftPAG(heads=[(1, 2)], strength=0.3)]):
        tiny.run(entry, pipe, steps=1)
    faint, batched = outputs.found[1, "weak"], outputs.found[1, "batched"]
    strong = batched[batched.shape[0] // 2 :]
    same = [bool(torch.equal(faint[:, h], strong[:, h])) for h in range(4)]
    assert same == [True, True, False, True]


@pytest.mark.parametrize("backend", ["_native_math", "native"])
def test_other_attention_backends_give_the_same_perturbation(backend: str) -> None:
    entry = tiny.PIPELINES["flux"]
    recipe = SoftPAG(heads=[(1, 0), (2, 1)], strength=U, scale=1e-20)
    expected = weak_ones(entry.build(), entry, recipe)
    pipe = entry.build()
    try:
        pipe.transformer.set_attention_backend(backend)
        found = weak_ones(pipe, entry, recipe)
        plain = Inside()
        with patchkit.apply(pipe, [plain]):
            tiny.run(entry, pipe)
    finally:
        pipe.transformer.set_attention_backend("native")  # it sets a default for the whole process as well
    for a, b, (_, _, own) in zip(found, expected, plain.found, strict=True):
        close(a, b)
        assert float((a - own).norm() / own.norm()) > 1e-4, "the backend has not swallowed it"


@pytest.mark.parametrize(
    "options",
    [{}, {"target": "uniform"}, {"target": "mean_query"}, {"scope": "image"}, {"scope": "image_renorm"}],
    ids=lambda o: next(iter(o.values()), "identity"),
)
def test_padded_text_never_leaks(options: dict[str, Any]) -> None:
    """What stands at padded places changes no bit of the prediction."""
    model = tiny.PIPELINES["hunyuan"].build().transformer
    g = generator(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 4, 6, generator=g),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 16, generator=g),
        "encoder_attention_mask": torch.arange(16)[None] < 9,
        "pooled_projections": torch.randn(1, 32, generator=g),
        "guidance": torch.tensor([6000.0]),
    }
    other = inputs["encoder_hidden_states"].clone()
    other[:, 9:] = 7 * torch.randn(1, 7, 16, generator=g)
    with torch.no_grad(), patchkit.apply(model, SoftPAG(heads=[(0, 0), (1, 1)], strength=1.0, **options)):
        first = model(**inputs, return_dict=False)[0]
        second = model(**(inputs | {"encoder_hidden_states": other}), return_dict=False)[0]
        words = inputs["encoder_hidden_states"].clone()
        words[:, 3] += 1
        third = model(**(inputs | {"encoder_hidden_states": words}), return_dict=False)[0]
    close(second, first, 1e-6)
    assert not torch.allclose(third, first), "the words do count"


def test_it_adjusts_what_adaspa_computes() -> None:
    """Sparse steps of the weak pass: AdaSpa's own output, then pushed. AdaSpa searches for each pass by itself."""
    entry = tiny.PIPELINES["cogvideox"]
    sparse = {"density": 0.4, "block_size": 4, "min_tokens": 0, "warmup_steps": 1}
    runs = {}
    for label, recipe in (
        ("softpag", SoftPAG(heads=PAIRS, strength=U, scale=1e-20)),
        ("naive", Naive(pairs=PAIRS, u=U)),
    ):
        pipe = entry.build()
        inside = Inside()
        adaspa = patchkit.registry.get("adaspa")(**sparse)
        with patchkit.apply(pipe, [adaspa, recipe, inside]) as patch:
            assert [r["recipe"] for r in patchkit.status(pipe)["recipes"]][-1] == "adaspa", "it stands inside"
            tiny.run(entry, pipe, steps=4)
            report = patch.report()
        runs[label] = inside.weak() if label == "softpag" else [faint for _, _, faint in recipe.found]
        rows = [r for r in report["recipes"] if r["recipe"] == "adaspa"]
        assert rows[0]["counts"]["sparse"] > 0
    assert len(runs["softpag"]) == 4
    for a, b in zip(runs["softpag"], runs["naive"], strict=True):
        close(a, b)


# --- what cannot go together


def test_caches_that_count_forwards_are_refused() -> None:
    from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig

    entry = tiny.PIPELINES["cogvideox"]
    configs = {
        "Pyramid Attention Broadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
        "FasterCache": FasterCacheConfig(current_timestep_callback=lambda: 500),
    }
    for name, config in configs.items():
        pipe = entry.build()
        pipe.transformer.enable_cache(config)
        with patchkit.apply(pipe, "softpag", heads=PAIRS), pytest.raises(Conflict, match=name):
            tiny.run(entry, pipe)
        with patchkit.apply(pipe, "softpag", heads=[]):
            tiny.run(entry, pipe)  # guides nothing, disturbs nothing


@pytest.mark.parametrize("threshold", [0.0, 100.0], ids=["never hits", "always hits"])
def test_the_first_block_cache_keeps_a_state_of_its_own_for_the_weak_pass(threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    entry = tiny.PIPELINES["flux"]
    runs = []
    recipes = SoftPAG(heads=[(1, 0), (3, 1)], strength=U, scale=1e-20), Naive(pairs=[(1, 0), (3, 1)], u=U)
    for recipe in recipes:
        pipe = entry.build(2)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        inside = Inside()
        with patchkit.apply(pipe, [recipe, inside]):
            tiny.run(entry, pipe, steps=3)
        runs.append(inside.weak() or [faint for _, _, faint in recipe.found])
    assert len(runs[0]) == 3
    for a, b in zip(*runs, strict=True):
        close(a, b)


def test_other_guidance_in_the_same_run_is_refused() -> None:
    entry = tiny.PIPELINES["ltx"]
    pipe = entry.build()
    with patchkit.apply(pipe, "softpag", heads=PAIRS):
        with pytest.raises(Conflict, match=r"guidance_rescale=0.7 rescales .* softpag"):
            tiny.run(entry, pipe, guidance_rescale=0.7)
        tiny.run(entry, pipe, guidance_rescale=0.0)
    from diffusers import StableDiffusion3PAGPipeline

    parts = tiny.PIPELINES["sd3"].build().components
    pag = StableDiffusion3PAGPipeline(
        **{n: p for n, p in parts.items() if n not in ("image_encoder", "feature_extractor")},
        pag_applied_layers=r"transformer_blocks.1\.",
    )
    with patchkit.apply(pag, "softpag", heads=[(0, 0)]), pytest.raises(Conflict, match="pag_scale"):
        tiny.run(tiny.PIPELINES["sd3"], pag)


def test_passes_without_a_name_are_refused() -> None:
    pipe = tiny.PIPELINES["sd3"].build()
    inputs = {
        "hidden_states": torch.zeros(1, 4, 16, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(1, 93, 64),
        "pooled_projections": torch.zeros(1, 64),
    }
    with torch.no_grad(), patchkit.apply(pipe, "softpag", heads=[(0, 0)]):
        pipe.scheduler.set_timesteps(2)
        pipe.transformer(**inputs)
        with pytest.raises(PatchkitError, match="nobody says which"):
            pipe.transformer(**inputs)


# --- what it says, and what it costs


def test_the_report_says_where_the_weak_pass_begins_and_what_it_costs() -> None:
    entry = tiny.PIPELINES["sd3"]
    pipe = entry.build(4)
    plan = patchkit.plan(pipe, "softpag", heads=[(3, 0)])
    assert plan.to_dict()["predicted"][0]["added_forwards"] == 0.25
    assert "0.25 more forwards" in str(plan)
    with patchkit.apply(pipe, "softpag", heads=[(3, 0)]) as patch:
        tiny.run(entry, pipe, steps=2)
        report = patch.report()
    figures = report["recipes"][0]["figures"]
    assert figures["first perturbed block"] == 3
    assert figures["extra forwards a step, predicted"] == 0.25
    assert figures["extra forwards a step, in blocks"] == 0.25
    assert figures["extra forwards a step, in time"] > 0
    assert report["recipes"][0]["counts"]["block forwards"] == 2 * 4
    assert "first perturbed block: 3" in str(report)


FORMS = [*(Form("all", t) for t in ("identity", "uniform", "mean_query")), Form("image"), Form("image_renorm")]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_no_form_makes_a_map(form: Form) -> None:
    from types import SimpleNamespace

    from patchkit.context import AttentionCall, Span

    n, d = 2048, 8
    q, k, v = (torch.randn(1, 2, n, d) for _ in range(3))
    site = SimpleNamespace(kind="joint", full_name="model.attn")
    call = AttentionCall(q, k, v, None, None, False, site, text=Span(n - 64, n))
    with Largest() as largest, torch.no_grad():
        blend(v, pushed(call, v, form), torch.tensor([[0.5, 1.0]]))
    assert 0 < largest.numel < n * n / 4


def test_under_torch_compile() -> None:
    """Blocks do not come by in a model that is compiled whole: no prefix is shared, the result is the same."""
    entry = tiny.PIPELINES["sd3"]
    recipe = SoftPAG(heads=[(0, 0)], strength=U)
    pipe = entry.build(1)
    with patchkit.apply(pipe, recipe):
        eager = tiny.run(entry, pipe)
    pipe = entry.build(1)
    pipe.transformer.compile(backend="eager")
    with patchkit.apply(pipe, recipe) as patch:
        close(tiny.run(entry, pipe), eager)
        assert "could not stand around the blocks" in str(patch.report())


def test_as_a_guider_of_a_modular_pipeline() -> None:
    """The classic pipeline under a patch and the modular one with the guider give the same."""
    from diffusers import ModularPipeline  # noqa: F401  (modular pipelines are there)
    from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

    from patchkit.recipes.headhunter.guider import SoftPAGGuidance

    entry = tiny.PIPELINES["sd3"]
    parts = entry.build().components
    pipe = StableDiffusion3AutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    pipe.set_progress_bar_config(disable=True)
    classic = entry.build()
    for scale in (1.0, 4.0):
        guider = SoftPAGGuidance(heads=PAIRS, strength=U, scale=W, guidance_scale=scale)
        pipe.update_components(guider=guider)
        call = {n: v for n, v in entry.call.items() if n != "guidance_scale"}
        found = pipe(**call, num_inference_steps=2, generator=generator(0)).get("images")
        with patchkit.apply(classic, SoftPAG(heads=PAIRS, strength=U, scale=W)):
            expected = tiny.run(entry, classic, guidance_scale=scale)
        close(found, expected, 1e-4)
    assert guider.new(scale=1.0).config["heads"] == guider.config["heads"]
    assert not patchkit.status(pipe.transformer)["patched"]
