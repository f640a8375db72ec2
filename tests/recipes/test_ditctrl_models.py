"""DiTCtrl on HunyuanVideo, Wan, Mochi and LTX: what carries over from CogVideoX, each against the formulas."""

from __future__ import annotations

from typing import Any

import ditctrl_oracle as oracle
import pytest
import tiny
import torch
from ditctrl_tools import Inside, Pairwise, build, loud, run, tokens
from torch import Tensor

import patchkit
from patchkit import InvalidOption, UnsupportedModel
from patchkit.context import AttentionCall
from patchkit.recipes.ditctrl import DiTCtrl, sharing
from patchkit.recipes.ditctrl.maps import video_of
from patchkit.recipes.ditctrl.models import MODELS

# pipeline, its variant, blocks to build (Hunyuan: of each kind)
CASES = {
    "cogvideox": ("cogvideox", None, 4),
    "wan": ("wan21", None, 4),
    "wan, two denoisers": ("wan22", None, 4),
    "wan, no guidance": ("wan21", "no_cfg", 4),
    "hunyuan": ("hunyuan", None, 2),
    "hunyuan, two calls": ("hunyuan", "true_cfg", 2),
    "mochi": ("mochi", None, 4),
    "mochi, no guidance": ("mochi", "no_cfg", 4),
    "ltx": ("ltx", None, 4),
}
PROMPTS = ["a red circle", "a blu circle"]
OPTIONS: dict[str, Any] = {"overlap": 1, "kv_layers": "2-", "kv_steps": (1, 3)}


def case(name: str) -> tuple[Any, Any, dict[str, Any]]:
    pipeline, variant, layers = CASES[name]
    entry, pipe = build(pipeline, layers)
    if pipeline == "wan22":
        loud(pipe)
    call: dict[str, Any] = {"variant": variant, "prompt": PROMPTS}
    if variant == "true_cfg":
        call["negative_prompt"] = "blur"
    return entry, pipe, call


@pytest.mark.parametrize("options", [{}, {"objects": "circle"}])
@pytest.mark.parametrize("name", CASES)
def test_computing_segments_once_changes_no_bit(name: str, options: dict[str, Any]) -> None:
    entry, pipe, call = case(name)
    found = run(entry, pipe, DiTCtrl(**OPTIONS, **options), **call)
    assert torch.isfinite(found).all()
    assert torch.equal(found, run(entry, pipe, Pairwise(**OPTIONS, **options), **call))
    without = run(entry, pipe, DiTCtrl(**{**OPTIONS, "kv_steps": None}), **call)
    assert (found - without).norm() / without.norm() > 1e-4


def same(found: Tensor, expected: Tensor, name: str) -> None:
    """To the bit; Mochi's halves are forwarded one by one here, whose products round otherwise than a batch's."""
    if name == "mochi":
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "hunyuan, two calls", "mochi", "ltx"])
def test_segments_that_do_not_touch_are_isolated_videos(name: str) -> None:
    entry, pipe, call = case(name)
    if name == "ltx":  # else the schedule would depend on the length of the video
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    axis = 1 if name == "ltx" else 2
    call.setdefault("negative_prompt", None)
    alone = tiny.run(entry, pipe, steps=3, **{**call, "prompt": PROMPTS[0]})
    noise = torch.randn(
        *(n * (2 if i == axis else 1) for i, n in enumerate(alone.shape)), generator=torch.Generator().manual_seed(1)
    )
    found = run(entry, pipe, DiTCtrl(overlap=0, transitions=0, kv_steps=None), 3, latents=noise, **call)
    size = alone.shape[axis]
    for i, prompt in enumerate(PROMPTS):
        part = noise.narrow(axis, i * size, size)
        expected = tiny.run(entry, pipe, steps=3, **{**call, "prompt": prompt, "latents": part})
        same(found.narrow(axis, i * size, size), expected, name)


@pytest.mark.parametrize("name", CASES)
def test_targets_get_keys_values_and_mask_of_the_source(name: str) -> None:
    entry, pipe, call = case(name)
    if name.startswith("mochi"):
        call["prompt"] = ["a red circle", "a blu"]  # of other lengths
    inside = Inside()
    run(entry, pipe, [DiTCtrl(**OPTIONS), inside], **call)
    sources = {
        (step, part, c.branch, c.site.full_name): c
        for step, part, _, c in inside.ops
        if "-" not in part and c.site.kind != "cross"
    }
    checked = set()
    for step, part, layer, c in inside.ops:
        if part.endswith("target") and layer >= 2 and c.site.kind != "cross":
            source = sources[step, str(int(part.split("-")[0]) - 1), c.branch, c.site.full_name]
            assert torch.equal(c.k, source.k)
            assert torch.equal(c.v, source.v)
            assert c.mask is source.mask
            assert c.q.shape[2] == sources[step, "0", c.branch, c.site.full_name].q.shape[2] or name.startswith("mochi")
            checked.add((step, part, c.branch, layer))
    branches = 1 if "no guidance" in name or name in ("hunyuan", "cogvideox", "ltx") else 2
    assert len(checked) == 2 * 2 * branches * (pipe_blocks(pipe) - 2)


def pipe_blocks(pipe: Any) -> int:
    transformer = pipe.transformer
    blocks = getattr(transformer, "transformer_blocks", None) or transformer.blocks
    return len(blocks) + len(getattr(transformer, "single_transformer_blocks", ()))


def dense_map(call: AttentionCall, places: list[int], sample: int) -> Tensor:
    """(N_v,) from the N x N map of one sample."""
    logits = call.q[sample].float() @ call.k[sample].float().transpose(-1, -2) * call.q.shape[-1] ** -0.5
    if call.mask is not None:
        mask = call.mask[min(sample, call.mask.shape[0] - 1)]
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    p = logits.softmax(-1)
    if call.site.kind == "cross":
        return p[:, :, places].mean(0).sum(-1)
    assert call.text is not None
    video = video_of(call.text, call.q.shape[2])
    return p[:, video][:, :, [call.text.start + t for t in places]].mean(0).sum(-1)


@pytest.mark.parametrize("name", CASES)
def test_guided_sharing_is_that_of_dense_maps_and_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits from the mean of the maps so far, from each clip's own queries and keys; both halves have the same."""
    entry, pipe, call = case(name)
    inside, seen = Inside(), []
    real = sharing.guided

    def watched(c: Any, source: Any, here: Tensor, next: Any) -> Tensor:
        out = real(c, source, here, next)
        seen.append((c, source, here, out))
        return out

    monkeypatch.setattr(sharing, "guided", watched)
    run(entry, pipe, [DiTCtrl(**{**OPTIONS, "kv_steps": (1, 2)}, objects="circle"), inside], **call)
    own: dict[Any, AttentionCall] = {}
    for step, part, layer, c in inside.ops:
        gathered = "-" in part and c.site.kind != "cross" and layer >= 2
        if step == 1 and not gathered and not c.branch.startswith("uncond"):
            own[part, layer, c.site.kind] = c
    for c, *_ in seen:
        if not c.branch.startswith("uncond"):
            own[c.moment.part, c.site.layer, c.site.kind] = c
    cross = any(key[2] == "cross" for key in own)
    kind = "cross" if cross else "joint"
    places = tokens(pipe, PROMPTS[0], "circle")
    assert seen
    for c, source, here, out in seen:
        clip = int(c.moment.part.split("-")[0])
        for bits, who in ((here, f"{clip}-target"), (source.bits, str(clip - 1))):
            maps = []
            for layer in range(c.site.layer + (0 if cross else 1)):
                found = own.get((who, layer, kind)) or own[who.split("-")[0], layer, kind]
                maps.append(dense_map(found, places, found.q.shape[0] - 1))
            expected = oracle.normalised(sum(maps) / len(maps), c.grid)  # type: ignore[arg-type]
            sure = (expected - 0.3).abs() > 1e-4
            assert torch.equal(bits[sure], (expected >= 0.3)[sure])
        torch.testing.assert_close(out, dense_guided(c, source, here), atol=2e-5, rtol=1e-4)


def dense_guided(c: AttentionCall, source: Any, here: Tensor) -> Tensor:
    """One masked attention: a video query sees a video key iff their bits are equal."""
    n, keys = c.q.shape[2], source.k.shape[2]
    there = source.bits
    see = torch.ones(n, keys, dtype=torch.bool)
    if c.text is None:
        see = here[:, None] == there[None]
    else:
        rows = video_of(c.text, n)
        columns = slice(keys - len(there), keys) if c.text.start == 0 else slice(0, len(there))
        see[rows, columns] = here[:, None] == there[None]
    mask = see[None, None]
    if source.mask is not None:
        mask = mask & source.mask
    return torch.nn.functional.scaled_dot_product_attention(c.q, source.k, source.v, attn_mask=mask)


@pytest.mark.parametrize("name", CASES)
def test_swap_and_reweight(name: str) -> None:
    entry, pipe, call = case(name)
    call.setdefault("negative_prompt", None)
    if name == "cogvideox":
        pytest.skip("in test_ditctrl_pipelines.py")
    alone = tiny.run(entry, pipe, steps=4, **{**call, "prompt": PROMPTS[0]})
    both = run(entry, pipe, DiTCtrl(**OPTIONS, objects="circle", mode="swap"), **call)
    same(both[:1], alone, name)
    assert (both[1:] - alone).norm() / alone.norm() > 1e-4
    for factor, changes in ((1.0, False), (0.0, True)):
        call["prompt"] = PROMPTS[0]
        both = run(entry, pipe, DiTCtrl(mode="reweight", reweight={"red": factor}), **call)
        same(both[:1], alone, name)
        difference = (both[1:] - alone).norm() / alone.norm()
        assert (difference > 1e-4) == changes


def test_words_behind_a_template_are_found() -> None:
    _, pipe, _ = case("hunyuan")
    model, found = MODELS["HunyuanVideoPipeline"], []
    for template in ({"template": "say: {}", "crop_start": 5}, {"template": "{}", "crop_start": 0}):
        given = {"prompt_template": template, "max_sequence_length": 16}
        found.append(model.tokens(pipe, "a red circle", "circle", "here", given))
    whole = pipe.tokenizer("say: a red circle", return_offsets_mapping=True)["offset_mapping"]
    start = len("say: a red ")
    assert [whole[i + 5] for i in found[0]] == [(k, k + 1) for k in range(start, start + len("circle"))]
    assert found[1] == tuple(tokens(pipe, "a red circle", "circle"))


def test_what_other_models_cannot_do_is_refused() -> None:
    _, pipe, _ = case("wan")
    with pytest.raises(InvalidOption, match="map"):
        patchkit.apply(pipe, "ditctrl", map="avg")
    with pytest.raises(InvalidOption, match="block 0"):
        patchkit.apply(pipe, "ditctrl", kv_layers="0-")
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(UnsupportedModel, match="expand_timesteps"):
        patchkit.apply(pipe, "ditctrl")
    entry, pipe, call = case("hunyuan")
    with pytest.raises(InvalidOption, match="prompt_2"):
        run(entry, pipe, "ditctrl", 2, **{**call, "prompt_2": "x"})
