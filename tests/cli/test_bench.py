"""patchkit bench: shapes, and a tiny real pipeline."""

from __future__ import annotations

import json
import time

import pytest
import torch.nn.functional as F

import patchkit
from patchkit.runs import benching, loading
from patchkit.runs.share import measure_share

SHAPE = ("--tokens", 300, "--heads", 2, "--head-dim", 32, "--seconds", 0, "--quiet")


def test_a_shape_is_measured(cli, here):
    result = cli("bench", *SHAPE, "--density", 0.3, "--density", 0.6, "--text", 20, "--kv-heads", 1)
    assert result.exit_code == 0, result.output
    for words in ("2 heads (1 KV) x 300 + 20 tokens x 32", "retention", "blocked:", "expected for a whole run", "80%"):
        assert words in result.stdout
    assert list(here.iterdir()) == []


def test_json(cli):
    result = cli("bench", *SHAPE, "--density", 0.3, "--block", 32, "--json", "--num-inference-steps", 20)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = found["attention"]
    assert (row["tokens"], row["heads"], row["block"], row["density_asked"]) == (300, 2, 32, 0.3)
    assert row["passed"]
    assert found["steps"] == 20
    assert [e["attention_share"] for e in found["expected"]] == list(benching.SHARES)


@pytest.mark.parametrize(
    ("arguments", "where", "words"),
    [
        ((), "--tokens", "the shape is not complete"),
        (("--tokens", 300, "--heads", 2), "--head-dim", "the shape is not complete"),
        ((*SHAPE, "--density", 1.5), "--density", "density is 1.5"),
        ((*SHAPE, "--block", 0), "--block", "block is 0"),
        ((*SHAPE, "--kv-heads", 3), "--kv-heads", "2 heads over 3"),
        ((*SHAPE, "--dtype", "int8"), "--dtype", "'int8' is no dtype"),
        ((*SHAPE, "--device", "cuda:7"), "--device", "'cuda:7' is not here"),
        ((*SHAPE, "--pattern", "waves"), "the shape to measure", "no pattern 'waves'"),
        (("nosuch",), "nosuch", "neither a file nor a recipe"),
    ],
)
def test_bad_input_is_one_block_and_exit_code_2(cli, here, arguments, where, words):
    result = cli("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert f"where: {where}" in result.stderr
    assert "do:" in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output


def test_the_formula_of_the_paper():
    """50 steps, warm-up 10, two searches of half a dense call, density 0.2: the figures of the compute plan."""
    request = benching.Request(steps=50)
    for retention, wanted in ((0.65, 1.75), (0.85, 1.90), (1.0, 1.98)):
        row = {"density": 0.2, "retention": retention, "search_over_dense": 0.5}
        assert benching.expected_speed_up(0.8, row, request) == pytest.approx(wanted, abs=0.006)


def test_a_recipes_own_cost_agrees_with_the_formula():
    recipe = patchkit.registry.get("adaspa").build({"density": 0.2})
    row = {"density_asked": 0.2, "density": 0.2, "retention": 0.65, "search_over_dense": 0.5}
    cost = benching._cost(recipe, row, tokens=50_000, steps=50)
    assert 1 / (1 - 0.8 + 0.8 * cost) == pytest.approx(1.75, abs=0.01)


def test_a_model_is_measured_before_and_after(cli, recipe_file, here, pipe):
    result = cli("bench", recipe_file, "--seconds", 0, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (row,) = found["attention"]
    assert row["density_asked"] == 0.25  # the recipe's own
    assert 0 < found["share"]["of_run"] <= found["share"]["of_denoiser"] <= 1
    assert found["measured"]["variants"]["patched"]["speed_up"] > 0
    assert found["measured"]["variants"]["patched"]["against"] == "dense"
    (expected,) = found["expected"]
    assert expected["attention_cost"] == 1.0  # this recipe promises nothing
    assert expected["speed_up"] == 1.0
    assert sorted(p.name for p in here.iterdir()) == ["r.yaml"]
    assert not patchkit.status(pipe)["patched"]


def test_the_table_of_a_model(cli, recipe_file, here, pipe):
    result = cli("bench", recipe_file, "--seconds", 0, "--density", 0.5, "--quiet")
    assert result.exit_code == 0, result.output
    for words in ("attention of these sites takes", "expected at density", "measured, dense", "measured, patched"):
        assert words in result.stdout


def test_the_attention_share_is_that_of_the_sites(pipe, monkeypatch):
    """Ops that sleep: their time is found, and split between the sites that are asked about and the others."""
    inputs = {"prompt": "a", "num_inference_steps": 2, "height": 32, "width": 48, "num_frames": 9}
    inputs |= {"max_sequence_length": 16, "output_type": "latent"}
    quick = F.scaled_dot_product_attention

    def sleepy(*args, **kwargs):
        time.sleep(0.02)
        return quick(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sleepy)
    names = next(entry["matched"] for entry in patchkit.plan(pipe, "dimming").to_dict()["recipes"])
    loaded = loading.Loaded(pipe, "pipeline")
    whole = measure_share(loaded, inputs, set(names))
    half = measure_share(loaded, inputs, set(names[:1]))
    assert whole.attention >= 2 * len(names) * 0.02
    assert whole.other == 0
    assert half.attention == pytest.approx(half.other, rel=0.5)
    assert whole.denoiser >= whole.attention
    assert whole.call["q"][2] == whole.call["k"][2]
    seconds, share = whole.run(100)
    assert share == pytest.approx(whole.of_denoiser, abs=0.1)
    assert seconds > 50 * 0.04
