"""Attention over classes of keys, and redistribution from sinks, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchkit.kernels import KernelTypeError, KernelValueError, class_attention, redistribute
from patchkit.kernels.classes import HIDDEN
from patchkit.kernels.classes.reference import class_attention_reference
from patchkit.kernels.redistribute import (
    OTHER,
    TARGET,
    TEXT_SINK,
    VISUAL_SINK,
    decode_obstacle,
    redistribute_decode,
)
from patchkit.kernels.redistribute.reference import redistribute_map, redistribute_reference

GATES: dict[str, Any] = {"recycle": 0.6, "rho": 0.5, "least": 0.2}


def kinds(B: int, M: int, seed: int = 0, count: int = 4) -> Tensor:
    return torch.randint(0, count, (B, M), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def some_mask(B: int, H: int, N: int, M: int) -> Tensor:
    return torch.rand(B, H, N, M, generator=torch.Generator().manual_seed(5)) > 0.3


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


CASES = pytest.mark.parametrize(
    ("H", "Hkv", "N", "M", "D", "extra"),
    [
        (2, 2, 5, 63, 64, {}),
        (4, 1, 1, 200, 80, {"mask": "bool"}),
        (4, 2, 7, 33, 16, {"mask": "additive", "scale": 0.3}),
        (2, 1, 3, 40, 32, {"softcap": 2.0, "mask": "bool"}),
        (2, 2, 4, 50, 16, {"boost": (0.0, 0.2, 0.0, -0.1)}),
        (1, 1, 2, 9, 8, {"boost": (0.5, 0.0, 0.2, 0.0), "softcap": 3.0}),
    ],
    ids=["plain", "decode", "additive", "softcap", "boost", "all"],
)


def options(extra: dict[str, Any], B: int, H: int, N: int, M: int) -> dict[str, Any]:
    extra = dict(extra)
    if "mask" in extra:
        mask = some_mask(B, 1, N, M)
        extra["mask"] = mask if extra["mask"] == "bool" else torch.where(mask, 0.25, float("-inf"))
    return extra


@CASES
def test_classes_against_the_formula(qkv, close, H, Hkv, N, M, D, extra) -> None:
    q, k, v = qkv(2, H, Hkv, N, M, D)
    classes = kinds(2, M)
    classes[0, 2] = HIDDEN
    classes[1][classes[1] == 2] = 0  # an empty class
    extra = options(extra, 2, H, N, M)
    parts = class_attention(q, k, v, classes, 4, **extra)
    outs, lses = class_attention_reference(q, k, v, classes, 4, **extra)
    for number in range(4):
        close(parts.output(number), outs[:, :, :, number])
        lse = parts.lse(number)
        assert torch.equal(lse.isneginf(), lses[..., number].isneginf())
        assert torch.allclose(lse, lses[..., number], atol=1e-5)
    assert not parts.output(2)[1].any()
    both = torch.logaddexp(lses[..., 1], lses[..., 3])
    joined = (lses[..., [1, 3]] - both[..., None]).exp().nan_to_num(0.0)
    close(parts.output(1, 3), (outs[:, :, :, [1, 3]] * joined[..., None]).sum(3))
    assert torch.allclose(parts.share(0, 1, 2, 3), torch.ones(2, H, N), atol=1e-6)
    some = torch.randn(2, H, N, 4, generator=torch.Generator().manual_seed(2))
    close(parts.mixed(some), (outs * (parts.sums * some)[..., None]).sum(3), 1e-5)


def test_all_classes_together_are_dense_attention(qkv, close) -> None:
    q, k, v = qkv(2, 4, 2, 6, 70, 64)
    mask = some_mask(2, 1, 6, 70)
    parts = class_attention(q, k, v, kinds(2, 70), 4, mask=mask)
    close(parts.output(0, 1, 2, 3), dense(q, k, v, mask))


def test_boost_is_that_of_pai(qkv, close) -> None:
    """Logits of image tokens raised by a share of their size, before the softmax."""
    q, k, v = qkv(1, 2, 2, 3, 30, 16)
    image = kinds(1, 30, count=2)
    s = q @ k.transpose(-1, -2) / 4
    s = torch.where(image[:, None, None].bool(), s + 0.2 * s.abs(), s)
    close(class_attention(q, k, v, image, 2, boost=(0.0, 0.2)).output(0, 1), s.softmax(-1) @ v)


def test_rows_that_see_nothing_are_zero(qkv) -> None:
    q, k, v = qkv(1, 2, 1, 3, 8, 16)
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool)
    mask[:, :, 1] = False
    parts = class_attention(q, k, v, kinds(1, 8), 4, mask=mask)
    assert not parts.output(0, 1, 2, 3)[:, :, 1].any()
    assert not parts.share(0)[:, :, 1].any()
    moved = redistribute(dense(q, k, v, mask), q, k, v, kinds(1, 8), mask=mask, **GATES)
    assert not moved.selected[:, :, 1].any()
    assert moved.out.isfinite().all()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("group", [1, 4])
def test_closed_form_is_the_explicit_map(qkv, close, dtype, limit, group) -> None:
    q, k, v = qkv(2, 4, 4 // group, 9, 77, 64, dtype)
    classes, mask = kinds(2, 77), some_mask(2, 1, 9, 77)
    allowed = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    out = dense(q, k, v, mask)
    moved = redistribute(out, q, k, v, classes, mask=mask, allowed=allowed, **GATES)
    wanted, selected = redistribute_reference(q, k, v, classes, mask=mask, allowed=allowed, **GATES)
    assert 0.1 < selected.float().mean() < 0.9
    assert torch.equal(moved.selected, selected)
    assert moved.out.dtype == dtype
    close(moved.out, wanted, limit)
    assert torch.equal(moved.out[~selected], out[~selected])


def weights(recycle: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows before and after (values are the unit vectors), their classes, and which were edited."""
    torch.manual_seed(0)
    M = 24
    q, k = torch.randn(1, 2, 6, 16) * 2, torch.randn(1, 1, M, 16)
    v = torch.eye(M)[None, None].repeat(1, 1, 1, 1)
    classes = kinds(1, M)
    before = (q @ k.repeat(1, 2, 1, 1).transpose(-1, -2) / 4).softmax(-1)
    vv = torch.cat((v, torch.zeros(1, 1, M, 0)), -1)
    kk = F.pad(k, (0, M - 16))
    qq = F.pad(q, (0, M - 16))
    moved = redistribute(before, qq, kk, vv, classes, recycle=recycle, rho=0.3, least=0.1, scale=0.25)
    return before, moved.out, classes[0], moved.selected


@pytest.mark.parametrize("recycle", [0.4, 0.6, 1.0])
def test_rows_of_the_edited_map(recycle: float) -> None:
    before, after, classes, selected = weights(recycle)
    assert selected.any()
    old, new = before[selected], after[selected]
    sink, target = (classes == TEXT_SINK) | (classes == VISUAL_SINK), classes == TARGET
    assert torch.allclose(new.sum(-1), torch.ones(len(new)), atol=1e-6)
    assert torch.equal(new[:, classes == OTHER], old[:, classes == OTHER])
    assert torch.allclose(new[:, sink], (1 - recycle) * old[:, sink], atol=1e-7)
    ratio = new[:, target] / old[:, target]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5)
    assert (ratio > 1).all()
    assert torch.equal(after[~selected], before[~selected])


def test_the_map_itself_does_the_same() -> None:
    before, after, classes, selected = weights(0.6)
    edited, chosen = redistribute_map(before, classes[None], 0.6, 0.3, 0.1)
    assert torch.equal(chosen, selected)
    assert torch.allclose(edited, after, atol=1e-6)


def test_all_recycled_leaves_nothing_on_sinks(qkv, close) -> None:
    q, k, v = qkv(1, 2, 2, 4, 50, 64)
    classes = kinds(1, 50)
    out = dense(q, k, v)
    moved = redistribute(out, q, k, v, classes, recycle=1.0, rho=0.0, least=0.0)
    parts = class_attention(q, k, v, classes, 4)
    a_s = parts.share(TEXT_SINK, VISUAL_SINK)
    close(moved.out, out + a_s[..., None] * (parts.output(TARGET) - parts.output(TEXT_SINK, VISUAL_SINK)), 1e-5)
    close(moved.mass, a_s, 1e-6)


@pytest.mark.parametrize(
    ("visual_sinks", "targets", "others", "rho", "least", "edited"),
    [
        (1, 1, 8, 0.5, 0.2, True),  # a_V = 2/10 and r = 1/2: both on the border
        (1, 4, 20, 0.8, 0.2, True),
        (3, 7, 40, 0.7, 0.2, True),
        (1, 1, 8, 0.5, 0.201, False),
        (1, 1, 9, 0.5, 0.2, False),
        (2, 1, 3, 0.5, 0.2, False),
        (1, 1, 8, 0.501, 0.2, False),
    ],
)
def test_on_the_border_is_inside(visual_sinks, targets, others, rho, least, edited) -> None:
    """Equal logits: shares are counts of keys."""
    classes = torch.tensor([[VISUAL_SINK] * visual_sinks + [TARGET] * targets + [OTHER] * others], dtype=torch.uint8)
    k = torch.zeros(1, 1, classes.shape[1], 8)
    v = torch.randn(1, 1, classes.shape[1], 8, generator=torch.Generator().manual_seed(0))
    q = torch.ones(1, 2, 1, 8)
    out = dense(q, k, v)
    moved = redistribute(out, q, k, v, classes, recycle=0.5, rho=rho, least=least)
    assert moved.selected.all() if edited else not moved.selected.any()
    assert torch.equal(moved.out, out) is not edited


def test_heads_that_share_keys_are_judged_one_by_one() -> None:
    """GQA: one query head looks at the image, its neighbour at the text."""
    k = torch.zeros(1, 1, 6, 8)
    k[0, 0, :3, 0], k[0, 0, 3:, 1] = 1, 1
    classes = torch.tensor([[VISUAL_SINK, TARGET, TARGET, OTHER, OTHER, OTHER]], dtype=torch.uint8)
    q = torch.zeros(1, 2, 1, 8)
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 20, 20
    v = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = redistribute(dense(q, k, v), q, k, v, classes, recycle=0.6, rho=0.5, least=0.2)
    assert moved.selected[0, :, 0].tolist() == [True, False]


@pytest.mark.parametrize("change", [{"recycle": 0.0}, {"rho": 1.5}, {"rho": 1.0000001}, {"least": 1.0}])
def test_nothing_to_do_changes_no_bit(qkv, change) -> None:
    q, k, v = qkv(1, 2, 1, 5, 40, 32)
    out = dense(q, k, v)
    moved = redistribute(out, q, k, v, kinds(1, 40), **(GATES | {"rho": 0.0, "least": 0.0} | change))
    assert torch.equal(moved.out, out)


def test_without_targets_nothing_moves(qkv) -> None:
    q, k, v = qkv(1, 2, 1, 3, 20, 16)
    classes = kinds(1, 20, count=3)  # all visual tokens are sinks
    out = dense(q, k, v)
    assert torch.equal(redistribute(out, q, k, v, classes, recycle=0.6, rho=0.0, least=0.0).out, out)


def test_gradients_reach_the_inputs(qkv) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 3, 20, 16))
    classes = kinds(1, 20)
    gates = {"recycle": 0.6, "rho": 0.3, "least": 0.1}
    grads = torch.autograd.grad(redistribute(dense(q, k, v), q, k, v, classes, **gates).out.sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(redistribute_reference(q, k, v, classes, **gates)[0].sin().sum(), (q, k, v))
    for a, b in zip(grads, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"classes": torch.zeros(1, 20, dtype=torch.int64)}, KernelTypeError, "uint8"),
        ({"classes": torch.zeros(1, 21, dtype=torch.uint8)}, KernelValueError, "kv_len"),
        ({"k": torch.zeros(1, 2, 20, 8)}, KernelValueError, "k like v"),
        ({"q": torch.zeros(1, 3, 4, 16)}, KernelValueError, "multiple"),
        ({"q": torch.zeros(1, 2, 4, 16, dtype=torch.float16)}, KernelTypeError, "one floating dtype"),
        ({"count": 9}, KernelValueError, "1 to 8"),
        ({"boost": (0.1,)}, KernelValueError, "one a class"),
    ],
)
def test_bad_input_is_refused(qkv, change, error, told) -> None:
    q, k, v = qkv(1, 2, 2, 4, 20, 16)
    given = {"q": q, "k": k, "v": v, "classes": kinds(1, 20), "count": 4} | change
    with pytest.raises(error, match=told):
        class_attention(**given)


# --- one pass over keys and values, for a decoded token ---------------------------------------------------------------


@pytest.mark.parametrize(("H", "Hkv", "M", "D"), [(2, 2, 63, 64), (4, 1, 200, 80), (6, 2, 1000, 16)])
@pytest.mark.parametrize("extra", [{}, {"scale": 0.3}, {"softcap": 2.0}], ids=["plain", "scale", "softcap"])
def test_decoding_against_the_formula(qkv, close, H, Hkv, M, D, extra) -> None:
    q, k, v = qkv(2, H, Hkv, 1, M, D)
    q, k = q * 3, k.transpose(1, 2).contiguous().transpose(1, 2)
    classes, allowed = kinds(2, M), torch.tensor([[True], [False]])
    seen = torch.ones(2, 1, 1, M, dtype=torch.bool)
    seen[0, ..., :20] = False
    for rows in (None, allowed):
        moved = redistribute_decode(q, k, v, classes, allowed=rows, mask=seen, **GATES, **extra)
        wanted, selected = redistribute_reference(q, k, v, classes, allowed=rows, mask=seen, **GATES, **extra)
        assert selected.any()
        assert torch.equal(moved.selected, selected)
        close(moved.out, wanted, 2e-6)
        two_passes = redistribute(dense(q, k, v, seen), q, k, v, classes, allowed=rows, mask=seen, **GATES)
        assert extra or torch.allclose(moved.mass, two_passes.mass, atol=1e-6)
    close(redistribute_decode(q, k, v, classes, recycle=0.0, rho=0.5, least=0.2).out, dense(q, k, v), 2e-6)


def test_decoding_reads_nothing_of_hidden_keys_and_a_row_that_sees_none_is_0(qkv, close) -> None:
    q, k, v = qkv(2, 2, 1, 1, 40, 32)
    classes = kinds(2, 40)
    classes[0, 30:] = HIDDEN
    classes[1] = HIDDEN
    wanted = redistribute_reference(q, k, v, classes, **GATES)[0]
    k[0, :, 30:], v[0, :, 30:] = float("nan"), float("nan")
    moved = redistribute_decode(q, k, v, classes, **GATES)
    close(moved.out[:1], wanted[:1], 2e-6)
    assert not moved.out[1].any()


def test_decoding_on_the_border_is_inside() -> None:
    classes = torch.tensor([[2] + [3] + [0] * 8], dtype=torch.uint8)
    q, k, v = torch.ones(1, 2, 1, 16), torch.zeros(1, 1, 10, 16), torch.randn(1, 1, 10, 16)
    assert redistribute_decode(q, k, v, classes, recycle=0.5, rho=0.5, least=0.2).selected.all()
    assert not redistribute_decode(q, k, v, classes, recycle=0.5, rho=0.5, least=0.201).selected.any()


def test_what_decoding_in_one_pass_refuses(qkv) -> None:
    q, k, v = qkv(1, 2, 1, 1, 20, 16)
    classes = kinds(1, 20)
    assert decode_obstacle(q, k, v) is None
    assert "a mask that" in (decode_obstacle(q, k, v, torch.ones(1, 2, 1, 20, dtype=torch.bool)) or "")
    with pytest.raises(KernelValueError, match="several queries"):
        redistribute_decode(q.expand(1, 2, 3, 16), k, v, classes, **GATES)
    with pytest.raises(KernelValueError, match="classes"):
        redistribute_decode(q, k, v, classes[:, :9], **GATES)
    with pytest.raises(KernelTypeError):
        redistribute_decode(q, k, v, classes.int(), **GATES)
    assert decode_obstacle(q.half(), k.half(), v.half()) is not None, "torch's own is faster there"
