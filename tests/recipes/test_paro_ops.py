"""One attention op of PARO against attention written out: orders, masks, text, padding, shared keys, half precision."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from patchkit import kernels
from patchkit.context import AttentionCall, Grid, Span
from patchkit.recipes.paro import runtime
from patchkit.recipes.paro.geometry import Geometry
from patchkit.recipes.paro.runtime import Choice
from patchkit.sites import Site

ORDERS = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1)]
GRID = (4, 5, 7)
FIRST, LAST, NONE = "text first", "text last", "no text"


@dataclasses.dataclass
class Case:
    """A call, its geometry, and what each head does."""

    call: AttentionCall
    geometry: Geometry
    choice: Choice
    valid: tuple[int, ...] | None = None

    def attend(self, apart: bool = False, qk: str = "none", pv: str = "none") -> torch.Tensor:
        layouts = runtime.make_layouts(self.choice, self.geometry, self.valid, torch.device("cpu"), apart)
        return runtime.attend(self.call, self.choice.codes, self.geometry, layouts, qk, pv)

    def blocks(self) -> torch.Tensor:
        """Bool (H, n, n) over the whole sequence."""
        g = self.geometry
        found = torch.ones(len(self.choice.codes), g.total, g.total, dtype=torch.bool)
        found[:, g.first : g.last, g.first : g.last] = self.choice.keep
        return found

    def order(self, code: int) -> torch.Tensor:
        """Tokens of the sequence in an order, from the definition of the orders alone."""
        start, count = self.geometry.start, math.prod(GRID)
        found = torch.arange(self.geometry.tokens)
        image = torch.arange(count).view(GRID).permute(ORDERS[code]).reshape(-1)
        found[start : start + count] = image + start
        return found

    def wanted(self) -> torch.Tensor:
        """fp64 attention with the blocks written out as a mask, renormalised over what is kept."""
        q, k, v = (x.double() for x in (self.call.q, self.call.k, self.call.v))
        group, block, n = q.shape[1] // k.shape[1], self.geometry.block, self.geometry.tokens
        out = torch.empty_like(q)
        for h, code in enumerate(self.choice.codes):
            rows = self.order(code)
            mask = self.blocks()[h].repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
            for b in range(q.shape[0]):
                here = mask if self.valid is None else mask & (torch.arange(n) < self.valid[b])
                s = q[b, h, rows] @ k[b, h // group, rows].T * q.shape[-1] ** -0.5
                values = v[b, h // group, rows].nan_to_num(0.0)
                out[b, h, rows] = s.nan_to_num(0.0).masked_fill(~here, float("-inf")).softmax(-1) @ values
        return out


def make(
    where=FIRST, heads=6, shared=6, batch=1, text=26, block=16, density=0.4, codes=None, D=64, dtype=torch.float32
):
    """A call with random tokens in strided views; by default every order is there."""
    g = torch.Generator().manual_seed(0)
    n = math.prod(GRID) + (0 if where == NONE else text)
    q, k, v = (torch.randn(batch, n, h, D, generator=g).to(dtype).transpose(1, 2) for h in (heads, shared, shared))
    span = {FIRST: Span(0, text), LAST: Span(n - text, n), NONE: None}[where]
    kind = "self" if where == NONE else "joint"
    site = Site("t", "a", torch.nn.Identity(), kind, 0, heads)
    call = AttentionCall(q, k, v, None, None, False, site, grid=Grid(*GRID), text=span)
    geometry = Geometry.of(call, block)
    assert isinstance(geometry, Geometry)
    keep = torch.rand(heads, geometry.count, geometry.count, generator=g) < density
    keep |= torch.eye(geometry.count, dtype=torch.bool)
    codes = tuple(h % 6 for h in range(heads)) if codes is None else codes
    return Case(call, geometry, Choice(codes, keep, torch.zeros(heads, dtype=torch.bool)))


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("where", [FIRST, LAST, NONE])
@pytest.mark.parametrize(("D", "text", "block"), [(64, 26, 16), (80, 32, 16), (128, 7, 32)])
def test_equals_masked_attention_in_each_heads_order(where, D, text, block):
    case = make(where, D=D, text=text, block=block)
    out = case.attend()
    assert distance(out, case.wanted()) < 1e-5
    assert abs(float(out.norm() / case.wanted().norm()) - 1) < 1e-5
    assert not case.choice.keep.all()


@pytest.mark.parametrize("code", range(6))
def test_everything_kept_is_dense_attention_for_every_order(code):
    """Oracle 1: fp32 to 1e-5, bf16 within twice the error of torch's own op."""
    case = make(density=2.0, codes=(code,) * 6)
    exact = case.wanted()
    assert distance(case.attend(), exact) < 1e-5
    half = make(density=2.0, codes=(code,) * 6, dtype=torch.bfloat16)
    exact = half.wanted()
    own = F.scaled_dot_product_attention(half.call.q, half.call.k, half.call.v)
    assert distance(half.attend(), exact) <= 2 * distance(own, exact)


@pytest.mark.parametrize("where", [FIRST, LAST])
def test_text_is_dense_whatever_the_mask(where):
    """Oracle 3: text rows equal dense attention, and every image row sees every text key."""
    case = make(where, density=0.0)
    out, (q, k, v) = case.attend(), (case.call.q, case.call.k, case.call.v)
    dense = F.scaled_dot_product_attention(q, k, v)
    text = slice(case.call.text.start, case.call.text.stop)
    assert torch.allclose(out[:, :, text], dense[:, :, text], atol=1e-5)
    assert distance(out, dense) > 0.1
    case.call.v = torch.zeros_like(v)
    case.call.v[:, :, text] = 1.0
    assert float(case.attend().min()) > 0


def test_rows_of_probabilities_sum_to_one():
    case = make()
    case.call.v = torch.ones_like(case.call.v)
    assert torch.allclose(case.attend(), torch.ones_like(case.call.q), atol=1e-5)


@pytest.mark.parametrize("where", [FIRST, NONE])
def test_dropped_blocks_are_not_read(where):
    """Oracle 4: a key block that no image row keeps holds NaN; rows that are always computed (text) are left aside."""
    case = make(where)
    g, dropped = case.geometry, 3
    case.choice.keep[:, :, dropped], case.choice.keep[:, :, 0] = False, True
    clean = case.attend()
    place = (g.first + dropped) * g.block
    for x in (case.call.k, case.call.v):
        for h, code in enumerate(case.choice.codes):
            x[:, h, case.order(code)[place : place + g.block]] = float("nan")
    out = case.attend()
    for h, code in enumerate(case.choice.codes):
        rows = case.order(code)[g.span]
        assert torch.equal(out[:, h, rows], clean[:, h, rows])


def test_two_samples_at_once_are_two_samples():
    """Oracle 11: guidance in one batch or in two calls."""
    case = make(batch=2)
    both = case.attend()
    for b in range(2):
        one = {n: getattr(case.call, n)[b : b + 1] for n in "qkv"}
        alone = dataclasses.replace(case, call=case.call.replace(**one)).attend()
        assert torch.equal(alone[0], both[b])


@pytest.mark.parametrize(("qk", "pv"), [("none", "none"), ("int8", "int8")])
def test_query_heads_that_share_keys_have_orders_of_their_own(qk, pv):
    """Oracle 15."""
    case = make(shared=2)
    repeated = make(shared=2)
    repeated.call.k, repeated.call.v = (x.repeat_interleave(3, 1) for x in (case.call.k, case.call.v))
    out = case.attend(qk=qk, pv=pv)
    assert distance(out, repeated.attend(qk=qk, pv=pv)) < 1e-5
    assert distance(out, case.wanted()) < (0.05 if qk == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("qk", "pv", "apart"), [("none", "none", False), ("int8", "int8", False), ("int4", "int4", True)]
)
def test_the_models_tensors_are_left_alone(qk, pv, apart):
    case = make()
    before = [x.clone() for x in (case.call.q, case.call.k, case.call.v)]
    case.attend(apart, qk, pv)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.call.q, case.call.k, case.call.v), strict=True))


# --- text that is not rounded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [FIRST, LAST])
@pytest.mark.parametrize(("text", "block", "shared"), [(26, 16, 6), (32, 16, 2), (7, 32, 3)])
def test_text_apart_without_rounding_is_the_same_attention(where, text, block, shared):
    """The parts are joined exactly; with nothing rounded it is masked attention again."""
    from patchkit.recipes.paro import text_apart

    case = make(where, text=text, block=block, shared=shared)
    layouts = runtime.make_layouts(case.choice, case.geometry, None, torch.device("cpu"), True)
    assert layouts.image is not None
    moved = kernels.reorder_heads(
        case.call.q, case.call.k, case.call.v, codes=case.choice.codes, grid=GRID, start=case.geometry.start
    )
    out = text_apart.attend_apart(*moved, case.geometry, layouts.image, None, "none", "none", None)
    (out,) = kernels.reorder_heads(out, codes=case.choice.codes, grid=GRID, start=case.geometry.start, inverse=True)
    assert distance(out, case.wanted()) < 1e-5


@pytest.mark.parametrize("where", [FIRST, LAST])
def test_text_apart_is_not_rounded(where):
    case = make(where)
    exact = case.wanted()
    text = slice(case.call.text.start, case.call.text.stop)
    rounded, spared = case.attend(False, "int4", "int4"), case.attend(True, "int4", "int4")
    assert distance(spared[:, :, text], exact[:, :, text]) < 1e-5
    assert distance(rounded[:, :, text], exact[:, :, text]) > 0.01
    image = slice(text.stop, None) if where == FIRST else slice(0, text.start)
    assert (
        0.001 < distance(spared[:, :, image], exact[:, :, image]) < distance(rounded[:, :, image], exact[:, :, image])
    )


@pytest.mark.parametrize(("qk", "pv", "apart", "limit"), [("none", "none", False, 1e-5), ("int8", "int8", True, 0.05)])
def test_padding_behind_the_text(qk, pv, apart, limit):
    case = make(LAST, batch=2)
    case.valid = (166, 150)
    for x in (case.call.k, case.call.v):
        x[1, :, 150:] = 1e3
    out, exact = case.attend(apart, qk, pv), case.wanted()
    assert distance(out[0], exact[0]) < limit
    assert distance(out[1, :, :150], exact[1, :, :150]) < limit
