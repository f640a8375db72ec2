"""The benchmark scripts run here, on small shapes, and keep their results to themselves."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a benchmark script as its own process would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def attention(script, monkeypatch):
    """Run sparse_attention.main with some arguments."""
    module = script("sparse_attention")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparse_attention.py", *map(str, arguments)])
        return module.main()

    run.module = module
    return run


def test_smoke_covers_every_shape_and_writes_nothing(attention, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert attention("--smoke", "--density", 0.3, "--block", 64, "--pattern", "video", "--out", out) == 0
    text = capsys.readouterr().out
    for name in ("hunyuanvideo", "wan-14b", "cogvideox-1.5", "flux-2k", "llm-prefill"):
        assert name in text
    assert "0 rows written, 0 failed" in text
    assert not out.exists()


def test_without_a_gpu_nothing_is_measured(attention, capsys):
    assert attention("--device", "cpu") == 2
    assert "take a GPU" in capsys.readouterr().out


def test_rows_that_are_there_are_skipped(attention, script, capsys, tmp_path, monkeypatch):
    """The GPU's way through the script, with a small shape on the CPU in the place of a GPU."""
    module, rows = attention.module, script("rows")
    shape = module.MODELS["wan-14b"].smaller(tokens=200, heads=1)
    monkeypatch.setattr(module, "MODELS", {"wan-14b": shape})
    monkeypatch.setattr(module, "conditions", lambda device: {"device": "X", "torch": "1", "clock_mhz": 1000.0})
    real = module.Bench
    monkeypatch.setattr(module, "Bench", lambda shape, dtype, device, **o: real(shape, dtype, "cpu", **o))
    out = tmp_path / "rows.jsonl"
    common = ("--device", "cuda", "--no-flex", "--seconds", 0, "--dtype", "fp32", "--block", 64, "--pattern", "random")
    assert attention(*common, "--density", 0.3, "--out", out) == 0
    (first,) = rows.read(out)
    assert (first["device"], first["density_asked"], first["kernels"]) == ("X", 0.3, rows.kernels_hash())
    assert "passed" not in first
    monkeypatch.setattr(module, "conditions", lambda device: {"device": "X", "torch": "1", "clock_mhz": 1500.0})
    assert attention(*common, "--density", 0.3, 0.5, "--out", out) == 0
    assert [r["density_asked"] for r in rows.read(out)] == [0.3, 0.5]
    monkeypatch.setattr(module, "conditions", lambda device: {"device": "Y", "torch": "1"})
    assert attention(*common, "--density", 0.5, "--out", out) == 0
    assert [r["device"] for r in rows.read(out)] == ["X", "X", "Y"]
    assert attention(*common, "--density", 0.1, "--minutes", 0, "--out", out) == 0
    assert "1 left for the next run" in capsys.readouterr().out
    assert len(rows.read(out)) == 3


def test_a_wrong_result_is_not_written(attention, capsys, tmp_path, monkeypatch):
    module = attention.module
    monkeypatch.setattr(module, "MODELS", {"wan-14b": module.MODELS["wan-14b"].smaller(tokens=200, heads=1)})

    class Wrong(module.Bench):
        def __init__(self, shape, dtype, device, **options):
            super().__init__(shape, dtype, "cpu", **options)
            self.limit = 0.0 if hasattr(self, "dense") else self.limit

    monkeypatch.setattr(module, "Bench", Wrong)
    monkeypatch.setattr(module, "conditions", lambda device: {"device": "X"})
    out = tmp_path / "rows.jsonl"
    arguments = ("--device", "cuda", "--no-flex", "--seconds", 0, "--dtype", "fp32", "--density", 0.3, "--block", 64)
    assert attention(*arguments, "--pattern", "random", "--out", out) == 1
    assert "wrong result: row not written" in capsys.readouterr().out
    assert not out.exists()


def test_it_needs_the_kernels_only():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('diffusers', 'transformers', 'pydantic', 'typer'): sys.modules[name] = None\n"
        "import sparse_attention\n"
    )
    done = subprocess.run([sys.executable, "-c", code, FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_conditions_of_this_machine(script):
    found = script("rows").conditions("cpu")
    assert {"device", "capability", "threads", "torch", "python"} <= set(found)
    json.dumps(found)


@pytest.fixture
def steps(script, monkeypatch):
    """benchmarks/model_step.py, and its arguments as on the command line."""
    module = script("model_step")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model_step.py", *map(str, arguments)])
        return module.main()

    run.module = module
    return run


def test_steps_of_tiny_models_go_through_every_phase(steps, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert steps("--smoke", "--repeats", 1, "--model", "wan-1.3b", "hunyuanvideo", "--out", out) == 0
    text = capsys.readouterr().out
    for words in (
        "wan-1.3b: 256 tokens",
        "hunyuanvideo: 272 tokens",
        "cached_search",
        "run of 50 steps",
        "attention alone",
    ):
        assert words in text
    assert not out.exists()
    assert steps("--device", "cpu") == 2


def test_layers_share_weights_but_are_modules_of_their_own(steps):
    subject = steps.module.SUBJECTS["hunyuanvideo"]
    args = argparse.Namespace(smoke=True, device="cpu", layer_share=1.0, own_weights=False)
    model, scale = subject.build(args)
    first, second = model.transformer_blocks
    assert first.attn.to_q.weight is second.attn.to_q.weight
    assert first.attn is not second.attn
    assert first.attn.processor is not second.attn.processor
    assert (len(model.single_transformer_blocks), scale) == (2, 1.0)
    args.own_weights, args.layer_share = True, 0.5
    model, scale = subject.build(args)
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks), scale) == (1, 1, 2.0)


def test_true_sizes(steps):
    """Token counts of the real models follow from latents and patches; heads from the configuration."""
    expected = {"hunyuanvideo": 118_800, "wan-14b": 75_600, "wan-1.3b": 32_760}
    for name, tokens in expected.items():
        _, _, frames, height, width = steps.module.SUBJECTS[name].latents
        assert frames * (height // 2) * (width // 2) == tokens


def test_a_run_is_put_together_from_its_phases(steps):
    row = {"dense_ms": 100.0, "fused_search_ms": 140.0, "sparse_ms": 40.0, "cached_search_ms": 80.0}
    row |= {name.replace("_ms", "_attention_ms"): value - 20 for name, value in row.items()}
    found = steps.module.composed(row)
    assert found["whole_run_s"] == pytest.approx((9 * 100 + 140 + 39 * 40 + 80) / 1e3)
    assert found["whole_speed_up"] == pytest.approx(5000 / 2680, abs=1e-3)
    assert found["attention_speed_up"] == pytest.approx(4000 / (9 * 80 + 120 + 39 * 20 + 60), abs=1e-3)
    assert found["attention_share"] == 0.8


def test_text_measures_recipes_beside_the_model_as_it_is(script, capsys, tmp_path, monkeypatch):
    """benchmarks/text.py on a tiny model: a recipe that changes nothing, and one that does."""
    import testing_recipes
    import tiny
    from tiny import tokenizers

    from patchkit.zoo.language import TextModel

    assert testing_recipes  # it registers them
    module = script("text")
    pair = TextModel(tiny.models.llama(), tokenizers.llama())
    monkeypatch.setattr(module.zoo, "load", lambda name, **options: pair)
    text, out = tmp_path / "words.txt", tmp_path / "rows.jsonl"
    text.write_text("the miller opened the gate and the wheel began to turn " * 2)
    recipes = [tmp_path / "same.yaml", tmp_path / "dimmed.yaml"]
    for recipe, density in zip(recipes, (1.0, 0.5), strict=True):
        recipe.write_text(f"version: 1\nrecipes:\n  - dimming: {{density: {density}}}\n")
    sizes = ["--window", 32, "--stride", 16, "--prompt", 12, "--generated", 3, "--repeats", 1]
    arguments = [*sizes, "--text", text, "--out", out, "--recipes", *recipes]
    monkeypatch.setattr(sys, "argv", ["text.py", *map(str, arguments)])
    assert module.main() == 0
    dense, same, other = (json.loads(line) for line in out.read_text().splitlines())
    assert dense["logit_error"] == same["logit_error"] == 0
    assert same["perplexity"] == dense["perplexity"] != other["perplexity"]
    assert other["logit_error"] > 0
    assert dense["cache_bytes"] == same["cache_bytes"] > 0
    assert (same["variant"], other["variant"]) == ("same", "dimmed")
    assert "dimmed" in capsys.readouterr().out


def test_headhunter_on_a_random_model(script, tmp_path: Path) -> None:
    """All phases, rows and the picture; what is finished is not computed again."""
    import tiny

    bench_of = script("headhunter")
    pipe = tiny.PIPELINES["sd3"].build(1)
    pipe.set_progress_bar_config(disable=True)
    shared = {"model": "tiny", "steps": 1, "hunt": 1, "unseen": 2, "top_k": 1, "rounds": 1, "scale": 0.5, "draws": 1}
    args = argparse.Namespace(**shared, seeds=2, batch=4, store=tmp_path)
    texts = bench_of.captions(3)
    assert len(set(texts)) == 3
    rows, against = bench_of.experiment(bench_of.Bench(pipe, args, texts))
    assert [r["variant"] for r in rows].count("found heads") == 4
    assert rows[0]["score_more_than_none"]["value"] == 0
    assert {r["against"] for r in against} >= {"none", "best whole layer", "random heads, 0.5"}
    bench_of.show(rows, against)
    bench_of.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    once = argparse.Namespace(**shared, seeds=1, batch=4, store=tmp_path)
    one = bench_of.Bench(None, once, texts).measure("unseen")["scores"]
    two = bench_of.Bench(None, args, texts)._measure("unseen", 20_000, (), 1.0)["scores"]
    assert rows[0]["score"]["value"] == pytest.approx(sum(one + two) / 4), "the mean over captions and seeds"
    again = bench_of.Bench(None, args, texts)
    assert again.measure("unseen")["scores"] == bench_of.Bench(pipe, args, texts).measure("unseen")["scores"]


def test_softpag_cost_predicts_and_makes_no_map(script) -> None:
    found = script("softpag_cost").measure(4, 2, 1, "cpu", side=64)
    assert [r.get("extra_forwards_predicted") for r in found] == [None, 1, 0.75, 0.5, 1, 0.25]
    assert all(r["largest_tensor"] < r["map_of_a_head"] for r in found)
    assert all(r["largest_tensor"] <= found[0]["largest_tensor"] for r in found if "image" not in r["variant"])


def test_quantised_attention_writes_rows_with_their_errors(script, monkeypatch, capsys):
    """On a CPU: torch's dense op, ours over a layout with its reordering, and the reordering by itself."""
    module, rows = script("quantised_attention"), script("rows")
    kept = []
    monkeypatch.setattr(rows, "write", lambda name, found: kept.extend(found))
    arguments = ["--only", "2k", "--heads", "1", "--densities", "0.5", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["quantised_attention.py", *arguments])
    module.main()
    assert [r["kind"] for r in kept] == ["torch", "sparse", "preparation alone"]
    assert all(r["relative_l1"] < 1e-3 and abs(r["norm_ratio"] - 1) < 1e-3 for r in kept[:2])
    q, k, v, grid, start = module.problem("2k", "cpu", 1)
    wrong, norm = module.errors(q * 0, q, k, v, None, [0], grid, start)
    assert (wrong, norm) == (1.0, 0.0)


def test_ditctrl_measures_a_long_video_once(script, tmp_path: Path, monkeypatch, capsys) -> None:
    module, out = script("ditctrl"), tmp_path / "rows.jsonl"
    arguments = ["--groups", "1", "--kinds", "long", "--labels", "full", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["ditctrl.py", *arguments])
    for _ in range(2):
        assert module.main() == 0
    [row] = (json.loads(line) for line in out.read_text().splitlines())
    assert row["frames"] == 39
    assert (row["block_forwards"], row["block_forwards_pairwise"]) == (3 * 6, 4 * 6)
    assert 0 < row["cscv_vlm"] <= 1
    assert "cscv_plain" in capsys.readouterr().out
    assert len(set(module.GROUPS)) == 20


def test_ditctrl_measures_its_cost(script, tmp_path: Path, monkeypatch) -> None:
    """Blocks as counted by hand, and the same bits."""
    module, out = script("ditctrl"), tmp_path / "rows.jsonl"
    arguments = ["--dedup", "--prompts", "2", "--labels", "blending", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["ditctrl.py", *arguments, "--out", str(out)])
    assert module.main() == 0
    [row] = (json.loads(line) for line in out.read_text().splitlines())
    assert (row["segments"], row["block_forwards"], row["block_forwards_pairwise"]) == (3, 3 * 6, 4 * 6)
    assert row["equal"]
    assert row["gain_processor"] > 0


def test_ditctrl_finds_the_peak_of_memory(script) -> None:
    import torch

    module = script("ditctrl_cost")
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with torch.profiler.profile(**options) as profile:
        first = torch.zeros(1000, dtype=torch.uint8)
        second = torch.zeros(5000, dtype=torch.uint8)
        del first
        third = torch.zeros(300, dtype=torch.uint8)
    peak, largest = module._peak(profile)
    assert 6000 <= peak < 6500
    assert 5000 <= largest < 5200
    assert len(second) + len(third) == 5300


def test_ditctrl_reads_each_prompt_where_it_is_alone(script) -> None:
    import torch

    from patchkit.zoo import world

    module = script("ditctrl")
    scenes = [world.Scene("circle", colour, "white", "still") for colour in ("red", "green", "blue")]
    stride = module.LENGTH - module.OVERLAP
    clip = torch.rand(module.LENGTH + 4 * stride, 3, 64, 64)  # of what is mixed nothing is read
    for i, part in enumerate(world.render(scenes, torch.linspace(0, 1, module.LENGTH))):
        start = 2 * i * stride
        low, high = (module.OVERLAP if i else 0), module.LENGTH - (module.OVERLAP if i < 2 else 0)
        clip[start + low : start + high] = part[low:high]
    assert module.judged(clip, [scene.caption for scene in scenes])["all"] == 1
