"""DiTCtrl's pieces against its formulas: segments, blend, words, maps, masks, shared attention, reweighting."""

from __future__ import annotations

import ditctrl_oracle as oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit import InvalidOption, UnsupportedModel
from patchkit.context import AttentionCall, Grid, Span
from patchkit.ledger import Ledger
from patchkit.recipes.ditctrl import DiTCtrl, maps, reweighting, segments, sharing, words
from patchkit.recipes.ditctrl.models import MODELS
from patchkit.recipes.ditctrl.segments import Blend, Layout
from patchkit.recipes.ditctrl.sharing import Source
from patchkit.sites import Site

H, D, GRID, TEXT = 3, 8, Grid(2, 3, 4), 5
N = TEXT + GRID.tokens


def op(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale)


def a_call(seed: int = 0, batch: int = 2, text: str = "first", kind: str = "joint") -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(batch, H, N, D, generator=g) for _ in range(3))
    site = Site("transformer", "block.attn", torch.nn.Identity(), kind, 0, H, text)  # type: ignore[arg-type]
    site.terminal = op
    span = Span(0, TEXT) if text == "first" else Span(GRID.tokens, N)
    return AttentionCall(q, k, v, None, None, False, site, grid=GRID, text=span, ledger=Ledger())


def some_bits(seed: int, share: float = 0.4) -> Tensor:
    return torch.rand(GRID.tokens, generator=torch.Generator().manual_seed(seed)) < share


# --- segments and blend ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "overlap", "transitions", "latent", "pixels"),
    [(2, 6, 1, 27, 105), (2, 9, 2, 25, 97), (3, 6, 1, 41, 161), (3, 9, 2, 37, 145)],
)
def test_lengths_are_the_papers(prompts: int, overlap: int, transitions: int, latent: int, pixels: int) -> None:
    layout = Layout(13, overlap, segments.segments(prompts, transitions, 0))
    count, frames = oracle.frames(prompts, transitions, 0, 13, overlap)
    assert (len(layout.segments), layout.frames) == (count, frames)
    assert layout.frames == latent

    class Pipe:
        vae_scale_factor_temporal = 4

    assert MODELS["CogVideoXPipeline"].pixel_frames(Pipe, layout.frames) == pixels
    assert layout.span(1) == slice(13 - overlap, 26 - overlap)


@pytest.mark.parametrize(("transitions", "extra"), [(0, 0), (1, 0), (2, 0), (1, 2), (3, 1)])
def test_texts_of_segments_are_mixed_place_by_place(transitions: int, extra: int) -> None:
    prompts = [torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = [segments.text_of(s, [{"e": p} for p in prompts])["e"] for s in segments.segments(4, transitions, extra)]
    expected = oracle.texts(prompts, transitions, extra)
    assert len(found) == len(expected) == oracle.frames(4, transitions, extra, 13, 6)[0]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_masks_of_mixed_texts_are_joined() -> None:
    texts = [{"m": torch.tensor([[1, 1, 0]])}, {"m": torch.tensor([[1, 0, 0]])}]
    assert segments.text_of(segments.Segment(0, 0.5), texts)["m"].tolist() == [[1, 1, 0]]
    texts = [{"m": torch.tensor([[True, False]])}, {"m": torch.tensor([[True, True]])}]
    assert segments.text_of(segments.Segment(0, 0.5), texts)["m"].tolist() == [[True, True]]


@pytest.mark.parametrize("length", [1, 4, 13])
def test_weights_are_the_papers(length: int) -> None:
    torch.testing.assert_close(torch.tensor(segments.weights(length)), oracle.weight(length))


def test_blend_is_the_hand_formula_with_inner_segments_twice() -> None:
    """A stub that returns its segment's number, plus a half as target."""
    layout = Layout(5, 2, segments.segments(2, 1, 0))
    blend = Blend(layout, 1)
    num, den, w = torch.zeros(layout.frames), torch.zeros(layout.frames), oracle.weight(5)
    for k in range(len(layout.segments) - 1):
        for number, value in ((k, float(k)), (k + 1, k + 1.5)):
            blend.add(number, torch.full((2, 5, 1, 2, 2), value))
            num[layout.span(number)] += w * value
            den[layout.span(number)] += w
    expected = (num / den).view(1, -1, 1, 1, 1).expand(2, -1, 1, 2, 2)
    torch.testing.assert_close(blend.result(), expected)
    once = Blend(layout, 1)
    for k in range(3):
        once.add(k, torch.full((2, 5, 1, 2, 2), float(k)), times=2 if k == 1 else 1)
    assert not torch.allclose(once.result(), blend.result())  # roles matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_all_segments_agree_on_stays_to_the_bit(dtype: torch.dtype) -> None:
    layout = Layout(7, 3, segments.segments(3, 1, 0))
    whole = torch.randn(1, 2, layout.frames, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    blend = Blend(layout, 2)
    for k in range(len(layout.segments)):
        blend.add(k, whole[:, :, layout.span(k)], times=1 + (0 < k < len(layout.segments) - 1))
    assert torch.equal(blend.result(), whole)


# --- words ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tiny.PIPELINES["cogvideox2b"].build().tokenizer  # a token a letter, and spaces


def test_words_are_found_by_offsets(tokenizer: object) -> None:
    prompt = "a red circle, a circled Circle"
    found = words.places(tokenizer, prompt, "circle", "here")
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[operator]
    letters = "".join(prompt[slice(*offsets[i])] for i in found)
    assert letters.replace(" ", "") in ("circleCircle", "ccircleCCircle")  # not the one inside "circled"
    assert words.places(tokenizer, prompt, "red circle", "here")[0] < found[0]


@pytest.mark.parametrize("word", ["square", "", "  ", "circl"])
def test_words_that_are_not_there_are_refused(tokenizer: object, word: str) -> None:
    with pytest.raises(InvalidOption, match="no word"):
        words.places(tokenizer, "a red circle", word, "here")


def test_words_beyond_the_limit_and_slow_tokenizers_are_refused(tokenizer: object) -> None:
    with pytest.raises(InvalidOption, match="beyond the 6 tokens"):
        words.places(tokenizer, "a red circle", "circle", "here", 6)

    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match="characters"):
        words.places(Slow(), "a red circle", "circle", "here")


# --- maps and masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("kind", ["v2t", "avg"])
def test_streamed_map_is_the_dense_one(kind: maps.Map, text: str) -> None:
    call = a_call(text=text)
    out, lse = maps.own_attention(call, op, 1)
    _, p = oracle.dense(call.q[1], call.k[1], call.v[1])
    assert torch.equal(out, op(call))  # the model's own output, to the bit
    tokens, video = (1, 3), maps.video_of(call.text, N)  # type: ignore[arg-type]
    columns = [call.text.start + t for t in tokens]  # type: ignore[union-attr]
    expected = p[:, video, columns].mean(0).sum(-1)
    if kind == "avg":
        expected = (expected + p[:, columns, video].mean(0).sum(0)) / 2
    torch.testing.assert_close(maps.word_map(call, lse, 1, tokens, kind), expected, atol=1e-6, rtol=1e-5)


def test_lse_is_the_same_where_another_recipe_stands_inside() -> None:
    call = a_call()
    inner = lambda c: op(c) + 1  # noqa: E731
    out, lse = maps.own_attention(call, inner, 1)
    assert torch.equal(out, op(call) + 1)
    torch.testing.assert_close(lse, maps.own_attention(call, op, 1)[1])


def test_bits_are_cut_per_frame() -> None:
    found = torch.rand(GRID.tokens, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 9, GRID.tokens)
    expected = oracle.normalised(found, GRID)
    frames = expected.view(2, -1)
    assert torch.equal(frames.amin(1), torch.zeros(2))
    torch.testing.assert_close(frames.amax(1), torch.ones(2), atol=1e-4, rtol=0)
    assert torch.equal(maps.bits(found, GRID, 0.3), expected >= 0.3)
    assert maps.bits(found, GRID, 0.0).all()
    assert not maps.bits(found, GRID, 1.01).any()


def test_running_map_is_the_mean_and_its_copy_stays() -> None:
    parts = [torch.rand(GRID.tokens) for _ in range(3)]
    running = maps.RunningMap()
    running.add(parts[0])
    copy = running.copy()
    for part in parts[1:]:
        running.add(part)
    assert running.layers == 3
    assert torch.equal(running.bits(GRID, 0.3), maps.bits(sum(parts) / 3, GRID, 0.3))  # type: ignore[arg-type]
    assert torch.equal(copy.bits(GRID, 0.3), maps.bits(parts[0], GRID, 0.3))


# --- shared attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("share", [0.4, 0.0, 1.0])
def test_three_gathered_attentions_are_the_two_masked_ones(text: str, share: float) -> None:
    call, source = a_call(1, text=text), a_call(2, text=text)
    here, there = some_bits(1), some_bits(2, share)
    found = sharing.guided(call, Source(source.k, source.v, None, there), here, op)
    video = maps.video_of(call.text, N)  # type: ignore[arg-type]
    order = torch.cat([torch.arange(*call.text), torch.arange(N)[video]])  # type: ignore[misc]
    for b in range(2):
        q, k, v = call.q[b][:, order], source.k[b][:, order], source.v[b][:, order]
        if share == 1.0:  # the background has no key of its own in the source, but the text
            assert not (~there).any()
        expected = oracle.fg_bg(q, k, v, here, there, TEXT)
        torch.testing.assert_close(found[b][:, order], expected, atol=1e-5, rtol=1e-5)
    plain = sharing.shared(call, Source(source.k, source.v, None), op)
    assert call.text is not None
    rows = slice(*call.text)
    torch.testing.assert_close(found[:, :, rows], plain[:, :, rows])


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_masks_that_are_all_alike_are_plain_sharing(threshold: float) -> None:
    call, source = a_call(1), a_call(2)
    bits = [maps.bits(torch.rand(GRID.tokens), GRID, threshold) for _ in range(2)]
    found = sharing.guided(call, Source(source.k, source.v, None, bits[0]), bits[1], op)
    torch.testing.assert_close(found, sharing.shared(call, Source(source.k, source.v, None), op))


def test_key_padding_goes_with_the_sources_keys() -> None:
    call, source = a_call(1, text="last"), a_call(2, text="last")
    mask = torch.ones(2, 1, 1, N, dtype=torch.bool)
    mask[..., -2:] = False
    here, there = some_bits(1), some_bits(2)
    found = sharing.guided(call, Source(source.k, source.v, mask, there), here, op)
    cut = Source(source.k[:, :, :-2], source.v[:, :, :-2], None, there)
    torch.testing.assert_close(found, sharing.guided(call, cut, here, op))  # also: a source with fewer words


def test_without_text_a_class_that_the_source_lacks_shares_everything() -> None:
    call, source = a_call(1, kind="self"), a_call(2, kind="self")
    n = GRID.tokens
    call = call.replace(q=call.q[:, :, :n], k=call.k[:, :, :n], v=call.v[:, :, :n], text=None)
    k, v = source.k[:, :, :n], source.v[:, :, :n]
    here, nothing = some_bits(1), torch.zeros(n, dtype=torch.bool)
    found = sharing.guided(call, Source(k, v, None, nothing), here, op)
    torch.testing.assert_close(found, op(call.replace(k=k, v=v)))


# --- reweighting ----------------------------------------------------------------------------------------------


def reweighted_dense(call: AttentionCall, scales: dict[int, float], by: str) -> Tensor:
    assert call.text is not None
    text, video = call.text.start, maps.video_of(call.text, N)
    factor = torch.full((N, N), 1.0 if by == "prob" else 0.0)
    for token, c in scales.items():
        factor[video, text + token] = c
        factor[text + token, video] = c
    if by == "logit":
        return oracle.dense(call.q, call.k, call.v, factor)[0]
    p = oracle.dense(call.q, call.k, call.v)[1] * factor
    return p @ call.v


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("by", ["prob", "logit"])
def test_reweighting_by_correction_is_the_dense_one(by: reweighting.By, text: str) -> None:
    call, scales = a_call(4, text=text), {1: 0.0, 2: 2.5}
    found = reweighting.reweighted(call, tuple(scales.items()), by, op)
    torch.testing.assert_close(found, reweighted_dense(call, scales, by), atol=2e-5, rtol=1e-4)
    others = [t for t in range(TEXT) if t not in scales]
    rows = [call.text.start + t for t in others]  # type: ignore[union-attr]
    torch.testing.assert_close(found[:, :, rows], op(call)[:, :, rows], atol=1e-6, rtol=1e-5)


def test_factors_that_change_nothing_change_nothing() -> None:
    call = a_call(5)
    assert torch.equal(reweighting.reweighted(call, ((1, 1.0),), "prob", op), op(call))
    torch.testing.assert_close(reweighting.reweighted(call, ((1, 0.0),), "logit", op), op(call))


def test_places_that_a_shorter_text_does_not_have_are_left_out() -> None:
    call = a_call(5)
    assert torch.equal(reweighting.reweighted(call, ((TEXT, 0.0),), "prob", op), op(call))
    both = reweighting.reweighted(call, ((1, 0.0), (TEXT + 3, 2.0)), "prob", op)
    assert torch.equal(both, reweighting.reweighted(call, ((1, 0.0),), "prob", op))


def test_row_mass_is_not_normalised_again() -> None:
    call, c = a_call(6), 3.0
    ones = call.replace(v=torch.ones_like(call.v))
    found = reweighting.reweighted(ones, ((2, c),), "prob", op)[..., 0]
    p = oracle.dense(call.q, call.k, call.v)[1]
    torch.testing.assert_close(found[:, :, TEXT:], 1 + (c - 1) * p[:, :, TEXT:, 2])
    torch.testing.assert_close(found[:, :, 2], 1 + (c - 1) * p[:, :, 2, TEXT:].sum(-1))


# --- options --------------------------------------------------------------------------------------------------


def test_default_layers_are_the_last_sixth() -> None:
    recipe = DiTCtrl()
    assert recipe.shared_layers(30) == frozenset(range(25, 30))
    assert recipe.shared_layers(42) == frozenset(range(35, 42))
    assert recipe.shared_layers(2) == {1}
    assert DiTCtrl(kv_layers="-2-").shared_layers(6) == {4, 5}


@pytest.mark.parametrize(
    ("options", "words_of_it"),
    [
        ({"layers": "2-"}, "kv_layers"),
        ({"steps": (0.1, 0.5)}, "kv_steps"),
        ({"targets": ["attn1"]}, "leave it out"),
        ({"kv_steps": (5, 5)}, "empty"),
        ({"kv_layers": "x"}, "cannot read"),
        ({"overlap": -1}, "greater than or equal to 0"),
        ({"mode": "edit"}, "mode"),
        ({"mode": "reweight"}, "reweight"),
        ({"reweight": {"red": 0.0}}, "reweight"),
        ({"mode": "reweight", "reweight": {"red": -1.0}}, "negative"),
        ({"objects": [3]}, "objects"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], words_of_it: str) -> None:
    with pytest.raises(InvalidOption, match=words_of_it):
        DiTCtrl.build(options)
