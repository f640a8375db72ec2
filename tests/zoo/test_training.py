"""The training scripts run, learn, and continue exactly where they were stopped."""

import json

import pytest
import torch

from patchkit.zoo.training import assemble, video, video_vae
from patchkit.zoo.training.muon import orthogonalise
from patchkit.zoo.training.plot import read_log
from patchkit.zoo.training.video import Stage

STAGES = (Stage(2, 2, 1), Stage(1, 1, 3))


def _video_run(out, stages=STAGES):
    out.mkdir(exist_ok=True)
    run = video.Run(out, stages, lr=0.02, seed=0)
    run.resume()
    return run


def _vae_run(out):
    out.mkdir(exist_ok=True)
    run = video_vae.Run(out, steps=3, batch=1, lr=1e-3, seed=0, noise=0.3)
    run.resume()
    return run


@pytest.mark.parametrize("make", [_video_run, _vae_run])
def test_a_resumed_run_equals_an_unbroken_one(make, tmp_path):
    whole = make(tmp_path / "whole")
    whole.fit()
    first = make(tmp_path / "broken")
    first.train_step()
    first.train_step()
    first.checkpoint()
    second = make(tmp_path / "broken")
    assert second.step == 2
    second.fit()
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r["step"] for r in read_log(tmp_path / "whole" / "log.jsonl")] == [3]
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_training_lowers_the_loss(tmp_path):
    run = _video_run(tmp_path / "run", (Stage(12, 4, 1),))
    losses = [run.train_step() for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


def test_assembled_model_loads_and_runs(tmp_path):
    from patchkit import zoo

    _video_run(tmp_path / "denoiser", (Stage(1, 1, 1),)).fit()
    run = _vae_run(tmp_path / "vae")
    run.train_step()
    run.checkpoint()
    size = assemble.save(assemble.assemble(tmp_path / "denoiser", tmp_path / "vae"), tmp_path / "model")
    assert 1e6 < size < 8e6
    pipe = zoo.load_folder(tmp_path / "model", "CogVideoXPipeline")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a red circle", num_inference_steps=1, guidance_scale=1.0).frames[0]) == 17
    assert sorted(p.name for p in tmp_path.iterdir()) == ["denoiser", "model", "vae"]


def test_some_frames_are_trained_at_their_true_places():
    denoiser, _ = video.build_models()
    subset = video.FrameSubset(denoiser)
    whole = denoiser.patch_embed.pos_embedding
    cos, _ = subset.select(torch.tensor([3, 9]))
    text, frame = video.MAX_TOKENS, 64
    picked = denoiser.patch_embed.pos_embedding
    assert picked.shape[1] == text + 2 * frame
    assert torch.equal(picked[:, text + frame :], whole[:, text + 9 * frame : text + 10 * frame])
    assert torch.equal(cos[:frame], subset.rotary[0][3 * frame : 4 * frame])
    subset.restore()
    assert denoiser.patch_embed.pos_embedding is whole


def test_the_rotary_table_is_the_pipelines():
    from patchkit import zoo

    pipe = zoo.load("video")
    cos, sin = pipe._prepare_rotary_positional_embeddings(64, 64, 17, torch.device("cpu"))
    ours = video.rotary_table(pipe.transformer)
    assert torch.equal(cos, ours[0])
    assert torch.equal(sin, ours[1])


def test_noise_levels_are_the_packaged_schedulers():
    from patchkit import zoo

    config = json.loads((zoo.path("video") / "scheduler" / "scheduler_config.json").read_text())
    for name, value in video.SCHEDULER.items():
        assert config[name] == value
    levels = video.noise_levels()
    assert levels[-1] == 0  # zero terminal signal-to-noise ratio
    assert (levels[:-1] > levels[1:]).all()


def test_orthogonalise_brings_singular_values_near_one():
    matrices = torch.randn((2, 24, 40), generator=torch.Generator().manual_seed(0))
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shape))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_one_command_goes_through_all_stages_and_leaves_the_package_alone(tmp_path, monkeypatch):
    """The real stages, cut to one step each."""
    from patchkit import zoo
    from patchkit.zoo.training import __main__ as command
    from patchkit.zoo.training import evaluate

    shorter = {video: ["--stages", "1x1x1"], video_vae: ["--steps", "1", "--batch", "1"]}
    shorter[evaluate] = ["--n", "1", "--control", "1", "--steps", "1"]
    for module, options in shorter.items():
        full = module.main
        monkeypatch.setattr(module, "main", lambda argv, full=full, options=options: full([*argv, *options]))
    monkeypatch.setattr(video_vae, "evaluate", lambda vae, noise: {"noise": noise})  # thirty clips
    before = {f: f.stat().st_mtime_ns for f in zoo.path("video").rglob("*")}
    monkeypatch.setattr("sys.argv", ["training", "video", "--out", str(tmp_path / "run"), "--threads", "1"])
    command.main()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"denoiser", "vae", "model", "evaluation", "loss.png"}
    assert json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["trained"]["n"] == 1
    assert before == {f: f.stat().st_mtime_ns for f in zoo.path("video").rglob("*")}
