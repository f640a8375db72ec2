"""Plans of PARO: choice of orders, thresholds, buckets, files."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from patchkit.errors import InvalidOption
from patchkit.kernels import block_mass, block_statistics, dense_attention, reorder_heads
from patchkit.kernels.reorder import NAMES, rows_of_order
from patchkit.recipes.paro import Facts, PermutePlan, PlanError, import_plan
from patchkit.recipes.paro.buckets import bucket_of, mask_numbers
from patchkit.recipes.paro.packing import pack, unpack
from patchkit.recipes.paro.scoring import choose, incoherence, kept_share, scores, skippable
from patchkit.recipes.paro.settings import described
from patchkit.recipes.paro.thresholds import Threshold, find_threshold, forced_blocks, kept_mass, mask_at, masks_of

GRID = (8, 16, 16)
HEADS = {"temporal": (0.02, 2, 2), "row": (1, 2, 0.01), "column": (1, 0.01, 2), "frame": (2, 0.02, 0.02)}


# --- oracle 6: four synthetic heads ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads():
    """Figures of six orders for the four heads, by the operators: logits -(a . distance^2) + 0.3 noise from q k."""
    g = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in GRID))
    centred = places - places.mean(0)
    q, k = [], []
    for a in HEADS.values():
        weights = torch.tensor(a, dtype=torch.float32)
        near = (centred.square() * weights).sum(-1, keepdim=True)
        noise = torch.randn(2, len(places), 120, generator=g) * math.sqrt(0.3) / 120**0.25
        ones = torch.ones_like(near)
        q.append(torch.cat([2 * weights * centred, ones, near, noise[0]], -1))
        k.append(torch.cat([centred, -near, -ones, noise[1]], -1))
    q, k = torch.stack(q)[None], torch.stack(k)[None]
    _, lse = dense_attention(q, k, torch.zeros_like(k), scale=1.0, return_lse=True)
    sparse, quant, kept = [], [], {0.1: [], 0.2: []}
    for code in range(6):
        moved = {"codes": [code] * 4, "grid": GRID}
        (qc,), (kc,) = reorder_heads(q, **moved), reorder_heads(k, **moved)
        rows = reorder_heads(lse[..., None], **moved)[0][..., 0]
        total, peak, small = block_statistics(qc, kc, rows, 64, 1e-3, scale=1.0)
        sparse.append(skippable(small, 64, 0.9)[0])
        quant.append(incoherence(total, peak, 64)[0])
        for density, values in kept.items():
            values.append(kept_share(total, density)[0])
    stacked = [torch.stack(x, -1) for x in (sparse, quant, kept[0.1], kept[0.2])]
    return {name: [x[i] for x in stacked] for i, name in enumerate(HEADS)}


def pick(figures, alpha, select="score"):
    sparse, quant, _, kept = figures
    return NAMES[int(choose(sparse, quant, kept, tuple(range(6)), select, alpha))]


def printed(figures, alpha):
    """The paper's own combination, with M_sparse in the place of 1 - M_sparse."""
    sparse, quant, *_ = figures
    return NAMES[int(scores(1 - sparse, quant, alpha).argmin())]


def test_a_temporal_head(heads):
    sparse, quant, at_ten, at_twenty = heads["temporal"]
    assert pick(heads["temporal"], 1.0) in ("HWF", "WHF")
    assert pick(heads["temporal"], 0.5) in ("HWF", "WHF")
    assert pick(heads["temporal"], 0.0) in ("HFW", "WFH")
    assert printed(heads["temporal"], 0.5) in ("HFW", "WFH")
    best = NAMES.index("HWF")
    assert float(at_twenty[best]) > 0.999
    assert float(at_twenty[0]) == pytest.approx(0.831, abs=0.02)
    assert float(at_ten[best]) == pytest.approx(0.990, abs=0.01)
    assert float(sparse[best]) == pytest.approx(0.910, abs=0.02)
    assert float(sparse[0]) == pytest.approx(0.812, abs=0.02)
    assert float(quant[best]) == pytest.approx(78, rel=0.15)
    assert float(quant[0]) == pytest.approx(274, rel=0.15)
    assert pick(heads["temporal"], 0.5, "kept_mass") in ("HWF", "WHF")


def test_a_row_local_head(heads):
    _, _, _, kept = heads["row"]
    assert pick(heads["row"], 0.5) == "HFW"
    assert pick(heads["row"], 0.0) == "HWF"
    assert float(kept[NAMES.index("HFW")]) > 0.999
    assert float(kept[NAMES.index("FWH")]) == pytest.approx(0.787, abs=0.02)


def test_a_column_local_head(heads):
    _, _, _, kept = heads["column"]
    assert pick(heads["column"], 0.5) == "WFH"
    assert float(kept[NAMES.index("WFH")]) > 0.999
    assert float(kept[0]) == pytest.approx(0.787, abs=0.02)


def test_a_frame_local_head(heads):
    _, _, _, kept = heads["frame"]
    assert pick(heads["frame"], 0.5) in ("FHW", "FWH")
    assert float(kept[0]) == pytest.approx(0.917, abs=0.02)
    assert float(kept[NAMES.index("HWF")]) == pytest.approx(0.46, abs=0.03)


def test_ties_go_to_the_lower_code_and_nothing_divides_by_zero():
    zeros = torch.zeros(3, 6)
    found = choose(torch.ones(3, 6), zeros, zeros, tuple(range(6)), "score", 0.5)
    assert found.tolist() == [0, 0, 0]
    assert found.dtype == torch.uint8
    quant = torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0, 9.0]])
    assert int(choose(torch.zeros(1, 6), quant, zeros[:1], tuple(range(6)), "score", 0.0)) == 1
    assert int(choose(zeros[:1, :2], quant[:, :2], zeros[:1, :2], (0, 1), "kept_mass", 0.0)) == 0


def test_blocks_without_any_mass_are_coherent():
    assert float(incoherence(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 16)) == 1.0


# --- oracle 7: thresholds ----------------------------------------------------------------------------------------


def masses(heads=3, n=12, seed=0):
    return torch.rand(heads, n, n, generator=torch.Generator().manual_seed(seed)).pow(6)


def one(mass):
    part = [(mass, forced_blocks(mass))]
    return lambda: part


@pytest.mark.parametrize("density", [0.2, 0.3, 0.5, 0.77, 1.0])
def test_density_is_hit_and_every_row_keeps_something(density):
    mass = masses()
    ((_, keep),) = masks_of(one(mass), density)
    assert float(keep.float().mean()) == pytest.approx(density, abs=1 / mass.numel())
    assert bool(keep.any(-1).all())
    assert bool(keep[:, range(12), range(12)].all())
    assert bool(keep.gather(-1, mass.argmax(-1, keepdim=True)).all())


def test_equal_masses_still_hit_the_density():
    mass = torch.ones(2, 10, 10)
    ((_, keep),) = masks_of(one(mass), 0.4)
    assert int(keep.sum()) == 80
    zero = torch.zeros(2, 10, 10)
    assert int(next(iter(masks_of(one(zero), 0.4)))[1].sum()) == 80


def test_forced_blocks_alone_where_the_density_is_too_low():
    mass = masses()
    ((_, keep),) = masks_of(one(mass), 0.01)
    assert torch.equal(keep, forced_blocks(mass))


def test_a_larger_threshold_never_adds_a_block_and_mass_is_monotone():
    mass = masses()
    part = mass, forced_blocks(mass)
    found = [mask_at(part, Threshold(tau, tau, 0))[0] for tau in (-1.0, 0.0, 0.05, 0.3, 0.9, 2.0)]
    for wide, narrow in itertools.pairwise(found):
        assert not bool((narrow & ~wide).any())
    shares = [kept_mass(mass, next(iter(masks_of(one(mass), d)))[1]).mean() for d in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert shares == sorted(shares)
    assert float(shares[-1]) == pytest.approx(1.0)


def test_one_threshold_over_several_parts_gives_heavy_ones_more():
    heavy, light = masses(seed=1) * 4, masses(seed=2)

    def parts():
        return ((m, forced_blocks(m)) for m in (heavy, light))

    (_, a), (_, b) = masks_of(parts, 0.5)
    assert a.sum() > b.sum()
    assert int(a.sum() + b.sum()) == round(0.5 * 2 * heavy.numel())
    assert find_threshold(parts, 0.5).tau > 0


# --- buckets -----------------------------------------------------------------------------------------------------


def test_buckets_of_a_run():
    for total in (4, 10, 30, 37, 50):
        found = [bucket_of(step, total, 10) for step in range(total)]
        assert found[0] == 0
        assert found[-1] == 9 or total < 10
        assert found == sorted(found)
    assert [bucket_of(s, 30, 10) for s in (0, 2, 3, 29)] == [0, 0, 1, 9]


def test_late_buckets_share_one_mask():
    assert mask_numbers(10, 0.5) == (0, 1, 2, 3, 4, 5, 5, 5, 5, 5)
    assert mask_numbers(4, 0.5) == (0, 1, 2, 2)
    assert mask_numbers(3, 1.0) == (0, 1, 2)
    assert mask_numbers(3, 0.0) == (0, 0, 0)
    with pytest.raises(InvalidOption):
        mask_numbers(0, 0.5)


# --- files -------------------------------------------------------------------------------------------------------


def facts(**changes):
    known = {
        "sites": ("t.0", "t.1"),
        "models": {"transformer": "A"},
        "layers": {"transformer": 2},
        "grid": (4, 8, 8),
        "text": (16, 16),
        "text_first": True,
        "block": 16,
        "masks": (0, 1, 1),
        "steps": 6,
        "scheduler": "S",
    }
    return Facts(**{**known, **changes})


def small_plan(**changes):
    g = torch.Generator().manual_seed(0)
    order = torch.randint(0, 6, (2, 3), generator=g).to(torch.uint8)
    masks = torch.rand(2, 2, 3, 16, 16, generator=g) < 0.4
    return PermutePlan.from_masks(order, masks, facts(**changes), torch.rand(2, 2, 3, generator=g)), masks


@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
def test_bits_and_back(n):
    mask = torch.rand(3, 5, n, generator=torch.Generator().manual_seed(n)) < 0.5
    assert torch.equal(unpack(pack(mask), n), mask)
    assert pack(mask).dtype == torch.int32
    assert pack(mask).shape[-1] == -(-n // 32)


def test_a_saved_plan_comes_back(tmp_path):
    plan, masks = small_plan()
    path = plan.save(tmp_path / "a" / "plan.safetensors")
    other = PermutePlan.load(path)
    assert torch.equal(other.masks, masks)
    assert torch.equal(other.order, plan.order)
    assert torch.equal(other.kept_mass, plan.kept_mass)
    assert torch.equal(other.density, masks.float().mean((-1, -2)))
    assert other.facts == plan.facts
    assert torch.equal(other.mask(2, 1), masks[1, 1])
    assert plan.bits.numel() * 4 == masks.numel() / 4  # 16 blocks fill half a word of 32
    assert [p.name for p in path.parent.iterdir()] == ["plan.safetensors"]


def test_files_that_hold_no_plan(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(PlanError, match="there is no file"):
        PermutePlan.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PlanError, match="cannot be read"):
        PermutePlan.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(PlanError, match="holds no plan"):
        PermutePlan.load(tmp_path / "other")


def test_tensors_that_contradict_each_other():
    plan, _ = small_plan()
    with pytest.raises(PlanError, match="bits is"):
        PermutePlan(plan.order, plan.bits[..., :1, :], plan.kept_mass, plan.density, plan.empty, facts(masks=(0, 2)))
    with pytest.raises(PlanError, match="codes 0 to 5"):
        PermutePlan(plan.order + 6, plan.bits, plan.kept_mass, plan.density, plan.empty, plan.facts)


def official(tmp_path, masks, **extra):
    order = torch.tensor([[0, 2, 5], [1, 3, 4]])
    torch.save({"permute": order, "empty": torch.zeros(2, 3, dtype=torch.bool)}, tmp_path / "permute_plan.pth")
    torch.save(masks, tmp_path / "sparse_plan.pth")
    arguments = {"model": "A", "grid": (4, 8, 8), "text": 16, "block": 16} | extra
    return order, import_plan(tmp_path / "permute_plan.pth", tmp_path / "sparse_plan.pth", **arguments)


def test_the_authors_files_are_read(tmp_path):
    masks = torch.rand(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    order, plan = official(tmp_path, {"sparse": masks, "dense_rate": masks.float().mean((-1, -2))})
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.masks, masks)
    assert plan.buckets == 4
    assert plan.row_of("anything", 1) == 1
    assert plan.row_of("anything", 2) is None
    assert bool(plan.kept_mass.isnan().all())
    with_text = torch.ones(4, 2, 3, 17, 17, dtype=torch.bool)
    with_text[..., 1:, 1:] = masks
    assert torch.equal(official(tmp_path, with_text)[1].masks, masks)
    with pytest.raises(PlanError, match="are none of 16 whole image blocks"):
        official(tmp_path, masks[..., :9, :9])


@pytest.mark.parametrize(
    ("grid", "text", "size", "bare", "front"),
    [
        ((13, 30, 45), 226, 274, False, 0),  # CogVideoX: image blocks, the ragged last one among them
        ((13, 30, 45), 226, 278, True, 4),  # the same with the blocks of text in front
        ((21, 45, 80), 0, 1182, False, 0),  # Wan 2.1 in 720p: no text, 1181.25 blocks
    ],
)
def test_the_authors_masks_count_the_ragged_block(tmp_path, grid, text, size, bare, front):
    masks = torch.rand(1, 1, 1, size, size, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.save({"permute": torch.tensor([[2]])}, tmp_path / "permute_plan.pth")
    torch.save(masks if bare else {"sparse": masks}, tmp_path / "sparse_plan.pth")
    files = tmp_path / "permute_plan.pth", tmp_path / "sparse_plan.pth"
    plan = import_plan(*files, model="A", grid=grid, text=text)
    n = (text + math.prod(grid)) // 64 - -(-text // 64)
    assert plan.blocks == n == size - front - 1
    assert torch.equal(plan.masks, masks[..., front : front + n, front : front + n])
    assert plan.facts.text_first == (text > 0)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.mark),)


def test_the_authors_files_cannot_run_code(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "permute_plan.pth"
    torch.save({"permute": Evil(mark)}, path)
    with pytest.raises(PlanError, match="cannot be read"):
        import_plan(path, path, model="A", grid=(1, 1, 1))
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert mark.exists()


def test_arguments_of_a_call_are_told_apart_by_what_is_in_them():
    """What a folder of figures was made with is compared in other processes, where objects have other addresses."""
    import numpy as np
    from PIL import Image

    def values(shade):
        picture = Image.new("RGB", (4, 4), (shade, 0, 0))
        return [
            picture,
            torch.full((2, 300), shade),
            np.full(3, shade),
            [picture, shade],
            {"a": shade},
            np.float32(shade),
        ]

    for one, same, other in zip(values(1), values(1), values(2), strict=True):
        assert described(one) == described(same) != described(other)
    assert "0x" not in described(object()) + described(torch.Generator()) + described(print) + described([object()])


def test_masses_in_an_order_are_those_of_moved_rows_and_columns():
    """The block masses that a plan is made of are those of P with rows and columns permuted alike."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 60, 16, generator=g) for _ in range(2))
    p = (q @ k.transpose(-1, -2) / 4).softmax(-1)[0, 0]
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    for code in range(6):
        r = rows_of_order(code, (3, 4, 5))
        moved = [reorder_heads(x, codes=[code], grid=(3, 4, 5))[0] for x in (q, k, lse[..., None])]
        mass = block_mass(moved[0], moved[1], moved[2][..., 0].contiguous(), 20, 20)
        wanted = p[r][:, r].view(3, 20, 3, 20).sum((1, 3))
        assert torch.allclose(mass[0, 0], wanted, atol=1e-5)
