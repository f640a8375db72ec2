"""DeltaLLM's options, windows, and element mode against its formulas, one attention op at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.context import AttentionCall, Moment
from patchkit.errors import InvalidOption
from patchkit.kernels import dead_band
from patchkit.ledger import Ledger
from patchkit.recipes.deltallm import DeltaLLM
from patchkit.recipes.deltallm.windows import Border, Window
from patchkit.sites import Site

SITE = Site("model", "layers.0.self_attn", torch.nn.Identity(), "self", 0, 4, layers=1)


def dense(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, attn_mask=call.mask, is_causal=call.causal, scale=call.scale, enable_gqa=True
    )


def run(recipe: DeltaLLM, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Ledger]:
    ledger = Ledger()
    call = AttentionCall(q, k, v, mask, None, mask is None, SITE, moment=Moment(0), ledger=ledger)
    return recipe.attend(call, dense), ledger


def qkv(tokens: int, heads: int = 4, kv: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that move a little from token to token."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(1, kv, tokens, dim, generator=g).mul_(0.5).cumsum_(2).remainder_(4) - 2
    q, v = torch.randn(1, heads, tokens, dim, generator=g), torch.randn(1, kv, tokens, dim, generator=g)
    return q, k, v


def elements(**options) -> DeltaLLM:
    return DeltaLLM(mode="elements", **options)


def runs(**options) -> DeltaLLM:
    return DeltaLLM(**{"min_tokens": 0, "chunk": 8, **options})


def direct(q: Tensor, k: Tensor, v: Tensor, theta: float, exact: Tensor) -> Tensor:
    """Softmax over S where exact and S' elsewhere, causal, as section 2.3 orders it."""
    khat, _ = dead_band(k, theta)
    group = q.shape[1] // k.shape[1]
    s, approximate = (q @ x.repeat_interleave(group, 1).transpose(-1, -2) for x in (k, khat))
    s = torch.where(exact, s, approximate) * q.shape[-1] ** -0.5
    n = torch.arange(k.shape[2])
    return s.masked_fill(n > n[:, None], float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": -0.1}, "no threshold"),
        ({"theta": 1.5, "metric": "cosine"}, "-1 to 1"),
        ({"theta": []}, "empty"),
        ({"theta": [0.5, float("nan")]}, "no threshold"),
        ({"mode": "elements", "chunk": 64}, "elements mode has no such option"),
        ({"mode": "elements", "metric": "cosine"}, "elements mode has no such option"),
        ({"chunk": 1}, "chunk"),
        ({"window": 1.5}, "window"),
        ({"window": -1}, "window"),
        ({"heads": "0"}, "does not work per head"),
        ({"stages": "none"}, "stages"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        DeltaLLM(**options)


def test_a_list_of_thresholds_must_fit_the_model() -> None:
    recipe = DeltaLLM(theta=[0.5, 0.6])
    with pytest.raises(InvalidOption, match="2 thresholds for 1 layers"):
        recipe.prepare(None, [SITE])
    assert DeltaLLM(theta=[0.25]).threshold(SITE) == 0.25
    assert DeltaLLM(metric="cosine").threshold(SITE) == 0.83


# --- windows ------------------------------------------------------------------------------------------------------


def test_width_of_a_window() -> None:
    assert Window(0.05, "block").width(400) == 20
    assert Window(0.05, "block").width(9) == 0, "as the authors' code: too short for a window"
    assert Window(0.05, "sliding").width(9) == 16
    assert Window(7, "sliding").width(4000) == 7
    assert Window(16, "sliding").exact_share(8) == 1.0


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 20, 0.0, 0.05, 0.3, 1.0])
def test_the_border_keeps_the_window_and_never_moves_back(kind: str, size: float) -> None:
    border, chunk, prompt = Border(Window(size, kind), 8), 8, 200  # type: ignore[arg-type]
    places = [border.exact_from(b, prompt) for b in range(60)]
    assert places == sorted(places)
    for position in range(480):
        start = places[position // chunk]
        assert start % chunk == 0
        assert start <= position // chunk * chunk
        width = Window(size, kind).width(prompt if kind == "block" else position // chunk * chunk + 1)  # type: ignore[arg-type]
        if kind == "sliding":
            assert position + 1 - start >= min(width, position + 1)
            assert position + 1 - start < width + 2 * chunk
        elif width:
            assert start <= position // width * width or position // width * width > position // chunk * chunk


def test_the_first_tokens_stay_dense() -> None:
    border = Border(Window(8, "sliding"), 8, dense=50)
    assert [border.exact_from(b, 0) for b in range(9)] == [0] * 7 + [48, 56]


# --- element mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize(("tokens", "window"), [(1, 8), (7, 8), (8, 8), (9, 8), (61, 8), (61, 0), (300, 0.05)])
def test_elements_mode_follows_its_formula(kind: str, tokens: int, window: float) -> None:
    q, k, v = qkv(tokens)
    out, _ = run(elements(theta=0.7, window=window, window_kind=kind, sink=3), q, k, v)
    w = Window(window, kind).width(tokens)  # type: ignore[arg-type]
    n = torch.arange(tokens)
    near = (n[:, None] - n < w) if kind == "sliding" else (n[:, None] // max(w, 1) == n // max(w, 1)) & (w > 0)
    torch.testing.assert_close(out, direct(q, k, v, 0.7, near | (n < 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [elements, runs])
def test_theta_zero_is_dense_attention(make) -> None:
    q, k, v = qkv(70)
    for window in (0, 0.05, 16):
        out, _ = run(make(theta=0.0, window=window), q, k, v)
        torch.testing.assert_close(
            out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), atol=1e-5, rtol=1e-5
        )


def test_without_threshold_and_window_the_output_is_the_running_mean_of_the_values() -> None:
    q, k, v = qkv(50, heads=2)
    out, _ = run(elements(theta=float("inf"), window=0, sink=0), q, k, v)
    mean = v.cumsum(2) / torch.arange(1, 51).view(1, 1, -1, 1)
    torch.testing.assert_close(out, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [elements, runs])
@pytest.mark.parametrize("window", [1.0, 70, 1000])
def test_a_window_over_everything_is_dense_attention(make, window: float) -> None:
    q, k, v = qkv(70)
    out, _ = run(make(theta=9.0, window=window), q, k, v)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    narrow, _ = run(make(theta=9.0, window=8), q, k, v)
    assert float((narrow - wanted).norm() / wanted.norm()) > 0.05


def test_the_papers_sparsity_by_hand() -> None:
    """Four tokens, two elements, theta 0.5: 4 of 8 changes are 0; a window of one token leaves 3/4 of that."""
    k = torch.tensor([[[[1.0, 0.0], [1.5, 0.2], [1.6, 1.0], [1.1, 1.0]]]])
    _, ledger = run(elements(theta=0.5, window=1), k, k, k)
    assert ledger.to_dict()["values"]["unchanged"] == [[0.5]]
    assert ledger.to_dict()["values"]["sparsity"] == [[0.375]]


@pytest.mark.parametrize("make", [elements, runs])
@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31])
def test_causality(make, kind: str, tokens: int) -> None:
    """Changing a token never changes what comes before it: in runs, at their borders, at those of the window."""
    q, k, v = qkv(tokens)
    recipe = make(theta=1.5, window=8, window_kind=kind)
    before, _ = run(recipe, q, k, v)
    for n in range(0, tokens, 3):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, n] += 3.0
        v2[:, :, n] -= 2.0
        after, _ = run(recipe, q, k2, v2)
        assert torch.equal(after[:, :, :n], before[:, :, :n])
        assert not torch.equal(after[:, :, n], before[:, :, n])


@pytest.mark.parametrize("make", [elements, runs])
def test_left_padding_is_as_if_alone(make) -> None:
    """Chunks, references and windows count from the first real token, whatever the padding holds."""
    tokens, pad = 41, 13
    q, k, v = qkv(tokens)
    recipe = make(theta=1.2, window=9)
    alone = [run(recipe, q, k, v)[0], run(recipe, *(x[:, :, pad:] for x in (q, k, v)))[0]]
    n = torch.arange(tokens)
    causal = (n <= n[:, None]).expand(2, 1, -1, -1)
    mask = causal & torch.stack([n >= 0, n >= pad]).view(2, 1, 1, -1)
    q, k, v = (torch.cat([x, torch.cat([x[:, :, :pad] * 0 + 5.0, x[:, :, pad:]], 2)]) for x in (q, k, v))
    out, ledger = run(recipe, q, k, v, mask)
    assert not ledger.dense
    torch.testing.assert_close(out[:1], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1:, :, pad:], alone[1], atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()
    additive = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    again, _ = run(recipe, q, k, v, additive)
    torch.testing.assert_close(again[1:, :, pad:], alone[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.tril().triu(-5), "not plainly causal"),
        (lambda m: m | (torch.arange(20) < 9), "not plainly causal"),
        (lambda m: m & (torch.arange(20) < 17), "padding on the left"),
    ],
)
def test_runs_mode_leaves_other_masks_dense_and_says_so(change, reason: str) -> None:
    q, k, v = qkv(20)
    mask = change(torch.ones(20, 20, dtype=torch.bool).tril())[None, None]
    out, ledger = run(runs(theta=1.0, window=4), q, k, v, mask)
    assert reason in next(iter(ledger.dense))
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


def test_mean_keys_and_measures_make_a_difference() -> None:
    q, k, v = qkv(120)
    outs = [
        run(runs(window=8, **options), q, k, v)[0]
        for options in (
            {"theta": 1.5},
            {"theta": 1.5, "run_key": "mean"},
            {"theta": 2.0, "metric": "euclidean"},
            {"theta": 0.8, "metric": "cosine"},
            {"theta": 1.5, "sink": 30},
            {"theta": 1.5, "window_kind": "block"},
        )
    ]
    for i, a in enumerate(outs):
        assert all(not torch.allclose(a, b, atol=1e-4) for b in outs[:i])


def test_short_sequences_stay_dense_and_say_so() -> None:
    q, k, v = qkv(30)
    out, ledger = run(DeltaLLM(theta=3.0, window=4, chunk=8), q, k, v)
    assert torch.equal(out, dense(AttentionCall(q, k, v, None, None, True, SITE)))
    assert list(ledger.dense) == ["no more than 4096 tokens (min_tokens)"]


@pytest.mark.parametrize("stages", ["prefill", "decode"])
def test_stages(stages: str) -> None:
    q, k, v = qkv(30)
    for make in (elements, runs):
        _, ledger = run(make(theta=1.0, window=4, stages=stages), q, k, v)
        assert bool(ledger.dense) == (stages == "decode")


def test_recorded_gradients_run_dense() -> None:
    q, k, v = qkv(30)
    for which in range(3):
        given = [x.clone().requires_grad_(i == which) for i, x in enumerate((q, k, v))]
        out, ledger = run(runs(theta=1.0, window=4), *given)
        assert list(ledger.dense) == ["recorded gradients"]
        assert out.requires_grad
