"""AdaSpa's choice of blocks on masses made for the purpose: budgets, optimality, ties, text."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from patchkit.context import Span
from patchkit.recipes.adaspa.compute import _layout_of_mask, make_layout
from patchkit.recipes.adaspa.schedule import plan
from patchkit.recipes.adaspa.selection import Geometry, blocks_per_row, choose, level_of, levels


def geometry(rows, columns=None, text=None):
    tokens = rows * 16
    assert columns in (None, rows)
    found = Geometry.of(tokens, (16, 16), text, None)
    assert isinstance(found, Geometry)
    return found


def masses(heads=4, size=8, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, size, size, generator=g)


# --- oracle 4: optimality -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_other_choice_of_as_many_blocks_a_row_keeps_more(k):
    mass = masses(heads=2, size=6)
    found = choose([mass], geometry(6), k / 6, adaptive=False)
    assert found.k.unique().tolist() == [k]
    for h, p in itertools.product(range(2), range(6)):
        row = mass[0, h, p]
        best = max(float(row[list(pick)].sum()) for pick in itertools.combinations(range(6), k))
        assert float(row[found.kept[0, h, p]].sum()) == pytest.approx(best)
    assert torch.allclose(found.recall, (mass * found.kept).sum((-1, -2)) / mass.sum((-1, -2)))


def test_pooled_scores_choose_worse_where_block_means_say_nothing():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 128, 16, generator=g) * 0.1 for _ in range(2))
    for row, column in ((0, 5), (1, 3), (2, 7), (3, 0), (4, 6), (5, 1), (6, 2), (7, 4)):
        spike = torch.zeros(16)
        spike[row] = 12.0
        for x, block in ((q, row), (k, column)):  # one pair of tokens attends, its opposites cancel the block mean
            x[0, 0, block * 16] += spike
            x[0, 0, block * 16 + 1] -= spike
    p = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    mass = p.unflatten(-1, (8, 16)).sum(-1).unflatten(-2, (8, 16)).sum(-2)
    found = choose([mass], geometry(8), 1 / 8, adaptive=False)
    pooled = (q.unflatten(2, (8, 16)).mean(3) @ k.unflatten(2, (8, 16)).mean(3).transpose(-1, -2)).argmax(-1)
    by_pooling = torch.nn.functional.one_hot(pooled, 8).bool()
    recall = float((mass * by_pooling).sum() / mass.sum())
    assert float(found.recall) > recall + 0.02


# --- oracle 5: rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.1, 0.3, 0.7, 1.0])
def test_rows_are_even_and_never_empty(density):
    found = choose([masses(batch=2)], geometry(8), density)
    counts = found.kept.sum(-1)
    assert torch.equal(counts, found.k[..., None].expand_as(counts))
    assert int(counts.min()) >= 1


def test_global_choice_is_the_heaviest_of_the_head_and_leaves_rows_empty():
    mass = masses(heads=2, size=8)
    mass[:, :, 0] *= 0.01
    found = choose([mass], geometry(8), 0.25, adaptive=False, mode="global")
    assert found.kept.sum((-1, -2)).tolist() == [[16, 16]]
    assert not bool(found.kept[:, :, 0].any())
    for h in range(2):
        kept, left = mass[0, h][found.kept[0, h]], mass[0, h][~found.kept[0, h]]
        assert float(kept.min()) >= float(left.max())


def test_ties_go_to_the_lower_block():
    found = choose([torch.ones(1, 2, 8, 8)], geometry(8), 3 / 8, adaptive=False)
    assert bool(found.kept[..., :3].all())
    assert not bool(found.kept[..., 3:].any())


@pytest.mark.parametrize("mode", ["rows", "global"])
def test_heads_may_come_in_parts(mode):
    mass = masses(heads=6, batch=2)
    whole = choose([mass], geometry(8), 0.3, mode=mode)
    parts = choose([mass[:, :1], mass[:, 1:5], mass[:, 5:]], geometry(8), 0.3, mode=mode)
    for name in ("kept", "k", "density", "recall", "base_recall"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


# --- oracle 6: budgets --------------------------------------------------------------------------------------------


def mass_with_recalls(recalls, size=10):
    """One sample; head h has recalls[h] of its mass in the two heaviest blocks of every row (density 0.2)."""
    mass = torch.zeros(1, len(recalls), size, size)
    for h, recall in enumerate(recalls):
        mass[0, h] = (1 - recall) / (size - 2)
        mass[0, h, :, 3:5] = recall / 2
    return mass


@pytest.mark.parametrize(
    ("recalls", "wanted"),
    [
        ([0.9, 0.5, 0.6, 0.7], [0.1, 0.3, 0.2, 0.2]),
        ([0.9, 0.5, 0.95, 0.7], [0.1, 0.3, 0.1, 0.3]),
        ([0.9, 0.99, 0.95, 0.85], [0.3, 0.1, 0.1, 0.3]),  # all above the threshold: half of them give
        ([0.9, 0.99, 0.95], [0.3, 0.1, 0.2]),  # an odd number: the one in the middle keeps d
        ([0.4, 0.5, 0.6, 0.7], [0.2, 0.2, 0.2, 0.2]),  # nobody has anything to give
        ([0.95], [0.2]),
    ],
)
def test_three_levels_on_the_right_heads(recalls, wanted):
    found = choose([mass_with_recalls(recalls)], geometry(10), 0.2)
    assert found.base_recall[0].tolist() == pytest.approx(recalls, abs=1e-5)
    assert found.density[0].tolist() == pytest.approx(wanted)
    assert found.k[0].tolist() == [round(d * 10) for d in wanted]
    assert float(found.density.mean()) == pytest.approx(0.2)


def test_budgets_are_those_of_each_sample():
    mass = torch.cat([mass_with_recalls([0.9, 0.5, 0.6, 0.7]), mass_with_recalls([0.5, 0.6, 0.7, 0.9])])
    found = choose([mass], geometry(10), 0.2)
    assert found.k.tolist() == [[1, 3, 2, 2], [3, 2, 2, 1]]


def test_threshold_itself_is_not_above_it():
    assert level_of(torch.tensor([[0.8, 0.1]]), 0.8).tolist() == [[1, 1]]
    assert level_of(torch.tensor([[0.81, 0.1]]), 0.8).tolist() == [[0, 2]]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 2 / 3, 0.7, 0.9, 1.0])
def test_the_mean_of_the_levels_is_the_density(density):
    low, high = levels(density)
    assert (low + high) / 2 == pytest.approx(density)
    assert 0 < low <= density <= high <= 1
    if density <= 2 / 3:
        assert (low, high) == pytest.approx((density / 2, 1.5 * density))


def test_everything_is_kept_at_density_one():
    found = choose([mass_with_recalls([0.9, 0.5, 0.95, 0.7])], geometry(10), 1.0)
    assert bool(found.kept.all())
    assert found.recall[0].tolist() == pytest.approx([1.0] * 4)


def test_without_adaptivity_all_heads_keep_the_density():
    found = choose([mass_with_recalls([0.9, 0.5, 0.95, 0.7])], geometry(10), 0.2, adaptive=False)
    assert found.k.unique().tolist() == [2]


def test_recall_is_that_of_the_final_choice():
    mass = mass_with_recalls([0.9, 0.5, 0.6, 0.7])
    found = choose([mass], geometry(10), 0.2)
    assert torch.allclose(found.recall, (mass * found.kept).sum((-1, -2)) / mass.sum((-1, -2)))


@pytest.mark.parametrize(("density", "columns", "k"), [(0.2, 10, 2), (0.01, 10, 1), (0.25, 34, 8), (1.0, 7, 7)])
def test_rounding(density, columns, k):
    assert blocks_per_row(density, columns) == k


# --- oracle 10: a stale LSE ---------------------------------------------------------------------------------------


def test_an_lse_error_that_is_constant_in_a_row_of_blocks_changes_no_choice():
    mass = masses()
    factor = torch.rand(1, 4, 8, 1, generator=torch.Generator().manual_seed(1)) * 10 + 0.1
    a, b = (choose([m], geometry(8), 0.3, adaptive=False) for m in (mass, mass * factor))
    assert torch.equal(a.kept, b.kept)
    # and one that is constant in a head changes neither recall nor budgets
    c, d = (choose([m], geometry(8), 0.3, threshold=0.3) for m in (mass, mass * factor[:, :, :1]))
    assert torch.equal(c.kept, d.kept)
    assert torch.allclose(c.recall, d.recall)


# --- oracle 8: geometry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "text", "rows"),
    [
        (128, None, (0, 8)),
        (120, None, (0, 8)),
        (128, Span(0, 16), (1, 8)),
        (128, Span(0, 17), (2, 8)),
        (120, Span(0, 1), (1, 8)),
        (128, Span(112, 128), (0, 7)),
        (128, Span(111, 128), (0, 6)),
        (120, Span(119, 120), (0, 7)),
        (118_800 + 256, Span(118_800, 119_056), (0, 1856)),
    ],
)
def test_rows_without_text(tokens, text, rows):
    size = 16 if tokens < 1000 else 64
    found = Geometry.of(tokens, (size, size), text, None)
    assert isinstance(found, Geometry)
    assert found.rows == found.columns == rows


def test_text_takes_no_part_in_the_budget():
    text = Span(96, 128)
    mass = torch.zeros(1, 2, 8, 8)
    mass[..., 6:] = 100.0  # two blocks of text, heavier than all video
    mass[..., :6] = torch.rand(1, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    found = choose([mass], geometry(8, text=text), 0.5, adaptive=False)
    assert found.kept.shape == (1, 2, 6, 6)
    assert found.k.unique().tolist() == [3]
    whole = geometry(8, text=text).with_text(found.kept)
    assert bool(whole[..., 6:].all())
    assert bool(whole[..., 6:, :].all())
    assert whole[..., :6, :6].sum(-1).unique().tolist() == [3]
    assert torch.allclose(found.recall, (mass * whole).sum((-1, -2)) / mass.sum((-1, -2)))


def test_padding_between_text_and_video_is_rolled_to_the_end():
    valid = torch.ones(2, 96, dtype=torch.bool)
    valid[0, 20:32] = False
    found = Geometry.of(96, (16, 16), Span(0, 32), valid)
    assert isinstance(found, Geometry)
    assert (found.shift, found.lengths) == (32, (84, 96))
    assert (found.rows, found.columns) == ((2, 6), (0, 4))


def test_a_mask_that_hides_nothing_is_no_mask():
    found = Geometry.of(96, (16, 16), Span(0, 32), torch.ones(1, 96, dtype=torch.bool))
    assert isinstance(found, Geometry)
    assert (found.shift, found.lengths) == (0, None)


# --- layouts ------------------------------------------------------------------------------------------------------

PLACES = [
    pytest.param(None, 0, id="no-text"),
    pytest.param(Span(0, 20), 0, id="text-first"),
    pytest.param(Span(0, 64), 0, id="text-first-whole-blocks"),
    pytest.param(Span(470, 500), 0, id="text-last"),
    pytest.param(Span(0, 40), 13, id="padded-text-first"),
    pytest.param(Span(460, 500), 37, id="padded-text-last"),
]


@pytest.mark.parametrize(("text", "padding"), PLACES)
@pytest.mark.parametrize("density", [0.04, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("heads", [slice(0, 5), slice(1, 4), torch.tensor([0, 2, 4])], ids=["all", "slice", "some"])
def test_lists_give_the_layout_that_masks_give(text, padding, density, heads):
    """Tensor for tensor, with ties and heads of three budgets; the mask is the definition, the lists the way."""
    valid = None
    if padding:
        valid = torch.ones(2, 500, dtype=torch.bool)
        valid[0, text.stop - padding : text.stop] = False
    where = Geometry.of(500, (32, 16), text, valid)
    assert isinstance(where, Geometry)
    count = len(range(5)[heads]) if isinstance(heads, slice) else len(heads)
    mass = (torch.rand(2, count, *where.counts, generator=torch.Generator().manual_seed(0)) ** 2 * 30).round()
    if where.lengths is not None:
        mass[0, :, :, -(-where.lengths[0] // 16) :] = 0
    found = choose([mass], where, density, threshold=0.3)
    call = SimpleNamespace(q=torch.empty(2, 5, 500, 1))
    layout = make_layout(found, where, call, heads)
    wanted = _layout_of_mask(found, where, call, heads)
    assert layout._tensors().keys() == wanted._tensors().keys()
    for name, x in layout._tensors().items():
        assert torch.equal(x, wanted._tensors()[name]), name
        assert x.dtype == wanted._tensors()[name].dtype


def test_choosing_waits_for_no_device():
    """A meta tensor has no values: whatever read one would raise."""
    where = Geometry.of(500, (16, 16), Span(480, 500), None)
    assert isinstance(where, Geometry)
    found = choose([torch.empty(1, 2, *where.counts, device="meta")] * 2, where, 0.2)
    assert found.lists is not None
    assert found.lists.shape == (1, 4, 30, 9)
    assert found.recall.shape == found.k.shape == (1, 4)


# --- schedule -----------------------------------------------------------------------------------------------------


def test_fractions_name_the_last_step_of_their_part_of_the_run():
    schedule = plan(0.2, None, 0.6, 50)
    assert schedule is not None
    assert (schedule.warm_up, schedule.first, schedule.searches, schedule.sparse_steps) == (10, 9, (29,), 40)
    assert plan(0.2, [0.2, 0.6], 0.6, 50) == schedule
    assert plan(10, [9, 29], 0.6, 50) == schedule


@pytest.mark.parametrize("total", range(1, 101))
def test_schedules_of_all_lengths_are_sound(total):
    schedule = plan(0.2, None, 0.6, total)
    assert schedule is not None
    assert abs(schedule.warm_up - 0.2 * total) <= 0.5
    assert all(schedule.first < s < total for s in schedule.searches)
    assert schedule.ignored == ()


def test_searches_that_cannot_be_are_named():
    schedule = plan(0.5, [3, 12, 40], 0.6, 20)
    assert schedule is not None
    assert (schedule.searches, schedule.ignored) == ((12,), (3, 40))


def test_without_a_length_only_step_numbers_mean_something():
    assert plan(0.2, None, 0.6, None) is None
    assert plan(4, [0.5], 0.6, None) is None
    schedule = plan(4, None, 0.6, None)
    assert schedule is not None
    assert (schedule.warm_up, schedule.searches) == (4, ())


# --- the shipped example ------------------------------------------------------------------------------------------


def test_example_asks_for_this_recipe():
    from patchkit.recipe_files import files
    from patchkit.recipes.adaspa import AdaSpa

    example = files.parse(files.locate("adaspa"))
    [recipe] = example.recipes
    assert isinstance(recipe, AdaSpa)
    assert example.compare
    assert recipe.min_tokens <= 1088  # the zoo's video is this long: it must not run dense


def test_a_head_without_mass_is_the_worst_not_the_best():
    nan = float("nan")
    assert level_of(torch.tensor([[nan, 0.95, 0.3, 0.4]]), 0.8).tolist() == [[2, 0, 1, 1]]
