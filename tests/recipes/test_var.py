"""VAR on every model, against the method computed a second time by explicit maps (``var_oracle``)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fingerprint import assert_same, diff, fingerprint
from tiny import forward, generate
from tiny.vlms import VLMS
from torch import Tensor
from var_oracle import Oracle, Planted, decoder_layers, image_mask

import patchkit
from patchkit.recipes.var import Var, sink_map, sink_picture

MODELS = pytest.mark.parametrize("name", VLMS)
DIMS = [3, 7]
# tiny models are 32 wide: 20 is out of their reach, and 1.5 makes a sink of every tenth token or so
LOOSE: dict[str, Any] = {"tau": 1.5, "rho": 0.5, "min_visual": 0.2, "recycle": 0.6}
ALL = {"layers": "0-", "sink_dims": DIMS}


@functools.cache
def built(name: str) -> Any:
    return VLMS[name].build()


@functools.cache
def plain(name: str) -> Tensor:
    return forward(VLMS[name], built(name))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def rows_of(patch: patchkit.Patch) -> list[dict[str, Any]]:
    return [r for r in patch.report()["recipes"][0]["rows"] if "attn" in r["site"]]


@MODELS
def test_model_does_what_the_formula_says(name: str) -> None:
    """Left padding, several pictures, text between tiles, shared keys and values, whatever mask: all in the inputs."""
    entry, model = VLMS[name], built(name)
    kept = entry.inputs(model)["attention_mask"].bool()
    assert not kept.all()
    with Oracle(model, DIMS, range(4), **LOOSE) as oracle:
        wanted, tokens = forward(entry, model), generate(entry, model, new_tokens=4)
    assert len(oracle.rows) > 50
    before = fingerprint(model)
    with patchkit.apply(model, "var", **ALL, **LOOSE) as patch:
        assert diff(before, fingerprint(model))
        got = forward(entry, model)
        assert torch.equal(generate(entry, model, new_tokens=4), tokens)
        assert not patch.report()["recipes"][0]["dense"]
    assert error(got[kept], wanted[kept]) < 1e-5
    assert error(got[kept], plain(name)[kept]) > 1e-3
    assert_same(before, fingerprint(model))
    assert torch.equal(forward(entry, model), plain(name))


@MODELS
@pytest.mark.parametrize("change", [{"recycle": 0.0}, {"rho": 1.01}, {"sink_dims": []}, {"tau": 20.0}])
def test_nothing_to_move_changes_no_bit(name: str, change: dict[str, Any]) -> None:
    """tau 20 is more than a model 32 wide can reach."""
    with patchkit.apply(built(name), "var", **(ALL | LOOSE | change)) as patch:
        assert torch.equal(forward(VLMS[name], built(name)), plain(name))
        assert sum(r["values"].get("selected_rate", [0])[0] for r in rows_of(patch)) == 0


@MODELS
def test_other_layers_and_queries_keep_their_bits(name: str) -> None:
    """What leaves the edited layer differs in text tokens only; layers before it are untouched."""
    entry, model = VLMS[name], built(name)
    inputs = entry.inputs(model)
    seen: dict[str, list[Tensor]] = {"plain": [], "patched": []}
    for label in seen:
        hooks = [
            layer.register_forward_hook(
                lambda m, a, out, label=label: seen[label].append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in decoder_layers(model)
        ]
        with patchkit.apply(
            model, "var", **(ALL | LOOSE | {"layers": "1", "recycle": 0.0 if label == "plain" else 0.6})
        ):
            forward(entry, model)
        for hook in hooks:
            hook.remove()
    text = ~image_mask(model, inputs["input_ids"]) & inputs["attention_mask"].bool()
    assert torch.equal(seen["plain"][0], seen["patched"][0])
    assert torch.equal(seen["plain"][1][~text], seen["patched"][1][~text])
    assert not torch.equal(seen["plain"][1][text], seen["patched"][1][text])


def test_default_layers_leave_out_the_first_two_and_the_last() -> None:
    model = VLMS["llava"].build(6)
    with patchkit.apply(model, Var(sink_dims=DIMS, tau=1.5)) as patch:
        forward(VLMS["llava"], model)
        assert sorted({r["layer"] for r in rows_of(patch)}) == [2, 3, 4]


@pytest.mark.parametrize("name", ["llava", "qwen2vl", "idefics3", "gemma3vl"])
def test_a_batch_is_what_its_prompts_are_alone(name: str) -> None:
    """The first prompt is the longer one; the second is padded on the left, and its pads are no sinks or targets."""
    entry, model = VLMS[name], built(name)
    batch = entry.inputs(model)
    short = batch["attention_mask"][1].bool()
    alone = {k: v[1:, short] for k, v in batch.items() if v.shape[:2] == batch["input_ids"].shape}
    first = {"qwen2vl": 16, "idefics3": 1}.get(name, 2)  # rows of pixel_values that are the other prompt's
    alone["pixel_values"] = batch["pixel_values"][first:]
    if name == "qwen2vl":
        alone["image_grid_thw"] = batch["image_grid_thw"][1:]
    if name == "idefics3":
        alone["pixel_values"] = alone["pixel_values"][:, :1]
    with patchkit.apply(model, "var", **ALL, **LOOSE):
        together = forward(entry, model)[1][short]
        with torch.no_grad():
            single = model(**alone).logits[0]
    assert error(together, single) < 1e-5


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_spike_at_the_border(factor: float) -> None:
    """phi of one planted token just below or just above tau."""
    entry, model = VLMS["llava"], built("llava")
    where = image_mask(model, entry.inputs(model)["input_ids"]).cumsum(1).eq(3)
    with Planted(model, where, 5):
        hidden: list[Tensor] = []
        hook = decoder_layers(model)[2].register_forward_pre_hook(lambda m, a: hidden.append(a[0]))
        forward(entry, model)
        hook.remove()
        x = hidden[0][where]
        reached = float((x[:, 5].abs() / (x.square().mean(-1) + 1e-6).sqrt()).min())
        with patchkit.apply(model, "var", sink_dims=[5], tau=reached / factor) as patch:
            forward(entry, model)
            (row,) = rows_of(patch)
    assert 5 < reached < 32**0.5
    assert min(row["values"]["visual_sinks"]) == (1 if factor > 1 else 0)


def test_pads_are_never_sinks() -> None:
    entry, model = VLMS["llava"], built("llava")
    mask = entry.inputs(model)["attention_mask"]
    with Planted(model, ~mask.bool(), 5), patchkit.apply(model, "var", sink_dims=[5], tau=5.0, layers="0-") as patch:
        forward(entry, model)
        assert all(not any(r["values"]["text_sinks"]) for r in rows_of(patch))


def test_text_alone_is_left_alone() -> None:
    model = built("llava")
    ids = torch.randint(3, 380, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with patchkit.apply(model, "var", **ALL, **(LOOSE | {"require_visual_sink": False})) as patch:
            assert torch.equal(model(input_ids=ids).logits, wanted)
            assert patch.report()["recipes"][0]["counts"] == {"calls with nothing to move": 4}


@pytest.mark.parametrize("require", [True, False])
def test_layers_without_a_visual_sink(require: bool) -> None:
    """Only the first token is a sink: skipped, or its attention moves to the image."""
    entry, model = VLMS["llava"], built("llava")
    ids = entry.inputs(model)["input_ids"]
    options: dict[str, Any] = {"tau": 5.0, "min_visual": 0.1, "rho": 0.5, "recycle": 0.6}
    with Planted(model, ids == 1, 5):
        untouched = forward(entry, model)
        with Oracle(model, [5], [2], **options, require=require):
            wanted = forward(entry, model)
        with patchkit.apply(model, "var", sink_dims=[5], **options, require_visual_sink=require):
            got = forward(entry, model)
    kept = entry.inputs(model)["attention_mask"].bool()
    assert torch.equal(got, untouched) is require
    assert error(got[kept], wanted[kept]) < 1e-5


def test_half_precision() -> None:
    entry = VLMS["llava"]
    model = entry.build().to(torch.bfloat16)
    kept = entry.inputs(model)["attention_mask"].bool()
    with Oracle(model, DIMS, range(4), **LOOSE):
        wanted = forward(entry, model)
    with patchkit.apply(model, "var", **ALL, **LOOSE):
        got = forward(entry, model)
    assert got.dtype == torch.bfloat16
    assert error(got[kept].float(), wanted[kept].float()) < 2e-2


def test_eager_attention_keeps_its_weights() -> None:
    """The model's own backend, whichever, computes everything that is not edited."""
    entry = VLMS["llava"]
    model = entry.build()
    model.set_attn_implementation({"text_config": "eager"})
    kept = entry.inputs(model)["attention_mask"].bool()
    with Oracle(model, DIMS, range(4), **LOOSE):
        wanted = forward(entry, model)
    with patchkit.apply(model, "var", **ALL, **LOOSE), torch.no_grad():
        out = model(**entry.inputs(model), output_attentions=True)
    assert error(out.logits[kept], wanted[kept]) < 1e-5
    assert out.attentions[0] is not None


@MODELS
def test_the_vision_tower_is_never_touched(name: str) -> None:
    model = built(name)
    vision = {n: m.config for n, m in model.named_modules() if "vision" in n or "visual" in n if hasattr(m, "config")}
    before = {n: (c, c._attn_implementation) for n, c in vision.items()}
    with patchkit.apply(model, "var", **ALL) as patch:
        for n, (config, implementation) in before.items():
            assert model.get_submodule(n).config is config
            assert config._attn_implementation == implementation
        assert "the vision tower is never touched" in patch.report()["recipes"][0]["left"]


def test_presets_and_options() -> None:
    assert (Var.preset("paper").rho, Var.preset("paper").recycle) == (0.8, 0.6)
    assert (Var.preset("repo").rho, Var.preset("repo").recycle) == (0.5, 0.4)
    assert Var.preset("repo", recycle=0.5).recycle == 0.5
    default = Var()
    assert (default.tau, default.rho, default.recycle, default.min_visual) == (20.0, 0.5, 0.6, 0.2)
    assert (default.layers, default.sink_dims) == ("2:-1", None)
    assert (default.require_visual_sink, default.track_generated) == (True, False)
    with pytest.raises(patchkit.InvalidOption, match="no preset 'papre'"):
        Var.preset("papre")
    for bad in ({"tau": 0}, {"recycle": 1.1}, {"rho": -0.1}, {"min_visual": 2}, {"sink_dims": [-1]}, {"p": 0.6}):
        with pytest.raises(patchkit.InvalidOption):
            Var.build(bad)
    with pytest.raises(patchkit.InvalidOption, match="channel 32 of 32"):
        patchkit.apply(built("llava"), "var", sink_dims=[5, 32])


def test_a_preset_by_name() -> None:
    with patchkit.apply(built("llava"), "var", preset="repo", sink_dims=DIMS) as patch:
        assert patch.recipes[0].options() == {"recycle": 0.4, "sink_dims": DIMS}


def test_report_and_pictures_of_planted_sinks() -> None:
    """The third patch of each picture is a sink; the map shows it there and nowhere else."""
    from PIL import Image

    entry, model = VLMS["llava"], VLMS["llava"].build(6)
    image = image_mask(model, entry.inputs(model)["input_ids"])
    planted = Planted(model, image & (image.cumsum(1) % 16 == 7), 5)
    with planted, patchkit.apply(model, "var", sink_dims=[5], tau=5.0) as patch:
        forward(entry, model)
        report = patch.report()
    assert "visual_sinks" in str(report)
    assert "selected_rate" in report.per_head()
    for sample, number in ((0, 0), (0, 1), (1, 0)):
        found = sink_map(report, sample, number)
        assert found.shape == (4, 4)
        assert torch.allclose(found.flatten(), torch.eye(16)[6])
    assert sink_map(report, grid=(2, 8))[0, 6] == pytest.approx(1)
    picture = sink_picture(report, 0, 1, under=Image.new("RGB", (40, 40), "white"))
    assert picture.size == (40, 40)
    assert picture.getpixel((25, 15)) != picture.getpixel((5, 5)) == (255, 255, 255)
    assert sink_picture(report).size == (48, 48)
    drawn = report.pictures()
    assert list(drawn) == [f"var, sinks of image {i}, sample {b}" for b, i in ((1, 1), (1, 2), (2, 1))]
    assert drawn["var, sinks of image 1, sample 2"].tobytes() == sink_picture(report, 1, 0).tobytes()
    for wrong in ({"image": 2}, {"sample": 2}, {"grid": (3, 5)}):
        with pytest.raises(patchkit.InvalidOption):
            sink_map(report, **wrong)
