"""The search for heads: finds what was planted, repeats nothing, and goes on after a stop as if there had been none."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch

from patchkit import InvalidOption
from patchkit.recipes.headhunter import SoftPAG, hunt, presets, search
from patchkit.recipes.headhunter.store import Store

CALL = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def flux() -> tuple[Any, dict[str, Any]]:
    entry = tiny.PIPELINES["flux"]
    pipe = entry.build(2)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in entry.call.items() if k not in ("prompt", "generator", "negative_prompt")}
    return pipe, call | CALL


def latents(pipe: Any, call: dict[str, Any], heads: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    import patchkit

    with patchkit.apply(pipe, SoftPAG(heads=heads, strength=1.0)):
        return pipe(prompt="a", generator=torch.Generator().manual_seed(seed), **call).images[0]


def likeness(wanted: torch.Tensor) -> Any:
    def objective(image: torch.Tensor, prompt: str) -> float:
        return -float((image - wanted).norm())

    return objective


@pytest.mark.parametrize("batch", [1, 3])
def test_a_planted_head_is_found_first(flux, batch: int) -> None:
    pipe, call = flux
    planted = (2, 1)
    found = hunt(pipe, likeness(latents(pipe, call, [planted])), "a", top_k=1, rounds=1, batch=batch, **call)
    assert found.heads == [planted]
    assert len(found.scores[0]) == 4 * 2
    assert found.scores[0][planted] == pytest.approx(0, abs=1e-3)


def test_rounds_build_on_the_heads_before_and_repeat_none(flux) -> None:
    pipe, call = flux
    pair = [(0, 1), (3, 0)]
    found = hunt(pipe, likeness(latents(pipe, call, pair)), "a", top_k=1, rounds=3, **call)
    assert len(set(found.heads)) == 3
    if set(found.heads[:2]) == set(pair):
        assert found.scores[1][found.heads[1]] == pytest.approx(0, abs=1e-3)
    assert [len(s) for s in found.scores] == [8, 7, 6]


def test_rows_of_a_batch_have_heads_of_their_own(flux) -> None:
    pipe, call = flux
    import patchkit

    rows = [[(1, 0)], [(0, 1), (3, 1)], [(2, 0)]]
    recipe = search.Candidates(heads=sorted({h for r in rows for h in r}), rows=rows, strength=1.0)
    with patchkit.apply(pipe, recipe):
        generators = [torch.Generator().manual_seed(0) for _ in rows]
        together = pipe(prompt=["a"] * 3, generator=generators, **call).images
    for row, image in zip(rows, together, strict=True):
        torch.testing.assert_close(image, latents(pipe, call, row), atol=2e-5, rtol=1e-4)


def test_ties_go_to_the_lower_layer_and_head(flux) -> None:
    pipe, call = flux
    found = hunt(pipe, lambda image, prompt: 1.0, "a", top_k=3, rounds=2, layers="1-2", **call)
    assert found.heads == [(1, 0), (1, 1), (2, 0), (2, 1)]


class Stop(Exception):
    """Raised in the middle of a hunt."""


def test_a_hunt_that_was_stopped_ends_as_if_it_had_not_been(flux, tmp_path) -> None:
    pipe, call = flux
    wanted = latents(pipe, call, [(1, 1)], seed=5)
    calls = 0

    def objective(image: torch.Tensor, prompt: str) -> float:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop
        return -float((image - wanted).norm())

    stop_at = 0
    whole = hunt(pipe, objective, ["a", "b"], top_k=2, rounds=2, batch=3, **call)
    complete, store = calls, tmp_path / "deep" / "store.json"
    calls, stop_at = 0, complete - 7
    with pytest.raises(Stop):
        hunt(pipe, objective, ["a", "b"], top_k=2, rounds=2, batch=3, store=store, **call)
    before = json.loads(store.read_text())
    calls, stop_at = 0, 0
    resumed = hunt(pipe, objective, ["a", "b"], top_k=2, rounds=2, batch=3, store=store, **call)
    assert 0 < calls < complete
    assert resumed.heads == whole.heads
    assert resumed.scores == whole.scores
    assert json.loads(store.read_text())["rounds"][0] == before["rounds"][0]
    calls = 0
    assert hunt(pipe, objective, ["a", "b"], top_k=2, rounds=2, batch=3, store=store, **call).heads == whole.heads
    assert calls == 0
    with pytest.raises(InvalidOption, match="prompts"):
        hunt(pipe, objective, ["a", "c"], top_k=2, rounds=2, batch=3, store=store, **call)


def test_what_cannot_be_hunted_is_refused(flux, tmp_path) -> None:
    pipe, call = flux
    for options in ({"rounds": 0}, {"top_k": 0}, {"scale": 0.0}, {"seeds": [1, 2, 3]}, {"layers": "9"}):
        with pytest.raises(InvalidOption):
            hunt(pipe, lambda *_: 0.0, ["a", "b"], **options, **call)
    with pytest.raises(InvalidOption, match="NaN"):
        hunt(pipe, lambda *_: float("nan"), "a", **call)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(Exception, match="cannot be read"):
        Store(tmp_path / "store.json", {})


def test_presets(flux, tmp_path, monkeypatch) -> None:
    """By name and by path; refused on another model and with another scope."""
    import patchkit

    pipe, call = flux
    monkeypatch.setenv("PATCHKIT_PRESETS", str(tmp_path / "mine"))
    found = hunt(pipe, likeness(latents(pipe, call, [(2, 1)])), "a", top_k=2, rounds=2, layers="2-", **call)
    path = found.save_preset("styles/second", about="what the second head does", first=3)
    assert path == tmp_path / "mine" / "styles" / "second.json"
    other = found.save_preset(tmp_path / "all.json")
    assert len(json.loads(path.read_text())["heads"]) == 3
    assert set(json.loads(other.read_text())["found"]["scores"]) == {"L2H0", "L2H1", "L3H0", "L3H1"}
    expected = latents(pipe, call, found.heads[:3])
    with patchkit.apply(pipe, "softpag", heads="styles/second", strength=1.0) as patch:
        assert patch.recipes[0].options()["heads"] == "styles/second"
        again = pipe(prompt="a", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert torch.equal(again, expected)
    SoftPAG(heads=str(other))
    with pytest.raises(InvalidOption, match="found with scope='all'"):
        patchkit.apply(pipe, "softpag", heads=str(path), scope="image")
    with pytest.raises(InvalidOption, match="not for"):
        patchkit.apply(tiny.PIPELINES["flux"].build(3), "softpag", heads=str(path))
    with pytest.raises(InvalidOption, match="did you mean 'styles/second'"):
        SoftPAG(heads="styles/secnd")
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(InvalidOption, match="no preset"):
        SoftPAG(heads=str(tmp_path / "no.json"))


SHIPPED = sorted(p.relative_to(presets.SHIPPED).with_suffix("").as_posix() for p in presets.SHIPPED.rglob("*.json"))


def on_meta(cls: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config)


def test_shipped_presets_fit_the_models_they_are_for_and_no_others() -> None:
    """Built at full size without memory for weights; Stable Diffusion 3.5 medium has as many layers and heads as 3."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    import patchkit
    from patchkit import zoo

    sd3 = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536}
    later = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
    models = {
        "sd3": on_meta(SD3Transformer2DModel, **sd3),
        "flux": on_meta(FluxTransformer2DModel, guidance_embeds=True),
        "sd35": on_meta(SD3Transformer2DModel, **sd3, **later),
        "zoo": on_meta(SD3Transformer2DModel, **SD3Transformer2DModel.load_config(zoo.path("dit") / "transformer")),
    }
    assert len(SHIPPED) == 15
    for name in SHIPPED:
        mine = name.split("/")[0]
        plan = patchkit.plan(models[mine], SoftPAG(heads=name))
        assert plan.selections[0].matched
    for name, other in (
        ("zoo/dit-two-steps", "sd3"),
        ("sd3/darker", "flux"),
        ("sd3/darker", "sd35"),
        ("flux/green", "sd3"),
    ):
        with pytest.raises(InvalidOption, match="not for"):
            patchkit.plan(models[other], SoftPAG(heads=name))
    with pytest.raises(InvalidOption, match="scope='all'"):
        patchkit.plan(models["sd3"], SoftPAG(heads="sd3/darker", scope="image"))
