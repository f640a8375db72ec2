"""The decoding kernels of attention over classes of keys, interpreted, against their formulas."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.kernels import KernelValueError, class_attention
from patchkit.kernels.classes import HIDDEN
from patchkit.kernels.classes.reference import class_attention_reference
from patchkit.kernels.classes.triton import launch
from patchkit.kernels.redistribute import decode_obstacle, redistribute_decode
from patchkit.kernels.redistribute.reference import redistribute_reference

pytestmark = pytest.mark.usefixtures("nan_buffers")
GATES: dict[str, Any] = {"recycle": 0.6, "rho": 0.5, "least": 0.2}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchkit.kernels.gpu.obstacle", lambda device: None)
    monkeypatch.setattr(launch, "SPLIT_KEYS", 64)


def kinds(B: int, M: int, count: int = 4) -> Tensor:
    return torch.randint(0, count, (B, M), generator=torch.Generator().manual_seed(3)).to(torch.uint8)


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "M", "D", "dtype", "extra"),
    [
        (1, 2, 2, 63, 64, torch.float32, {}),
        (2, 4, 1, 200, 64, torch.float32, {}),
        (1, 7, 1, 200, 80, torch.float16, {"scale": 0.2}),
        (1, 2, 1, 130, 128, torch.float16, {}),
        (1, 2, 1, 100, 32, torch.float32, {"softcap": 2.0}),
    ],
    ids=["one split", "batch", "ragged D", "wide", "softcap"],
)
def test_parts(qkv, close, B, H, Hkv, M, D, dtype, extra) -> None:
    q, k, v = qkv(B, H, Hkv, 1, M, D, dtype)
    classes = kinds(B, M)
    classes[0, 5] = HIDDEN
    k[0, :, 5] = v[0, :, 5] = 1e4  # would show at once
    classes[-1][classes[-1] == 2] = 0
    parts = class_attention(q, k, v, classes, 4, **extra)
    assert type(parts).__name__ == "Accumulated"
    outs, lses = class_attention_reference(q, k, v, classes, 4, **extra)
    signs = torch.tensor([1.0, -2.0, 0.5, 1.0]).expand(*parts.sums.shape)
    wanted = (outs * (parts.sums * signs)[..., None]).sum(3)
    close(parts.mixed(signs), wanted, 1e-5 if dtype == torch.float32 else 5e-3)
    for number in range(4):
        close(parts.output(number), outs[:, :, :, number], 2e-6 if dtype == torch.float32 else 2e-3)
        lse = parts.lse(number)
        assert torch.equal(lse.isneginf(), lses[..., number].isneginf())
        assert torch.allclose(lse, lses[..., number], atol=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_other_numbers_of_classes(qkv, close, count) -> None:
    q, k, v = qkv(1, 3, 1, 1, 70, 32)
    classes = kinds(1, 70, count)
    parts = class_attention(q, k, v, classes, count)
    outs, _ = class_attention_reference(q, k, v, classes, count)
    for number in range(count):
        close(parts.output(number), outs[:, :, :, number])


@pytest.mark.parametrize(("H", "Hkv", "D", "dtype"), [(4, 2, 64, torch.float32), (4, 1, 80, torch.float16)])
def test_redistribution(qkv, close, H, Hkv, D, dtype) -> None:
    q, k, v = qkv(2, H, Hkv, 1, 150, D, dtype)
    q = q * 3
    classes, allowed = kinds(2, 150), torch.tensor([[True], [False]])
    hidden = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    hidden[0, ..., :20] = False
    for rows in (None, allowed):
        moved = redistribute_decode(q, k, v, classes, allowed=rows, mask=hidden, **GATES)
        wanted, selected = redistribute_reference(q, k, v, classes, allowed=rows, mask=hidden, **GATES)
        assert selected.any()
        assert torch.equal(moved.selected, selected)
        assert moved.out.dtype == dtype
        close(moved.out, wanted, 2e-6 if dtype == torch.float32 else 2e-3)
        assert (moved.mass > 0).equal(selected)


@pytest.mark.parametrize("change", [{"recycle": 0.0}, {"rho": 1.01}, {"least": 1.0}])
def test_nothing_to_do(qkv, close, change) -> None:
    q, k, v = qkv(1, 2, 1, 1, 80, 32)
    moved = redistribute_decode(q, k, v, kinds(1, 80), **(GATES | change))
    assert not moved.selected.any()
    close(moved.out, (q @ k.repeat(1, 2, 1, 1).transpose(-1, -2) / 32**0.5).softmax(-1) @ v.repeat(1, 2, 1, 1))


def test_strided_views_and_a_row_that_sees_nothing(qkv, close) -> None:
    q, k, v = qkv(2, 2, 2, 1, 90, 32)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    classes = kinds(1, 90)
    mask = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    mask[1] = False
    moved = redistribute_decode(q, k, v, classes, mask=mask, **GATES)
    assert not moved.out[1].any()
    close(moved.out[:1], redistribute_reference(q[:1], k[:1], v[:1], classes, **GATES)[0])


def test_on_the_border_is_inside() -> None:
    classes = torch.tensor([[2] + [3] + [0] * 8], dtype=torch.uint8)
    v = torch.randn(1, 1, 10, 16, generator=torch.Generator().manual_seed(0))
    q, k = torch.ones(1, 2, 1, 16), torch.zeros(1, 1, 10, 16)
    assert redistribute_decode(q, k, v, classes, recycle=0.5, rho=0.5, least=0.2).selected.all()
    assert not redistribute_decode(q, k, v, classes, recycle=0.5, rho=0.5, least=0.201).selected.any()


def halves(heads: int) -> dict[str, Tensor]:
    return {n: torch.zeros(1, h, m, 16).half() for n, h, m in (("q", heads, 1), ("k", 1, 20), ("v", 1, 20))}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": torch.zeros(1, 2, 3, 16)}, "several queries"),
        (
            {name: torch.zeros(1, h, n, 16).half() for name, h, n in (("q", 32, 1), ("k", 1, 20), ("v", 1, 20))},
            "32 query",
        ),
        ({"mask": torch.zeros(1, 1, 1, 20)}, "a mask that"),
        ({"mask": torch.ones(1, 2, 1, 20, dtype=torch.bool)}, "a mask that"),
    ],
)
def test_what_the_kernels_do_not_take(change, why) -> None:
    given = {"q": torch.zeros(1, 2, 1, 16), "k": torch.zeros(1, 1, 20, 16), "v": torch.zeros(1, 1, 20, 16)} | change
    assert why in (decode_obstacle(**given) or "")
    with pytest.raises(KernelValueError, match=why):
        redistribute_decode(**given, classes=kinds(1, 20), **GATES)


def test_decoding_of_a_model_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `var` on a tiny LLaVA, every decoded token through the kernels: the same as without them."""
    from tiny import generate
    from tiny.vlms import VLMS

    import patchkit

    edit = importlib.import_module("patchkit.recipes.var.edit")
    entry = VLMS["llava"]
    model = entry.build()
    options = {"layers": "2", "sink_dims": [3, 7], "tau": 1.0, "min_visual": 0.1}

    def scores() -> Tensor:
        with patchkit.apply(model, "var", **options):
            found = generate(entry, model, new_tokens=3, output_logits=True, return_dict_in_generate=True)
        return torch.stack(found.logits)

    plain = scores()
    monkeypatch.setattr(edit, "FUSED_KEYS", 1)
    calls = []
    kernel = edit.redistribute_decode
    monkeypatch.setattr(edit, "redistribute_decode", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    assert torch.allclose(scores(), plain, atol=1e-4)
    assert len(calls) == 2
